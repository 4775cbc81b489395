"""Experiments of ``rtp-llm verify`` by themselves: routings, orders, separate experts, watched attention."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.layers.mlp import UngatedMLP
from rtp_llm.srt.layers.moe import sigmoid_grouped_topk, softmax_topk, topk_softmax
from rtp_llm.tools.verify.attention_watch import AttentionWatch, without_repeats
from rtp_llm.tools.verify.boundary_states import State, StateLog
from rtp_llm.tools.verify.expert_calls import SeparateExperts, dense_routing, solved_routing
from rtp_llm.tools.verify.order_causes import explain_order, order_text
from rtp_llm.tools.verify.parameter_causes import transposed_parameters
from rtp_llm.tools.verify.pointer import source_of
from rtp_llm.tools.verify.prompts import Prompt
from rtp_llm.tools.verify.recorders import OurRecorder
from rtp_llm.tools.verify.rounding_causes import numbers_of_norm, rounded_to
from rtp_llm.tools.verify.routing_causes import RoutingTrials
from rtp_llm.tools.verify.together import state_of_pieces
from rtp_llm.tools.verify.trace import INPUT, OUTPUT, Parts, Place, Trace

TOLERANCE = 1e-4
LOGITS = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
BIAS = torch.linspace(-0.4, 0.5, 8)[[3, 0, 7, 1, 5, 2, 6, 4]]


def dense(routing: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    weights, ids = routing
    return dense_routing(ids, weights, 8)


def grouped(**options: Any) -> torch.Tensor:
    given: dict[str, Any] = dict(correction_bias=BIAS, top_k=3, num_expert_group=4, topk_group=2)
    return dense(sigmoid_grouped_topk(LOGITS, **given | {"routed_scaling_factor": 2.5} | options))


def bias_in_weights() -> torch.Tensor:
    choice = LOGITS.sigmoid() + BIAS
    ids = choice.topk(3).indices
    weights = choice.gather(1, ids)
    return dense((weights / weights.sum(-1, keepdim=True), ids))


def chosen_by_logits() -> torch.Tensor:
    ids = (LOGITS + BIAS).topk(3).indices
    weights = LOGITS.sigmoid().gather(1, ids)
    return dense((weights / weights.sum(-1, keepdim=True), ids))


def sigmoid_twice() -> torch.Tensor:
    scores = LOGITS.sigmoid().sigmoid()
    ids = (scores + BIAS).topk(3).indices
    weights = scores.gather(1, ids)
    return dense((weights / weights.sum(-1, keepdim=True), ids))


NO_GROUPS = dict(num_expert_group=1, topk_group=1, routed_scaling_factor=1.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "cause"),
    [
        (dense(softmax_topk(LOGITS, 3, True)), dense(softmax_topk(LOGITS, 3, False)), "ours divided by their sum"),
        (dense(softmax_topk(LOGITS, 2, True)), dense(softmax_topk(LOGITS, 3, True)), "of a token: ours 2, the ref"),
        (dense(softmax_topk(LOGITS, 3, True)), grouped(correction_bias=0 * BIAS, **NO_GROUPS), "ours a softmax over"),
        (grouped(correction_bias=0 * BIAS), grouped(), "correction bias: ours not added, the reference's gate.bias"),
        (bias_in_weights(), grouped(**NO_GROUPS), "ours adds it to the weights too"),
        (
            grouped(num_expert_group=1, topk_group=1),
            grouped(),
            "groups of experts: ours none",
        ),
        (grouped(routed_scaling_factor=1.0), grouped(), "weights: ours 1, the reference's 2.5 (routed_scaling_factor)"),
        (grouped().flip(1), grouped(), "experts lie in another order: the reference's 1 is 6 in ours"),
        (chosen_by_logits(), grouped(**NO_GROUPS), "chosen by: ours the logits themselves + the correction bias, the"),
        (
            dense(topk_softmax(LOGITS.softmax(-1), 3)),
            dense(topk_softmax(LOGITS, 3)),
            "(a softmax of a softmax): one too many; the reference's weights are a softmax over the chosen experts'",
        ),
        (
            dense(softmax_topk(LOGITS.softmax(-1), 3, False)),
            dense(softmax_topk(LOGITS, 3, False)),
            "ours applies a softmax to what a softmax over all experts gave already",
        ),
        (sigmoid_twice(), grouped(**NO_GROUPS), "ours applies a sigmoid to what a sigmoid gave already"),
        (dense(topk_softmax(LOGITS.bfloat16().float(), 3)), dense(topk_softmax(LOGITS, 3)), "in bfloat16 where the re"),
        (
            dense(softmax_topk(LOGITS, 3, False)).half().float(),
            dense(softmax_topk(LOGITS, 3, False)),
            "rounded: an intermediate sum in float16 where the reference has float32: the router's scores",
        ),
        (grouped().sqrt(), grouped(), "the same experts are chosen, with other weights"),
    ],
)
def test_routings_are_told_apart(ours: torch.Tensor, theirs: torch.Tensor, cause: str) -> None:
    trials = RoutingTrials(LOGITS, {"gate.bias": BIAS}, SimpleNamespace(n_group=4, routed_scaling_factor=2.5))
    assert cause in trials.explain(ours, theirs, TOLERANCE)[0]


def test_numbers_of_16_bits_are_recognised() -> None:
    numbers = 1 + torch.rand(40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    near = 1 + 1e-6 * torch.linspace(-1, 1, 40, dtype=torch.float64)
    assert rounded_to(numbers) is None and rounded_to(numbers.float().double()) is None
    assert rounded_to(numbers.bfloat16().double() * near) == "bfloat16"
    assert rounded_to(numbers.half().double() * near) == "float16"
    assert rounded_to(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) is None  # too few


@pytest.mark.parametrize("subtracts", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_spread_is_found_in_what_a_norm_makes(subtracts: bool, dtype: torch.dtype) -> None:
    x, weight, bias = (
        torch.randn(12, 1, 32, generator=torch.Generator().manual_seed(5)) + 0.3,
        LOGITS[:4].flatten(),
        0.1,
    )

    def norm(kind: torch.dtype) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True) if subtracts else x
        spread = centred.square().mean(-1, keepdim=True).to(kind).float()
        return (centred * torch.rsqrt(spread + 1e-6)) * weight + bias

    given = (norm(dtype).double(), norm(torch.float32).double(), x.double(), torch.tensor(bias), weight.double(), 1e-6)
    found = {name: rounded_to(numbers) for name, numbers in numbers_of_norm(*given)}
    name = "variance" if subtracts else "mean of squares"
    assert found[name] == str(dtype).removeprefix("torch."), found
    right = numbers_of_norm(given[1], *given[1:])
    assert all(rounded_to(numbers) is None for name, numbers in right)


def test_orders_are_described() -> None:
    grid = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(1))
    rows = grid.flatten(0, 1)
    assert explain_order(rows, rows, TOLERANCE) is None and explain_order(rows, 2 * rows, TOLERANCE) is None
    columns_first = explain_order(grid.transpose(0, 1).flatten(0, 1), rows, TOLERANCE)
    assert columns_first is not None and "exchanged, of a grid of 6 x 4" in columns_first
    squares = grid.unflatten(0, (3, 2)).unflatten(2, (2, 2))  # [3, 2, 2, 2, 8]
    right = squares.transpose(1, 2).reshape(6, 32)
    by_columns = explain_order(squares.permute(0, 2, 3, 1, 4).reshape(6, 32), right, TOLERANCE)
    assert by_columns is not None and "0, 2, 1, 3: rows and columns of a square are exchanged" in by_columns
    others = explain_order(rows.reshape(6, 32), right, TOLERANCE)
    assert others is not None and "merge in another order" in others
    turns = explain_order(right.unflatten(1, (4, 8)).transpose(1, 2).flatten(1), right, TOLERANCE)
    assert turns is not None and "take turns in ours" in turns
    heads = right.unflatten(1, (4, 8)).clone()
    heads[0] = heads[0, :1]  # a token that sees itself alone has the same in all heads
    reverse = explain_order(heads.flip(1).flatten(1), heads.flatten(1), TOLERANCE)
    assert reverse == "its columns are the reference's in another order: blocks of 8 in the order 3, 2, 1, 0"
    assert order_text([2, 3, 0, 1]) == "shifted by 2" and order_text([3, 2, 1, 0]) == "the last first"
    assert order_text([4, 5, 2, 3, 0, 1]) == "blocks of 2 in the order 2, 1, 0"


class Block(nn.Module):
    """A mixture as people write it: each expert computes the tokens that chose it, a shared one all."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.shared = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = softmax_topk(self.gate(x), 2, False)
        output = self.shared(x)
        for index, expert in enumerate(self.experts):
            tokens, place = (ids == index).nonzero(as_tuple=True)
            output = output.index_add(0, tokens, expert(x[tokens]) * weights[tokens, place, None])
        return output


def test_the_routing_of_separate_experts_follows_from_their_outputs() -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(9, 16)
    experts = SeparateExperts.of(block)
    assert experts is not None and SeparateExperts.of(nn.Sequential(nn.Linear(3, 3))) is None
    for index, expert in enumerate(block.experts):
        expert.register_forward_hook(lambda _, args, output, index=index: experts.add(index, args, output))
    block.shared.register_forward_hook(lambda module, args, output: experts.add_other(module, output))
    with torch.inference_mode():
        output = block(x)
        weights, ids = softmax_topk(block.gate(x), 2, False)
    found = experts.solved(x, output)
    assert found is not None
    torch.testing.assert_close(found.routing, dense_routing(ids, weights, 4), atol=1e-4, rtol=1e-3)
    assert experts.solved(x, output) is None  # it has forgotten the call


def test_weights_are_solved_for() -> None:
    outputs = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
    weights = torch.rand(5, 3, generator=torch.Generator().manual_seed(3))
    found, error = solved_routing(torch.einsum("te,eth->th", weights, outputs), outputs)
    torch.testing.assert_close(found, weights, atol=1e-5, rtol=1e-4)
    assert error < 1e-5 and solved_routing(torch.randn(5, 8), outputs)[1] > 0.1


def test_no_weights_are_solved_for_what_is_not_finite(capfd: pytest.CaptureFixture[str]) -> None:
    """LAPACK would print an error of its own."""
    assert solved_routing(torch.full((5, 8), float("nan")), torch.ones(3, 5, 8))[1] == float("inf")
    assert capfd.readouterr().out == ""


def test_a_square_parameter_is_tried_transposed() -> None:
    module = nn.Module()
    module.mix, module.read = nn.Parameter(torch.arange(9.0).view(3, 3)), nn.Parameter(torch.ones(3))
    ((holder, text, made),) = transposed_parameters({"streams": module})
    right = module.mix.data.clone()
    with made():
        assert torch.equal(module.mix, right.T)
    assert torch.equal(module.mix, right) and (holder, text) == ("streams", "its mix is used transposed")


def test_rows_of_images_are_joined_where_one_side_loops_over_them() -> None:
    """A tower is given the patches of two images, in two calls and in one."""
    parts = Parts("model.text", "model.text.embed")
    ours, theirs = Trace(4, parts=parts), Trace(4, parts=parts)
    images = torch.randn(3, 5), torch.randn(6, 5)
    with ours.step(0, 4):
        ours.add("model.eye.norm", OUTPUT, torch.cat(images))
    with theirs.step(0, 4):
        for image in images:
            theirs.add("model.eye.norm", OUTPUT, image)
    place = Place("model.eye.norm", OUTPUT)
    theirs.join_uses(ours)
    assert list(theirs.tensors) == [place] and torch.equal(theirs.tensors[place], ours.tensors[place])
    ours.join_uses(theirs)
    assert theirs.joined == {place} and not ours.joined


def test_a_bias_by_distance_is_seen_beside_the_factor() -> None:
    """As BLOOM computes it: heads in the place of a batch, the bias the sum that a product is added to."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 6, 8) for _ in range(3))
    bias = torch.tensor([0.5, 0.25, 0.1, 0.05])[:, None, None] * torch.arange(6.0)
    causal = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)
    found: list[Any] = []
    with AttentionWatch(lambda *call: found.append(call)):
        scores = bias.baddbmm(batch1=q, batch2=k.transpose(-1, -2), beta=1.0, alpha=0.3).view(1, 4, 6, 6) + causal
        torch.bmm(F.softmax(scores, dim=-1).view(4, 6, 6), v)
        scores = q[None] @ k[None].transpose(-1, -2) * 0.3 + bias + causal
        torch.matmul(F.softmax(scores, dim=-1), v[None])
    assert len(found) == 2
    for states, mask, factor, _ in found:
        torch.testing.assert_close(states, (q[None], k[None], v[None]))
        assert factor == pytest.approx(0.3)
        torch.testing.assert_close(mask[0, :, -1], bias[:, 0])


@pytest.mark.parametrize("is_fused", [True, False])
def test_attention_is_seen_in_whatever_form(is_fused: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    found: list[Any] = []
    with AttentionWatch(lambda *call: found.append(call)):
        if is_fused:
            output = F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=0.3)
        else:
            scores = q @ keys.transpose(-1, -2) * 0.3 + torch.full((6, 6), float("-inf")).triu(1)
            output = torch.matmul(F.softmax(scores, dim=-1), values)
    ((states, mask, factor, attended),) = found
    torch.testing.assert_close(states[0], q)
    torch.testing.assert_close(without_repeats(states[1], 2), k)
    torch.testing.assert_close(without_repeats(states[2], 2), v)
    torch.testing.assert_close(attended, output)
    assert factor == pytest.approx(0.3, rel=1e-4)
    assert mask is None if is_fused else bool((mask[0, 0].isinf() == torch.ones(6, 6).triu(1).bool()).all())


class Doubled(nn.Linear):
    pass


class Inheriting(UngatedMLP):
    pass


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Inheriting(16, 24, "gelu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Pointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.doubled, self.project = Block(), Doubled(16, 16), nn.Linear(16, 16)
        self.layer = Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.doubled(self.block(x)) + self.project(x))


@pytest.mark.parametrize(
    ("name", "part", "found"),
    [
        ("block", OUTPUT, "Block.forward, "),
        ("block.gate", INPUT, "Block.forward, "),
        ("block.experts.1", OUTPUT, "Block.forward, "),
        ("doubled", OUTPUT, "Doubled, "),
        ("project", OUTPUT, "Pointed.forward, "),
        ("layer.mlp.up_proj", INPUT, "Layer.forward, "),
        ("layer.mlp.up_proj", OUTPUT, "Inheriting, "),
        ("layer.mlp.down_proj", INPUT, "Inheriting, "),
        ("nowhere", OUTPUT, "Pointed.forward, "),
    ],
)
def test_what_to_read_is_in_the_model_file(name: str, part: str, found: str) -> None:
    model, trace = Pointed(), Trace(3)
    with OurRecorder(model, trace), trace.step(0, 3):
        model(torch.randn(3, 16))
    text = source_of(model, name, part, trace)
    assert text.startswith(found) and __file__ in text, text


@pytest.mark.parametrize(("loads", "cause"), [(False, "it is not loaded"), (True, "it is loaded, so what")])
def test_a_state_that_pieces_change_is_named(loads: bool, cause: str) -> None:
    """A running sum of tokens stores its state a token too early, or never loads it."""

    class Summing:
        def unstored(self, prompt: Prompt, cut_len: int) -> None:
            return None

        def run(
            self, prompt: Prompt, cut_len: int, num_new: int, states: StateLog, forgets: bool = False
        ) -> tuple[list[int], torch.Tensor]:
            first = float(sum(prompt.ids[: cut_len - 1])) if cut_len and loads and not forgets else 0.0
            total = torch.tensor([first + sum(prompt.ids[cut_len:])])
            states.ours[len(prompt.ids)] = [State("attn", "recurrent state", 0, total, "attn.sum", "total")]
            return [0], torch.zeros(1, 1)

    ours: Any = Summing()
    found = state_of_pieces(ours, Prompt("", [3, 1, 4, 1, 5]), 2)
    assert found is not None and "The state 'total' of attn.sum" in found.text and cause in found.text
    assert state_of_pieces(ours, Prompt("", [3, 1, 4, 1, 5]), 0) is None
