"""Experts with their routing inside: each option of vLLM's call against the formula."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.layers import moe
from rtp_llm.srt.layers.fused_moe import (
    FusedMoEFactory,
    GateLinear,
    RoutedExperts,
    activation_without_mul,
    fused_moe_make_expert_params_mapping,
)
from rtp_llm.srt.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from rtp_llm.srt.layers.moe import Routing
from rtp_llm.srt.layers.quantization.base import QuantizedModel
from rtp_llm.srt.layers.quantization.registry import quantization_config
from rtp_llm.srt.layers.routing import TopK
from rtp_llm.srt.models.weight_loading import WeightLoadError, load_weights_declaratively

HIDDEN, SIZE, EXPERTS, TOP_K = 10, 6, 8, 3
NAMES = ("gate_proj", "down_proj", "up_proj")


def expert_weights(names: tuple[str, ...] = NAMES) -> dict[str, torch.Tensor]:
    shapes = (SIZE, HIDDEN), (HIDDEN, SIZE), (SIZE, HIDDEN)
    return {
        f"experts.{expert}.{name}.weight": torch.randn(shape)
        for expert in range(EXPERTS)
        for name, shape in zip(names, shapes, strict=False)
    }


class Block(nn.Module):
    def __init__(self, sizes: tuple[int, int] = (HIDDEN, SIZE), **options: Any) -> None:
        super().__init__()
        self.experts = FusedMoEFactory(EXPERTS, TOP_K, *sizes, prefix="experts", **options)


def loaded(weights: dict[str, torch.Tensor], **options: Any) -> Any:
    block = Block(**options)
    load_weights_declaratively(block, weights.items())
    return block.experts


def routed(
    weights: dict[str, torch.Tensor],
    x: torch.Tensor,
    routing: Routing,
    activation: Any = F.silu,
    names: tuple[str, ...] = NAMES,
    on_input: bool = False,
) -> torch.Tensor:
    output = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, expert in zip(routing[0][token], routing[1][token], strict=True):
            first, down, *up = (weights[f"experts.{expert}.{name}.weight"] for name in names)
            given = x[token] * weight if on_input else x[token]
            hidden = activation(first @ given) * (up[0] @ given if up else 1.0)
            output[token] += down @ hidden * (1.0 if on_input else weight)
    return output


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, TopK(TOP_K, renormalize=True)),
        ({"renormalize": False}, TopK(TOP_K)),
        ({"scoring_func": "sigmoid", "routed_scaling_factor": 2.5}, TopK(TOP_K, "sigmoid", True, None, 1, 1, 2.5)),
        ({"num_expert_group": 4, "topk_group": 2}, TopK(TOP_K, renormalize=True)),
        ({"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}, TopK(TOP_K, "softmax", True, None, 4, 2)),
        (
            {"routed_scaling_factor": 2.0, "apply_routed_scale_to_output": True},
            TopK(TOP_K, "softmax", True, None, 1, 1, 2.0),
        ),
    ],
)
def test_routing(options: dict[str, Any], rule: TopK) -> None:
    weights, x, logits = expert_weights(), torch.randn(5, HIDDEN), torch.randn(5, EXPERTS)
    close(loaded(weights, **options)(x, logits), routed(weights, x, rule(logits)))


class Corrected(nn.Module):
    """As vLLM's files write it: the parameter is the gate's, or nobody's but the experts'."""

    def __init__(self, is_of_gate: bool) -> None:
        super().__init__()
        bias = nn.Parameter(torch.zeros(EXPERTS, dtype=torch.float32), requires_grad=False)
        self.gate: Any = GateLinear(HIDDEN, EXPERTS)
        if is_of_gate:
            self.gate.e_score_correction_bias = bias
        self.experts = FusedMoEFactory(
            EXPERTS, TOP_K, HIDDEN, SIZE, scoring_func="sigmoid", e_score_correction_bias=bias, prefix="experts"
        )


@pytest.mark.parametrize(("is_of_gate", "name"), [(True, "gate"), (True, "experts"), (False, "experts")])
def test_a_correction_under_the_names_that_it_has(is_of_gate: bool, name: str) -> None:
    weights, x, logits = expert_weights(), torch.randn(5, HIDDEN), torch.randn(5, EXPERTS)
    block, bias, gate = Corrected(is_of_gate), torch.randn(EXPERTS), torch.randn(EXPERTS, HIDDEN)
    given = {**weights, "gate.weight": gate, f"{name}.e_score_correction_bias": bias}
    load_weights_declaratively(block, given.items())
    output = block.experts(hidden_states=x, router_logits=logits)
    close(output, routed(weights, x, TopK(TOP_K, "sigmoid", True, bias)(logits)))
    del given[f"{name}.e_score_correction_bias"]
    with pytest.raises(WeightLoadError, match=r"1 parameters were not set:\n  \w+\.e_score_correction_bias"):
        load_weights_declaratively(Corrected(is_of_gate), given.items())


def test_a_routing_of_the_models_own() -> None:
    weights, x, logits = expert_weights(), torch.randn(5, HIDDEN), torch.randn(5, EXPERTS)

    def smallest(hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool) -> Any:
        assert hidden_states is x and renormalize is False
        best, ids = (-gating_output).topk(topk)
        return best.bfloat16(), ids.int()

    experts = loaded(weights, custom_routing_function=smallest, renormalize=False)
    topk_weights, ids = (-logits).topk(TOP_K)
    close(experts(x, logits), routed(weights, x, (topk_weights.bfloat16().float(), ids)))


def test_experts_that_return_their_input() -> None:
    weights, x, logits = expert_weights(), torch.randn(5, HIDDEN), torch.randn(5, EXPERTS + 4)
    topk_weights, ids = TopK(TOP_K)(logits)
    is_input = ids >= EXPERTS
    assert is_input.any() and not is_input.all()
    expected = routed(weights, x, (topk_weights * ~is_input, ids * ~is_input))
    expected += x * (topk_weights * is_input).sum(dim=-1, keepdim=True)
    close(loaded(weights, zero_expert_type="identity", renormalize=False)(x, logits), expected)
    with pytest.raises(ValueError, match="zero_expert_type 'copy'"):
        Block(zero_expert_type="copy")


class FlatRows(RoutedExperts):
    """Reads gates of all experts, one below the other, and leaves others to the layer."""

    def __init__(self, *args: Any, size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.size = size * self.moe_config.tp_size

    def weight_loader(
        self, param: Any, loaded_weight: torch.Tensor, weight_name: str, shard_id: Any, *rest: Any
    ) -> Any:
        if shard_id != "all gates":
            return super().weight_loader(param, loaded_weight, weight_name, shard_id, *rest)
        param.data[:, : self.size] = loaded_weight.view(EXPERTS, self.size, -1)
        return None


def test_a_reader_of_the_models_own() -> None:
    weights, x, logits = expert_weights(), torch.randn(5, HIDDEN), torch.randn(5, EXPERTS)
    block: Any = Block(routed_experts_cls=FlatRows, routed_experts_args={"size": SIZE})
    experts = block.experts
    gates = torch.cat([weights[f"experts.{i}.gate_proj.weight"] for i in range(EXPERTS)])
    experts.w13_weight.weight_loader(experts.w13_weight, gates, "gates", "all gates")
    for expert in range(EXPERTS):
        for param, name, shard in ((experts.w13_weight, "up", "w3"), (experts.w2_weight, "down", "w2")):
            param.weight_loader(param, weights[f"experts.{expert}.{name}_proj.weight"], name, shard, expert, False)
    experts.quant_method.process_weights_after_loading(experts)
    close(experts(x, logits), routed(weights, x, TopK(TOP_K, renormalize=True)(logits)))


def test_weights_of_inputs() -> None:
    weights, x, logits = expert_weights(), torch.randn(5, HIDDEN), torch.randn(5, EXPERTS)
    experts = loaded(weights, scoring_func="sigmoid", apply_router_weight_on_input=True)
    close(experts(x, logits), routed(weights, x, TopK(TOP_K, "sigmoid", True)(logits), on_input=True))


@pytest.mark.parametrize(
    ("name", "options", "activation"),
    [
        ("gelu", {}, F.gelu),
        ("gelu_tanh", {}, lambda x: F.gelu(x, approximate="tanh")),
        ("relu2", {}, lambda x: F.relu(x).square()),
    ],
)
def test_activations(name: str, options: dict[str, Any], activation: Any) -> None:
    weights, x, logits = expert_weights(), torch.randn(5, HIDDEN), torch.randn(5, EXPERTS)
    experts = loaded(weights, activation=name, **options)
    close(experts(x, logits), routed(weights, x, TopK(TOP_K, renormalize=True)(logits), activation))


def test_cut_activations() -> None:
    assert loaded(expert_weights(), swiglu_limit=2.0).act_fn.swiglu_limit == 2.0
    assert loaded(expert_weights(), activation="swiglustep", swiglu_limit=2.0).act_fn.limit == 2.0
    with pytest.raises(ValueError, match="swiglu_limit goes with activation 'silu', not 'gelu'"):
        Block(activation="gelu", swiglu_limit=2.0)


def test_experts_without_gates() -> None:
    names = ("up_proj", "down_proj")
    weights, x, logits = expert_weights(names), torch.randn(5, HIDDEN), torch.randn(5, EXPERTS)
    name = activation_without_mul("relu2")
    assert name == activation_without_mul(name) == "relu2_no_mul"
    experts = loaded(weights, activation=name, ckpt_names=(*names, None))
    rule = TopK(TOP_K, renormalize=True)
    close(experts(x, logits), routed(weights, x, rule(logits), lambda x: F.relu(x).square(), names))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("is_gated", [True, False])
def test_quantized(scheme: str, is_gated: bool) -> None:
    """Sizes that fill groups; numbers that four bits still tell well enough."""
    hidden, size = 128, 64
    names = NAMES if is_gated else ("up_proj", "down_proj")
    weights = {
        f"experts.{expert}.{name}.weight": torch.randn((hidden, size) if name == "down_proj" else (size, hidden)) / 8
        for expert in range(EXPERTS)
        for name in names
    }
    x, logits = torch.randn(20, hidden), torch.randn(20, EXPERTS)
    outputs = []
    for quant_config in (None, quantization_config(scheme, QuantizedModel())):
        block = Block(
            sizes=(hidden, size),
            quant_config=quant_config,
            activation="silu" if is_gated else "relu2_no_mul",
            ckpt_names=NAMES if is_gated else (*names, None),
        )
        load_weights_declaratively(block, weights.items())
        outputs.append(block.experts(x, logits))
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert 1e-4 < float(error) < (0.03 if scheme == "int8" else 0.25)


class Shared(nn.Module):
    def __init__(self, group: RankGroup, reduce_results: bool = False) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(HIDDEN, SIZE, bias=False, tp_group=group)
        self.down = RowParallelLinear(SIZE, HIDDEN, bias=False, reduce_results=reduce_results, tp_group=group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)[0]))[0]


class WholeBlock(nn.Module):
    """With a gate, shared experts, and projections around the experts, of which each is an attribute."""

    def __init__(self, group: RankGroup, has_projections: bool) -> None:
        super().__init__()
        self.gate = GateLinear(HIDDEN, EXPERTS)
        self.shared = Shared(group)
        self.into = ReplicatedLinear(HIDDEN, HIDDEN) if has_projections else None
        self.out_of = ReplicatedLinear(HIDDEN, HIDDEN) if has_projections else None
        self.experts = FusedMoEFactory(
            num_experts=EXPERTS,
            top_k=TOP_K,
            hidden_size=HIDDEN,
            intermediate_size=SIZE,
            gate=self.gate,
            shared_experts=self.shared,
            routed_input_transform=self.into,
            routed_output_transform=self.out_of,
        )


class ThreadGroup(RankGroup):
    """A rank in a thread of this process."""

    def __init__(self, rank: int, summands: list[torch.Tensor | None], barrier: Barrier) -> None:
        super().__init__(rank, 2)
        self.summands, self.barrier = summands, barrier

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.summands[self.rank] = x
        self.barrier.wait(timeout=10)
        total: Any = sum(self.summands)  # type: ignore[arg-type]
        self.barrier.wait(timeout=10)
        return total


@pytest.mark.parametrize("has_projections", [False, True])
def test_what_goes_with_experts(has_projections: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = expert_weights(), torch.randn(5, HIDDEN)
    gate, up, down = torch.randn(EXPERTS, HIDDEN), torch.randn(SIZE, HIDDEN), torch.randn(HIDDEN, SIZE)
    into, into_bias = torch.randn(HIDDEN, HIDDEN), torch.randn(HIDDEN)
    weights |= {"gate.weight": gate, "shared.up.weight": up, "shared.down.weight": down}
    routing = TopK(TOP_K, renormalize=True)(x @ gate.T)
    expected = F.relu(x @ up.T) @ down.T
    if has_projections:
        for name in ("into", "out_of"):
            weights |= {f"{name}.weight": into, f"{name}.bias": into_bias}
        expected += F.linear(routed(weights, F.linear(x, into, into_bias), routing), into, into_bias)
    else:
        expected += routed(weights, x, routing)
    summands: list[torch.Tensor | None] = [None, None]
    barrier, blocks = Barrier(2), []
    for rank in range(2):
        group = ThreadGroup(rank, summands, barrier)
        monkeypatch.setattr(moe, "get_tp_group", lambda group=group: group)
        monkeypatch.setattr(moe, "get_expert_tensor_group", lambda group=group: group)
        block: Any = WholeBlock(group, has_projections)
        load_weights_declaratively(block, weights.items())
        assert block.experts.is_internal_router
        blocks.append(block)
    with ThreadPoolExecutor(2) as threads:
        for output in threads.map(lambda block: block.experts(hidden_states=x, router_logits=x), blocks):
            torch.testing.assert_close(output, expected, atol=1e-2, rtol=1e-4)


def test_shared_experts_are_summed_once() -> None:
    with pytest.raises(ValueError, match=r"make .* with reduce_results=False"):
        Block(shared_experts=Shared(RankGroup(0, 1), reduce_results=True))
    with pytest.raises(ValueError, match="routed_output_transform takes a whole sum"):
        Block(routed_output_transform=nn.Identity(), reduce_results=False)


def test_loading_by_a_loop_of_the_models_own() -> None:
    """As load_weights of vLLM's model files do."""
    weights, x, logits = expert_weights(("w1", "w2", "w3")), torch.randn(5, HIDDEN), torch.randn(5, EXPERTS)
    block = Block(ckpt_names=("w1", "w2", "w3"))
    mapping = fused_moe_make_expert_params_mapping(block, "w1", "w2", "w3", num_experts=EXPERTS)
    params = dict(block.named_parameters())
    for name, tensor in weights.items():
        for ours, theirs, expert_id, shard_id in mapping:
            if theirs in name:
                param = params[name.replace(theirs, ours)]
                options = {"shard_id": shard_id, "expert_id": expert_id}
                assert param.weight_loader(param, tensor, name, **options, return_success=True)
    twin = Block()  # gets each projection of all experts at once
    for shard, param in (
        ("w1", twin.experts.w13_weight),
        ("w3", twin.experts.w13_weight),
        ("w2", twin.experts.w2_weight),
    ):
        fused = torch.stack([weights[f"experts.{expert}.{shard}.weight"] for expert in range(EXPERTS)])
        param.weight_loader(param, fused, "fused", shard_id=shard, expert_id=0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(twin.parameters(), block.parameters(), strict=True))
    block.experts.quant_method.process_weights_after_loading(block.experts)
    expected = routed(weights, x, TopK(TOP_K, renormalize=True)(logits), names=("w1", "w2", "w3"))
    close(block.experts(x, logits), expected)
    assert len(fused_moe_make_expert_params_mapping(block, "up", "down", None, num_experts=EXPERTS)) == 2 * EXPERTS
