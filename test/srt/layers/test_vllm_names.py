"""Layers as vLLM's model files call them: their keywords and forms, each against its formula in plain torch."""

import math
from dataclasses import astuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import XIELUActivation

from rtp_llm.srt.distributed.parallel_state import RankGroup, split_tensor_along_last_dim
from rtp_llm.srt.forward_batch import AttentionSpec
from rtp_llm.srt.layers import activation, conv, layernorm, linear, rotary_embedding, vocab_parallel_embedding
from rtp_llm.srt.layers.attention import Attention
from rtp_llm.srt.layers.logits_processor import LogitsProcessor
from rtp_llm.srt.layers.rotary import get_rope as get_rope_by_parts
from rtp_llm.srt.layers.rotary import get_rope_config
from rtp_llm.srt.utils import cache_number, extract_layer_index

HALF = torch.bfloat16


def load(layer: nn.Module, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        param = layer.get_parameter(name)
        param.weight_loader(param, tensor)


# Linear layers


@pytest.mark.parametrize(
    "layer",
    [
        linear.ReplicatedLinear(6, 4, return_bias=False),
        linear.ColumnParallelLinear(6, 4, return_bias=False, disable_tp=True, tp_group=RankGroup(1, 2)),
        linear.MergedColumnParallelLinear(6, [3, 1], return_bias=False, disable_tp=True, tp_group=RankGroup(1, 2)),
        linear.RowParallelLinear(6, 4, return_bias=False, disable_tp=True, tp_group=RankGroup(1, 2)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_whole_layer_that_returns_its_output_alone(layer: nn.Module) -> None:
    weight, bias, x = torch.randn(4, 6), torch.randn(4), torch.randn(3, 6)
    load(layer, weight=weight, bias=bias)
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias))


def test_an_activated_layer_that_returns_its_output_alone() -> None:
    layer = linear.MergedColumnParallelLinear(6, [4, 4], bias=False, return_bias=False)
    weight, x = torch.randn(8, 6), torch.randn(3, 6)
    load(layer, weight=weight)
    gate, up = (x @ weight.T).chunk(2, dim=-1)
    torch.testing.assert_close(layer.activated(x, activation.SiluAndMul()), F.silu(gate) * up)


def test_a_skipped_bias_must_be_returned() -> None:
    with pytest.raises(ValueError, match="return_bias must be True"):
        linear.ColumnParallelLinear(6, 4, skip_bias_add=True, return_bias=False)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_values_of_another_size_than_keys(num_ranks: int) -> None:
    q, k, v, x = torch.randn(4 * 6, 5), torch.randn(2 * 6, 5), torch.randn(2 * 3, 5), torch.randn(7, 5)
    outputs = []
    for rank in range(num_ranks):
        group = RankGroup(rank, num_ranks)
        layer = linear.QKVParallelLinear(5, 6, 4, 2, bias=False, v_head_size=3, tp_group=group)
        for name, part in (("q", q), ("k", k), ("v", v)):
            layer.weight.weight_loader(layer.weight, part, name)
        assert layer.v_size == 2 // num_ranks * 3
        outputs.append(layer(x)[0].split([layer.q_size, layer.kv_size, layer.v_size], dim=-1))
    for parts, weight in zip(zip(*outputs, strict=True), (q, k, v), strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=-1), x @ weight.T)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_one_tensor_of_several_parts(num_ranks: int) -> None:
    first, others, x = torch.randn(2, 5), torch.randn(10, 5), torch.randn(3, 5)
    for rank in range(num_ranks):
        group = RankGroup(rank, num_ranks)
        layer = linear.MergedColumnParallelLinear(5, [2, 4, 6], bias=False, tp_group=group)
        layer.weight.weight_loader(layer.weight, first, 0)
        layer.weight.weight_loader(layer.weight, others, (1, 2))
        parts = [part.chunk(num_ranks)[rank] for part in (first, others[:4], others[4:])]
        torch.testing.assert_close(layer(x)[0], x @ torch.cat(parts).T)


def test_a_router() -> None:
    weight, bias, x = torch.randn(4, 6), torch.randn(4), torch.randn(3, 6, dtype=HALF)
    router = linear.GateLinear(6, 4, bias=True, params_dtype=torch.float32, out_dtype=torch.float64, prefix="gate")
    load(router, weight=weight, bias=bias)
    logits, none = router(x)
    assert none is None and logits.dtype == torch.float64
    torch.testing.assert_close(logits, F.linear(x.float(), weight, bias).double())
    alone = linear.GateLinear(6, 4, force_fp32_compute=True, return_bias=False)
    load(alone, weight=weight)
    assert alone.bias is None
    torch.testing.assert_close(alone(x), x.float() @ weight.T)


def test_the_last_dimension_in_parts() -> None:
    x = torch.randn(3, 6)
    assert [part.tolist() for part in split_tensor_along_last_dim(x, 2)] == [x[:, :3].tolist(), x[:, 3:].tolist()]
    with pytest.raises(ValueError, match="6 is not divisible by 4"):
        split_tensor_along_last_dim(x, 4)


# Vocabulary tables


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_table_larger_than_the_checkpoints(num_ranks: int) -> None:
    table = torch.randn(7, 4)
    rows = []
    for rank in range(num_ranks):
        embedding = vocab_parallel_embedding.VocabParallelEmbedding(
            10, 4, org_num_embeddings=7, tp_group=RankGroup(rank, num_ranks)
        )
        load(embedding, weight=table)
        rows.append(embedding.weight.data)
    assert torch.equal(torch.cat(rows)[:10], torch.cat([table, torch.zeros(3, 4)]))


def test_a_tied_head_keeps_its_bias() -> None:
    table, bias, x = torch.randn(5, 4), torch.randn(5), torch.randn(2, 4)
    embedding = vocab_parallel_embedding.VocabParallelEmbedding(5, 4)
    head = vocab_parallel_embedding.ParallelLMHead(5, 4, bias=True)
    tied = head.tie_weights(embedding)
    assert tied is embedding
    load(tied, weight=table, bias=bias)
    logits = tied.quant_method.logits(tied, x, tied.bias)
    torch.testing.assert_close(logits, F.linear(x, table, bias))


def test_a_soft_cap_that_the_model_gives() -> None:
    config: Any = SimpleNamespace(vocab_size=5, final_logit_softcapping=30.0)
    assert LogitsProcessor(config).soft_cap == 30.0
    processor = LogitsProcessor(config, logit_scale=0.5, soft_cap=2.0)
    head = vocab_parallel_embedding.ParallelLMHead(5, 4)
    table, x = torch.randn(5, 4), torch.randn(3, 4)
    load(head, weight=table)
    torch.testing.assert_close(processor.logits(x, head), 2.0 * torch.tanh(x @ table.T * 0.5 / 2.0))


# Norms


@pytest.mark.parametrize("norm_class", [layernorm.RMSNorm, layernorm.GemmaRMSNorm])
@pytest.mark.parametrize("num_counted", [None, 5])
def test_rms_norm_in_float32_of_some_components(norm_class: Any, num_counted: int | None) -> None:
    options = {} if norm_class is layernorm.GemmaRMSNorm and num_counted is None else {"var_hidden_size": num_counted}
    norm = norm_class(8, eps=0.1, dtype=torch.float64 if num_counted is None else None, **options)
    weight = torch.randn(8)
    load(norm, weight=weight)
    x, residual = torch.randn(3, 8), torch.randn(3, 8)

    def expected(x: torch.Tensor) -> torch.Tensor:
        scale = 1.0 + weight if norm_class is layernorm.GemmaRMSNorm else weight
        return x / (x[:, :num_counted].square().mean(-1, keepdim=True) + 0.1).sqrt() * scale

    torch.testing.assert_close(norm(x), expected(x))
    normed, added = norm(x, residual)
    torch.testing.assert_close(normed, expected(x + residual))
    assert torch.equal(added, x + residual)


def test_norms_without_weights() -> None:
    x = torch.randn(3, 8)
    rms, layer = layernorm.RMSNorm(8, has_weight=False), layernorm.LayerNorm(8, elementwise_affine=False)
    assert not list(rms.parameters()) and not rms.state_dict()
    assert not list(layer.parameters()) and not layer.state_dict()
    torch.testing.assert_close(rms(x), F.rms_norm(x, (8,), eps=1e-6))
    torch.testing.assert_close(layer(x), F.layer_norm(x, (8,), eps=1e-5))


def test_layer_norm_with_parameters_in_float32() -> None:
    torch.set_default_dtype(HALF)
    try:
        norm = layernorm.LayerNorm(8, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    weight, bias, x = torch.randn(8), torch.randn(8), torch.randn(3, 8, dtype=HALF)
    load(norm, weight=weight, bias=bias)
    expected = F.layer_norm(x.float(), (8,), weight, bias, 1e-5).to(HALF)
    assert torch.equal(norm(x), expected)
    normed, added = norm(x, x)
    assert torch.equal(added, x + x) and normed.dtype == HALF


class Sums(RankGroup):
    """A rank to which the test tells the sum over ranks."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.summand = x
        return self.total if hasattr(self, "total") else x


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_norm_over_the_heads_of_all_ranks(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight query components and four of keys are normed; of four ranks, each two share the same key heads."""
    num_parts = min(num_ranks, 2)
    q, k, v = torch.randn(3, 8), torch.randn(3, 4), torch.randn(3, 4)
    q_weight, k_weight = torch.randn(8), torch.randn(4)
    expected_q = F.rms_norm(q, (8,), q_weight, 1e-6).chunk(num_ranks, dim=-1)
    expected_k = F.rms_norm(k, (4,), k_weight, 1e-6).chunk(num_parts, dim=-1)
    ranks = []
    for rank in range(num_ranks):
        group, part = Sums(rank, num_ranks), rank * num_parts // num_ranks
        monkeypatch.setattr(layernorm, "get_tp_group", lambda group=group: group)
        norms = [
            layernorm.MiniMaxText01RMSNormTP(8),
            layernorm.MiniMaxText01RMSNormTP(4, weight_shard_world_size=num_parts, weight_shard_rank=part),
        ]
        for norm, weight in zip(norms, (q_weight, k_weight), strict=True):
            load(norm, weight=weight)
            norm.tp_group = Sums(rank, num_ranks)
        parts = q.chunk(num_ranks, -1)[rank], k.chunk(num_parts, -1)[part], v.chunk(num_parts, -1)[part]
        ranks.append((norms, torch.cat(parts, dim=-1), part))
    sizes = 8 // num_ranks, 4 // num_parts
    for is_last in (False, True):  # first the summands, then the sums
        for i, (norms, qkv, part) in enumerate(ranks):
            ours = layernorm.MiniMaxText01RMSNormTP.forward_qkv(*norms, qkv, *sizes)
            if is_last:
                torch.testing.assert_close(ours[0], expected_q[i])
                torch.testing.assert_close(ours[1], expected_k[part])
                assert torch.equal(ours[2], v.chunk(num_parts, -1)[part])
        for which in range(2):
            total = sum(norms[which].tp_group.summand for norms, _, _ in ranks)
            for norms, _, _ in ranks:
                norms[which].tp_group.total = total


def test_a_norm_counts_components_that_it_has() -> None:
    with pytest.raises(ValueError, match="from 1 to hidden_size, 8, not 9"):
        layernorm.RMSNorm(8, var_hidden_size=9)


# Activations


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def test_gated_activations() -> None:
    x = torch.randn(5, 8) * 4
    first, second = halves(x)
    cut = second.clamp(-1.5, 1.5)
    expected = {
        activation.MulAndSilu(): first * second * second.sigmoid(),
        activation.SiluAndMulWithClamp(1.5): F.silu(first.clamp(max=1.5)) * cut,
        activation.SiluAndMulWithClamp(1.5, alpha=1.7, beta=1.0): first.clamp(max=1.5)
        * torch.sigmoid(1.7 * first.clamp(max=1.5))
        * (cut + 1),
        activation.SwigluStepAndMul(1.5): F.silu(first).clamp(max=1.5) * cut,
        activation.FatreluAndMul(0.5): torch.where(first > 0.5, first, 0.0) * second,
        activation.get_act_and_mul_fn("geglu"): F.gelu(first) * second,
    }
    for module, result in expected.items():
        torch.testing.assert_close(module(x), result, msg=type(module).__name__)
    assert isinstance(activation.get_act_and_mul_fn("swigluoai"), activation.SwigluOAIAndMul)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_a_gate_of_which_most_is_zero(approximate: Any) -> None:
    x = torch.randn(5, 400) * 3 + 1
    gate, up = halves(x)
    threshold = gate.mean(-1, keepdim=True) + 1.6448536 * gate.std(-1, keepdim=True, correction=0)
    expected = F.gelu((gate - threshold).clamp(min=0), approximate=approximate) * up
    torch.testing.assert_close(activation.GeluAndMulSparse(0.95, approximate)(x), expected)
    assert 0.01 < float((expected != 0).float().mean()) < 0.15
    with pytest.raises(ValueError, match=r"between 0 and 1, not 0\.0"):
        activation.GeluAndMulSparse(0.0)


def test_activations_as_modules() -> None:
    x = torch.randn(5, 8) * 3
    tangent = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(activation.ReLUSquaredActivation()(x), x.clamp(min=0) ** 2)
    torch.testing.assert_close(activation.QuickGELU()(x), x * torch.sigmoid(1.702 * x))
    torch.testing.assert_close(activation.NewGELU()(x), tangent)
    torch.testing.assert_close(activation.FastGELU()(x), tangent)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_xielu_as_transformers(dtype: torch.dtype) -> None:
    theirs = XIELUActivation(dtype=dtype)
    ours: Any = activation.get_act_fn("xielu") if dtype == torch.float32 else activation.XIELU(dtype=dtype)
    x = torch.randn(50).to(dtype) * 3
    torch.testing.assert_close(ours(x), theirs(x))  # the untrained numbers
    theirs.alpha_p.data.fill_(0.3), theirs.alpha_n.data.fill_(-0.7), theirs.beta.fill_(0.4)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


# Rotary positions


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 5000.0},
        {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 32},
    ],
)
def test_rope_of_a_configurations_parameters(parameters: dict[str, Any]) -> None:
    base, scaling, partial = get_rope_config(SimpleNamespace(rope_parameters=parameters))  # type: ignore[arg-type]
    ours = rotary_embedding.get_rope(16, max_position=128, rope_parameters=parameters, is_neox_style=False)
    other = get_rope_by_parts(
        16, max_position=128, base=base, rope_scaling=scaling, partial_rotary_factor=partial, is_neox_style=False
    )
    positions, q, k = torch.tensor([3, 90]), torch.randn(2, 4, 16), torch.randn(2, 2, 16)
    for mine, theirs in zip(ours(positions, q, k), other(positions, q, k), strict=True):
        assert torch.equal(mine, theirs)


def test_rope_of_a_given_size() -> None:
    rope = rotary_embedding.get_rope(16, max_position=8, rope_parameters={"rope_dim": 4, "partial_rotary_factor": 0.5})
    assert len(rope.inv_freq) == 2


def test_rope_parameters_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="in place of base"):
        get_rope_by_parts(16, rope_parameters={}, base=5.0)
    with pytest.raises(ValueError, match=r"the set of one of \['full', 'sliding'\]"):
        rotary_embedding.get_rope(16, 8, rope_parameters={"full": {}, "sliding": {}})
    with pytest.raises(ValueError, match="dual_chunk_attention_config is not supported"):
        rotary_embedding.get_rope(16, 8, dual_chunk_attention_config={"chunk_size": 4})


def test_a_default_base() -> None:
    for before in (None, {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}):
        config: Any = SimpleNamespace(rope_parameters=before)
        rotary_embedding.set_default_rope_theta(config, default_theta=77.0)
        assert config.rope_parameters == {"rope_type": "default", **(before or {}), "rope_theta": 77.0}
    config.rope_parameters = {"rope_theta": 5.0}
    rotary_embedding.set_default_rope_theta(config, 77.0)
    assert config.rope_parameters == {"rope_theta": 5.0}


@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_rotation_by_given_angles(is_neox_style: bool, batch: tuple[int, ...]) -> None:
    angles, x = torch.randn(5, 4), torch.randn(*batch, 5, 3, 8)
    pairs = x.unflatten(-1, (2, 4)).transpose(-1, -2) if is_neox_style else x.unflatten(-1, (4, 2))
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(5, 4), angles)[:, None]
    expected = torch.view_as_real(turned)
    expected = expected.transpose(-1, -2).flatten(-2) if is_neox_style else expected.flatten(-2)
    rotate = rotary_embedding.ApplyRotaryEmb(is_neox_style)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), expected)
    wide = rotary_embedding.ApplyRotaryEmb(is_neox_style, enable_fp32_compute=True)
    result = wide(x.to(HALF), angles.cos(), angles.sin())
    torch.testing.assert_close(result, expected.to(HALF), atol=0.05, rtol=0.02)


# Others


def test_convolutions() -> None:
    image, video = torch.randn(2, 3, 8, 8, dtype=HALF), torch.randn(2, 3, 4, 8, 8)
    flat = conv.Conv2dLayer(3, 5, kernel_size=4, stride=4, bias=False, params_dtype=HALF)
    assert torch.equal(flat(image), F.conv2d(image, flat.weight, stride=4)) and flat.weight.dtype == HALF
    deep = conv.Conv3dLayer(3, 5, kernel_size=(2, 4, 4), stride=(2, 4, 4))
    assert torch.equal(deep(video), F.conv3d(video, deep.weight, deep.bias, stride=(2, 4, 4)))


def test_the_index_in_a_name() -> None:
    assert extract_layer_index("model.layers.31.self_attn") == 31
    for name in ("model.norm", "model.layers.0.experts.1"):
        with pytest.raises(ValueError, match="one number among its parts"):
            extract_layer_index(name)


def test_each_attention_layer_has_a_cache_of_its_own() -> None:
    names = [f"model.layers.{layer}.attn{own}" for layer in (0, 1, 40) for own in ("", ".0", ".1")]
    numbers = [cache_number(name) for name in names]
    assert numbers[::3] == [0, 1, 40] and len(set(numbers)) == len(names)
    with pytest.raises(ValueError, match="one number among its parts"):
        cache_number("model.norm")


# Attention


class Asked:
    """An attention back end that notes what it is asked for."""

    def forward(self, q: Any, k: Any, v: Any, spec: Any, batch: Any, save_kv_cache: bool, sinks: Any) -> torch.Tensor:
        self.asked = k, v, save_kv_cache, sinks
        return q.flatten(1)


def test_attention() -> None:
    sinks, backend = torch.zeros(4), Asked()
    batch: Any = SimpleNamespace(attn_backend=backend)
    layer = Attention(
        4, 8, 0.5, 2, logits_soft_cap=3.0, per_layer_sliding_window=6, sinks=sinks, prefix="model.layers.7.attn"
    )
    assert astuple(layer.spec) == astuple(AttentionSpec(7, 4, 2, 8, 8, 0.5, 3.0, 6))
    q, k, v = torch.randn(3, 32), torch.randn(3, 16), torch.randn(3, 16)
    assert torch.equal(layer(q, k, v, batch), q)
    asked_k, asked_v, saves, asked_sinks = backend.asked
    assert torch.equal(asked_k.flatten(1), k) and torch.equal(asked_v.flatten(1), v)
    assert saves and asked_sinks is sinks and not layer.state_dict()
    other = Attention(4, 8, 0.5, layer_id=3, head_size_v=5)
    assert astuple(other.spec) == astuple(AttentionSpec(3, 4, 4, 8, 5, 0.5))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"use_alibi_sqrt": True}, r"layers\.0: use_alibi_sqrt is not supported"),
        ({"chunk_lookback": 1}, r"layers\.0: windows of whole blocks \(chunk_lookback\) are not supported"),
    ],
)
def test_attention_that_is_not_computed_here_is_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(4, 8, 0.5, prefix="layers.0", per_layer_sliding_window=8, **option)
    assert Attention(4, 8, 0.5, prefix="layers.0", chunk_lookback=1).spec.window is None


def test_attention_over_another_layers_cache() -> None:
    backend = Asked()
    layer = Attention(
        4, 8, 0.5, 2, prefix="model.layers.7.attn", kv_sharing_target_layer_name="model.layers.2.self_attn.attn"
    )
    batch: Any = SimpleNamespace(attn_backend=backend)
    layer(torch.randn(3, 32), torch.randn(3, 16), torch.randn(3, 16), batch)
    assert layer.spec.layer_id == 2 and backend.asked == (None, None, False, None)
