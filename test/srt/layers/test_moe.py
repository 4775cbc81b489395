"""Routing and experts against transformers' modules, in every form of checkpoint, split over ranks in one process."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.layers.activation import SwigluOAIAndMul
from rtp_llm.srt.layers.moe import (
    FusedMoE,
    Routing,
    sigmoid_grouped_topk,
    softmax_grouped_topk,
    softmax_topk,
    topk_softmax,
)
from rtp_llm.srt.models.weight_loading import WeightLoadError, load_weights_declaratively

HIDDEN, SIZE, EXPERTS, TOP_K = 10, 6, 12, 4


def randomised(module: nn.Module) -> Any:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.normal_()
    return module


def assert_same_routing(ours: Routing, theirs: tuple[torch.Tensor, ...]) -> None:
    """Whatever the order within a token."""
    assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.int64

    def dense(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(ids), EXPERTS).scatter(1, ids, weights)

    torch.testing.assert_close(dense(*ours), dense(*theirs[-2:]))


# Routing


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_topk(renormalize: bool) -> None:
    sizes = dict(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=TOP_K, norm_topk_prob=renormalize)
    router, x = randomised(Qwen3MoeTopKRouter(transformers.Qwen3MoeConfig(**sizes))), torch.randn(7, HIDDEN)
    assert_same_routing(softmax_topk(x @ router.weight.T, TOP_K, renormalize), router(x))


def test_softmax_topk_as_mixtral() -> None:
    config = transformers.MixtralConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K)
    router, x = randomised(MixtralTopKRouter(config)), torch.randn(7, HIDDEN)
    assert_same_routing(softmax_topk(x @ router.weight.T, TOP_K, renormalize=True), router(x))


def test_topk_softmax_as_gpt_oss() -> None:
    config = transformers.GptOssConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K)
    router, x = randomised(GptOssTopKRouter(config)), torch.randn(7, HIDDEN)
    assert_same_routing(topk_softmax(F.linear(x, router.weight, router.bias), TOP_K), router(x))


@pytest.mark.parametrize(("num_groups", "topk_group"), [(3, 2), (6, 2), (12, 5), (1, 1)])
def test_softmax_grouped_topk_as_deepseek_v2(num_groups: int, topk_group: int) -> None:
    config = transformers.DeepseekV2Config(
        hidden_size=HIDDEN,
        num_attention_heads=1,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=num_groups,
        topk_group=topk_group,
        topk_method="group_limited_greedy",
        routed_scaling_factor=2.5,
    )
    router, x = randomised(DeepseekV2TopkRouter(config)), torch.randn(7, HIDDEN)
    logits = x @ router.weight.T
    ours = softmax_grouped_topk(logits, TOP_K, num_groups, topk_group, routed_scaling_factor=2.5)
    assert_same_routing(ours, router(x))
    weights, _ = softmax_grouped_topk(logits, TOP_K, num_groups, topk_group, True, routed_scaling_factor=2.5)
    torch.testing.assert_close(weights, ours[0] / ours[0].sum(-1, keepdim=True) * 2.5)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_groups", "topk_group"), [(3, 2), (3, 1), (4, 2), (1, 1)])
def test_sigmoid_grouped_topk_as_deepseek_v3(num_groups: int, topk_group: int, renormalize: bool) -> None:
    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=num_groups,
        topk_group=topk_group,
        norm_topk_prob=renormalize,
        routed_scaling_factor=2.5,
    )
    router, x = randomised(DeepseekV3TopkRouter(config)), torch.randn(7, HIDDEN)
    ours = sigmoid_grouped_topk(
        x @ router.weight.T, router.e_score_correction_bias, TOP_K, num_groups, topk_group, renormalize, 2.5
    )
    assert_same_routing(ours, router(x))


# Experts


@pytest.mark.parametrize("rows_per_group", [[3, 0, 4, 1], [0, 0, 0, 5], [0, 0, 0, 0]])
@pytest.mark.parametrize("has_bias", [True, False])
def test_grouped_linear(rows_per_group: list[int], has_bias: bool) -> None:
    x, weight, bias = torch.randn(sum(rows_per_group), 5), torch.randn(4, 3, 5), torch.randn(4, 3)
    output = reference.grouped_linear(x, weight, torch.tensor(rows_per_group), bias if has_bias else None)
    groups = [group for group, num_rows in enumerate(rows_per_group) for _ in range(num_rows)]
    expected = [weight[group] @ row + has_bias * bias[group] for group, row in zip(groups, x, strict=True)]
    torch.testing.assert_close(output, torch.stack(expected) if expected else torch.empty(0, 3))


class Model(nn.Module):
    """A model that is nothing but its experts."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.experts = FusedMoE(EXPERTS, HIDDEN, SIZE, prefix="experts", **options)


def mixtral_experts() -> MixtralExperts:
    sizes = dict(hidden_size=HIDDEN, intermediate_size=SIZE, num_local_experts=EXPERTS)
    return randomised(MixtralExperts(transformers.MixtralConfig(**sizes, experts_implementation="eager")))


def gpt_oss_experts() -> GptOssExperts:
    sizes = dict(hidden_size=HIDDEN, intermediate_size=SIZE, num_local_experts=EXPERTS)
    return randomised(GptOssExperts(transformers.GptOssConfig(**sizes, experts_implementation="eager")))


def fused(experts: nn.Module) -> dict[str, torch.Tensor]:
    return {f"experts.{name}": tensor for name, tensor in experts.state_dict().items()}


def one_by_one(experts: nn.Module, names: tuple[str, str, str]) -> dict[str, torch.Tensor]:
    weights = {}
    for expert, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        for name, tensor in zip(names, (*gate_up.chunk(2), down), strict=True):
            weights[f"experts.{expert}.{name}.weight"] = tensor
    return weights


def random_routing(num_tokens: int, num_used: int = EXPERTS) -> Routing:
    ids = torch.rand(num_tokens, num_used).topk(min(TOP_K, num_used)).indices
    return torch.rand(ids.shape), ids


def summed_over_ranks(num_ranks: int, weights: dict[str, torch.Tensor], x: torch.Tensor, routing: Routing, **options):
    total = torch.zeros_like(x)
    for rank in range(num_ranks):
        model = Model(tp_group=RankGroup(rank, num_ranks), reduce_results=False, **options)
        load_weights_declaratively(model, weights.items())
        total += model.experts(x, *routing)
    return total


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("form", ["fused", "transposed", "one by one", "named"])
def test_experts_as_mixtral(form: str, num_ranks: int) -> None:
    theirs, x, routing = mixtral_experts(), torch.randn(9, HIDDEN), random_routing(9)
    named: dict[str, Any] = {"expert_names": ("w1", "w3", "w2")}
    weights, options = {
        "fused": (fused(theirs), {}),
        "transposed": ({k: v.transpose(1, 2) for k, v in fused(theirs).items()}, {"is_transposed": True}),
        "one by one": (one_by_one(theirs, ("gate_proj", "up_proj", "down_proj")), {}),
        "named": (one_by_one(theirs, ("w1", "w3", "w2")), named),
    }[form]
    output = summed_over_ranks(num_ranks, weights, x, routing, **options)
    torch.testing.assert_close(output, theirs(x, routing[1], routing[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_experts_as_gpt_oss(num_ranks: int) -> None:
    """Biases, transposed weights, gate and up in turn; values large enough for the limit to count."""
    theirs, x, routing = gpt_oss_experts(), 3 * torch.randn(9, HIDDEN), random_routing(9)
    options = {"bias": True, "is_transposed": True, "activation": SwigluOAIAndMul()}
    output = summed_over_ranks(num_ranks, fused(theirs), x, routing, **options)
    torch.testing.assert_close(output, theirs(x, routing[1], routing[0]), atol=2e-4, rtol=1e-4)


def test_experts_one_by_one_with_biases() -> None:
    names = ("gate_proj", "up_proj", "down_proj")
    theirs, x, routing = mixtral_experts(), torch.randn(5, HIDDEN), random_routing(5)
    weights, biases = one_by_one(theirs, names), torch.randn(EXPERTS, 2 * SIZE + HIDDEN)
    for expert, bias in enumerate(biases):
        for name, part in zip(names, bias.split([SIZE, SIZE, HIDDEN]), strict=True):
            weights[f"experts.{expert}.{name}.bias"] = part
    output = summed_over_ranks(2, weights, x, routing, bias=True)
    expected = torch.zeros_like(x)
    for token in range(5):
        for weight, expert in zip(routing[0][token], routing[1][token], strict=True):
            gate, up = (theirs.gate_up_proj[expert] @ x[token] + biases[expert, : 2 * SIZE]).chunk(2)
            down = theirs.down_proj[expert] @ (F.silu(gate) * up) + biases[expert, 2 * SIZE :]
            expected[token] += weight * down
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_few_tokens_and_unused_experts(num_tokens: int) -> None:
    theirs, x, routing = mixtral_experts(), torch.randn(num_tokens, HIDDEN), random_routing(num_tokens, num_used=3)
    output = summed_over_ranks(1, fused(theirs), x, routing)
    torch.testing.assert_close(output, theirs(x, routing[1], routing[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("form", ["fused", "one by one", "named"])
def test_experts_without_gates(form: str, num_ranks: int) -> None:
    up, down = torch.randn(EXPERTS, SIZE, HIDDEN), torch.randn(EXPERTS, HIDDEN, SIZE)
    up_bias, down_bias = torch.randn(EXPERTS, SIZE), torch.randn(EXPERTS, HIDDEN)
    tensors = {"up_proj": up, "down_proj": down, "up_proj_bias": up_bias, "down_proj_bias": down_bias}
    weights, options = {f"experts.{name}": tensor for name, tensor in tensors.items()}, {}
    if form != "fused":
        names = ("up_proj", "down_proj") if form == "one by one" else ("fc1", "fc2")
        options = {} if form == "one by one" else {"expert_names": names}
        weights = {}
        for expert in range(EXPERTS):
            for name, weight, bias in zip(names, (up, down), (up_bias, down_bias), strict=True):
                weights[f"experts.{expert}.{name}.weight"] = weight[expert]
                weights[f"experts.{expert}.{name}.bias"] = bias[expert]
    x, routing = torch.randn(9, HIDDEN), random_routing(9)
    options |= {"gated": False, "activation": "relu2", "bias": True}
    output = summed_over_ranks(num_ranks, weights, x, routing, **options)
    every = F.relu(torch.einsum("th,eih->tei", x, up) + up_bias).square()
    every = torch.einsum("tei,ehi->teh", every, down) + down_bias
    expected = (every.gather(1, routing[1][..., None].expand(-1, -1, HIDDEN)) * routing[0][..., None]).sum(1)
    torch.testing.assert_close(output, expected, atol=1e-3, rtol=1e-4)


def test_bfloat16_is_kept() -> None:
    theirs, x, routing = mixtral_experts(), torch.randn(20, HIDDEN).bfloat16(), random_routing(20)
    output = summed_over_ranks(1, fused(theirs), x, routing, params_dtype=torch.bfloat16)
    expected = theirs(x.float(), routing[1], routing[0])
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).norm() < 0.02 * expected.norm()


# Errors


def failure(weights: dict[str, torch.Tensor], **options: Any) -> str:
    with pytest.raises(WeightLoadError) as caught:
        load_weights_declaratively(Model(**options), weights.items())
    return str(caught.value)


def test_missing_and_left_over_experts_are_named() -> None:
    weights = one_by_one(mixtral_experts(), ("gate_proj", "up_proj", "down_proj"))
    for name in ("3.gate_proj", "7.up_proj", "7.down_proj"):
        del weights[f"experts.{name}.weight"]
    weights["experts.12.up_proj.weight"] = weights["experts.0.up_proj.weight"]
    message = failure(weights)
    shape = [EXPERTS, 2 * SIZE, HIDDEN]
    assert f"experts.w13_weight {shape}, made of experts.3.gate_proj.weight, experts.7.up_proj.weight\n" in message
    assert f"experts.w2_weight {[EXPERTS, HIDDEN, SIZE]}, made of experts.7.down_proj.weight" in message
    assert f"1 tensors have no place in the model:\n  experts.12.up_proj.weight {[SIZE, HIDDEN]}\n" in message


@pytest.mark.parametrize(
    ("names", "gated", "said"),
    [
        (("up_proj", "up_proj", "down_proj"), True, "3 different names.*experts that have no gate take gated=False"),
        (("up_proj", "down_proj"), True, "3 different names.*gated=False"),
        (("up_proj", "up_proj"), False, "2 different names.*experts that have a gate take gated=True"),
        (("gate_proj", "up_proj", "down_proj"), False, "2 different names.*gated=True"),
    ],
)
def test_each_projection_has_its_own_name(names: tuple[str, ...], gated: bool, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Model(expert_names=names, gated=gated)


def test_experts_that_come_twice_or_do_not_fit() -> None:
    theirs = mixtral_experts()
    weights = one_by_one(theirs, ("gate_proj", "up_proj", "down_proj"))
    assert "3 tensors came twice" in failure(fused(theirs) | dict(list(weights.items())[:3]))
    weights["experts.5.down_proj.weight"] = torch.zeros(SIZE, HIDDEN)
    assert "experts.5.down_proj.weight [6, 10] into experts.w2_weight: experts: the configuration" in failure(weights)
    assert "shape (12, 12, 10), the checkpoint has (12, 10, 12)" in failure(fused(theirs), is_transposed=True)
    layer = Model().experts
    with pytest.raises(ValueError, match=r"unknown shard_id \(12, 'w1'\); have \(expert below 12, one of \('w1',"):
        layer.weight_loader(layer.w13_weight, torch.zeros(SIZE, HIDDEN), (12, "w1"))
    with pytest.raises(ValueError, match="intermediate size 6 is not divisible by 4"):
        Model(tp_group=RankGroup(0, 4))
