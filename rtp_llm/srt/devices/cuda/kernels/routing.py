"""The choice of experts in Triton, in one launch. See ``reference.route``."""

import torch
import triton
import triton.language as tl

LOWEST, NO_EXPERT = tl.constexpr(float("-inf")), tl.constexpr(0x7FFFFFFF)


@triton.jit
def _in_best_groups(
    choice: tl.tensor,
    there: tl.tensor,
    num_groups: tl.tensor,
    BEST_GROUPS: tl.constexpr,
    TWO: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
) -> tl.tensor:
    """[GROUPS]: whether the group's best expert, or the sum of its best two, is among the best; lower groups first."""
    line, of_group = tl.arange(0, GROUPS), tl.arange(0, SIZE)[None, :]
    score = tl.max(choice, 1)
    if TWO:
        first = tl.min(tl.where(there & (choice >= score[:, None]), of_group, SIZE), 1)
        score += tl.max(tl.where(of_group == first[:, None], LOWEST, choice), 1)
    left, is_best = line < num_groups, line < 0
    for _ in range(BEST_GROUPS):
        best = tl.max(tl.where(left, score, LOWEST), 0)
        at = tl.min(tl.where(left & (score >= best), line, GROUPS), 0)
        left, is_best = left & (line != at), is_best | (line == at)
    return is_best


@triton.jit
def _route_kernel(
    logits: tl.tensor,
    bias: tl.tensor,
    weights: tl.tensor,
    ids: tl.tensor,
    stride: tl.tensor,
    num_groups: tl.tensor,
    group_size: tl.tensor,
    factor: tl.tensor,
    TOP_K: tl.constexpr,
    BEST_GROUPS: tl.constexpr,
    TWO: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    KEPT: tl.constexpr,
) -> None:
    """A token's experts are [GROUPS, SIZE]; the best is found TOP_K times. BEST_GROUPS 0: all groups."""
    token = tl.program_id(0).to(tl.int64)
    group, of_group = tl.arange(0, GROUPS)[:, None], tl.arange(0, SIZE)[None, :]
    expert, there = group * group_size + of_group, (group < num_groups) & (of_group < group_size)
    x = tl.load(logits + token * stride + expert, mask=there, other=LOWEST).to(tl.float32)
    if SIGMOID:
        scores = tl.sigmoid(x)
    else:
        scores = tl.exp(x - tl.max(tl.max(x, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    choice = scores
    if bias is not None:
        choice += tl.load(bias + expert, mask=there, other=0.0)
    choice = tl.where(there & (choice == choice), choice, LOWEST)  # of NaN, any expert
    if BEST_GROUPS:
        is_best = _in_best_groups(choice, there, num_groups, BEST_GROUPS, TWO, GROUPS, SIZE)
        choice = tl.where(is_best[:, None], choice, LOWEST)
    places, left = tl.arange(0, KEPT), there
    chosen, chosen_scores = tl.zeros([KEPT], tl.int32), tl.zeros([KEPT], tl.float32)
    for i in range(TOP_K):
        best = tl.max(tl.max(tl.where(left, choice, LOWEST), 1), 0)
        at = tl.min(tl.min(tl.where(left & (choice >= best), expert, NO_EXPERT), 1), 0)
        is_at = there & (expert == at)
        score = tl.sum(tl.sum(tl.where(is_at, scores, 0.0), 1), 0)
        chosen, chosen_scores = tl.where(places == i, at, chosen), tl.where(places == i, score, chosen_scores)
        left = left & (expert != at)
    if RENORMALIZE:
        chosen_scores = chosen_scores / (tl.sum(chosen_scores, 0) + 1e-20)
    tl.store(weights + token * TOP_K + places, chosen_scores * factor, mask=places < TOP_K)
    tl.store(ids + token * TOP_K + places, chosen.to(tl.int64), mask=places < TOP_K)


def route(
    logits: torch.Tensor,
    top_k: int,
    is_sigmoid: bool = False,
    renormalize: bool = False,
    correction_bias: torch.Tensor | None = None,
    num_groups: int = 1,
    num_best_groups: int = 1,
    factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.route``; of equal scores the lower expert is chosen first."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    group_size = num_experts // num_groups
    groups, size = triton.next_power_of_2(num_groups), triton.next_power_of_2(group_size)
    constants = {
        "TOP_K": top_k,
        "BEST_GROUPS": num_best_groups if num_best_groups < num_groups else 0,
        "TWO": correction_bias is not None and group_size > 1,
        "SIGMOID": is_sigmoid,
        "RENORMALIZE": renormalize,
        "GROUPS": groups,
        "SIZE": size,
        "KEPT": triton.next_power_of_2(top_k),
    }
    bias = None if correction_bias is None else correction_bias.float().contiguous()
    sizes = logits.stride(0), num_groups, group_size, factor
    if num_tokens:
        _route_kernel[(num_tokens,)](
            logits, bias, weights, ids, *sizes, **constants, num_warps=1 if groups * size <= 512 else 4
        )
    return weights, ids
