"""Tokens and the experts of other ranks, by every exchange, against experts that are all on one rank.

Ranks are threads of the test's process.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from thread_ranks import on_thread_ranks

from rtp_llm.srt.distributed.parallel_state import DATA, WorldShape, get_world
from rtp_llm.srt.layers.moe import FusedMoE, Routing, softmax_topk
from rtp_llm.srt.layers.token_exchange import goes_to, places_of

HIDDEN, SIZE, EXPERTS = 10, 6, 12
DTYPES = [torch.float32, torch.bfloat16]


def experts(dtype: torch.dtype) -> FusedMoE:
    layer = FusedMoE(EXPERTS, HIDDEN, SIZE, bias=True, params_dtype=dtype, prefix="experts")
    for _, param in layer.named_parameters():
        param.data.normal_()
    return layer


def of_this_rank(whole: FusedMoE) -> FusedMoE:
    layer = FusedMoE(EXPERTS, HIDDEN, SIZE, bias=True, params_dtype=whole.params_dtype, prefix="experts")
    for name, param in layer.named_parameters():
        param.weight_loader(param, whole.get_parameter(name).data)  # type: ignore[attr-defined]
    return layer


def on_ranks(tokens: list[torch.Tensor], routings: list[Routing], backend: str, whole: FusedMoE) -> list[Any]:
    """Return, for each rank, its tokens' sums, its layer, and the rows that it has sent."""

    def build() -> tuple[FusedMoE, list[torch.Tensor]]:
        world, sent = get_world(), []
        world.step_tokens, world.moe_a2a_backend = [len(x) for x in tokens], backend
        group: Any = world.group(DATA)
        send: Callable[..., torch.Tensor] = group.all_to_all

        def noting(x: torch.Tensor, counts: list[list[int]]) -> torch.Tensor:
            sent.append(x)
            return send(x, counts)

        group.all_to_all = noting
        return of_this_rank(whole), sent

    def run(built: tuple[FusedMoE, list[torch.Tensor]]) -> tuple[torch.Tensor, FusedMoE, list[torch.Tensor]]:
        layer, sent = built
        rank = get_world().rank
        return layer(tokens[rank], *routings[rank]), layer, sent

    ranks = len(tokens)
    return on_thread_ranks(WorldShape(expert=ranks, data=ranks), build, run)


def drawn(counts: list[int], top_k: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[Routing]]:
    tokens = [torch.randn(count, HIDDEN).to(dtype) for count in counts]
    return tokens, [softmax_topk(torch.randn(count, EXPERTS), top_k, renormalize=True) for count in counts]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["all_to_all", "none"])
@pytest.mark.parametrize(("counts", "top_k"), [([5, 3], 2), ([1, 40, 1], 5), ([7, 1, 2, 1], 1)], ids=str)
def test_sums_are_those_of_one_rank(counts: list[int], top_k: int, backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(sum(counts))
    whole = experts(dtype)
    tokens, routings = drawn(counts, top_k, dtype)
    with torch.no_grad():
        expected = [whole(x, *routing) for x, routing in zip(tokens, routings, strict=True)]
    results = on_ranks(tokens, routings, backend, whole)
    # Of bfloat16, each rank's sum is rounded before they are added up.
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.05}
    for (sums, layer, _), wanted, (_, ids) in zip(results, expected, routings, strict=True):
        assert sums.dtype == dtype
        torch.testing.assert_close(sums, wanted, **close)
        assert layer.load is not None and torch.equal(layer.load, ids.flatten().bincount(minlength=EXPERTS))


def test_a_token_is_sent_once_to_each_rank_of_its_experts() -> None:
    """The first rank has two tokens: one has two experts on it and none elsewhere, the other goes to all ranks."""
    torch.manual_seed(0)
    whole, tokens = experts(torch.float32), [torch.randn(2, HIDDEN), torch.randn(1, HIDDEN), torch.randn(1, HIDDEN)]
    ids = [torch.tensor([[0, 3, 1], [11, 5, 2]]), torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2]])]
    routings = [(torch.rand(len(each), 3), each) for each in ids]
    results = on_ranks(tokens, routings, "all_to_all", whole)
    sent, back = zip(*(rows for *_, rows in results), strict=True)
    assert torch.equal(sent[0], tokens[0][[0, 1, 1, 1]])
    assert torch.equal(sent[1], tokens[1]) and torch.equal(sent[2], tokens[2])
    assert [len(rows) for rows in back] == [4, 1, 1], "sums of tokens, not of experts"


def test_ranks_whose_experts_nobody_wants_take_part() -> None:
    torch.manual_seed(1)
    whole, (tokens, _) = experts(torch.float32), drawn([3, 2], 2, torch.float32)
    routings = [(torch.rand(len(x), 2), torch.tensor([[1, 4]] * len(x))) for x in tokens]
    with torch.no_grad():
        expected = [whole(x, *routing) for x, routing in zip(tokens, routings, strict=True)]
    for (sums, *_), wanted in zip(on_ranks(tokens, routings, "all_to_all", whole), expected, strict=True):
        torch.testing.assert_close(sums, wanted)


def test_a_bad_token_spoils_no_other() -> None:
    torch.manual_seed(2)
    whole, (tokens, routings) = experts(torch.float32), drawn([4, 4], 2, torch.float32)
    tokens[0][0] = float("nan")
    (first, *_), (second, *_) = on_ranks(tokens, routings, "all_to_all", whole)
    assert first[0].isnan().all() and first[1:].isfinite().all() and second.isfinite().all()


def test_where_tokens_go() -> None:
    ids = torch.tensor([[0, 1], [5, 1], [4, 3]])
    assert goes_to(ids, 2, 3).tolist() == [[True, False, False], [True, False, True], [False, True, True]]
    places, elements = places_of(torch.tensor([False, True, False, True, True]), 3)
    assert places.tolist() == [3, 0, 3, 1, 2] and elements.tolist() == [1, 3, 4]
    places, elements = places_of(torch.tensor([False, False]), 0)
    assert places.tolist() == [0, 0] and elements.tolist() == []
