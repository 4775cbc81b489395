"""Linear layers, embeddings, norms, activations, the attention layer, logits: each by itself, split in one process."""

import math
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_forward import logprob_row, make_batch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from rtp_llm.srt.cache.spec import CacheSpec
from rtp_llm.srt.devices.cpu.build import kernels_work
from rtp_llm.srt.devices.cpu.provider import CpuProvider
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.forward_batch import AttentionSpec
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.layers.activation import _ACT, GeluAndMul, get_act_and_mul_fn, get_act_fn
from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from rtp_llm.srt.layers.logits_processor import ROWS_PER_PIECE, LogitsProcessor, token_logprobs
from rtp_llm.srt.layers.norm import GemmaRMSNorm, LayerNorm, RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig, QuantizeMethodBase
from rtp_llm.srt.layers.quantization.unquantized import UnquantizedLinearMethod
from rtp_llm.srt.layers.radix_attention import AttentionType, RadixAttention


def load(layer: nn.Module, name: str, tensor: torch.Tensor, shard_id: str | int | None = None) -> None:
    param = layer.get_parameter(name)
    param.weight_loader(param, tensor, shard_id)


def ranks(n: int) -> list[RankGroup]:
    return [RankGroup(rank, n) for rank in range(n)]


# Linear layers


def test_replicated_and_skipped_bias() -> None:
    layer, weight, bias, x = (
        ReplicatedLinear(5, 3, skip_bias_add=True),
        torch.randn(3, 5),
        torch.randn(3),
        torch.randn(2, 5),
    )
    load(layer, "weight", weight)
    load(layer, "bias", bias)
    output, left = layer(x)
    torch.testing.assert_close(output, x @ weight.T)
    assert torch.equal(left, bias)
    layer.skip_bias_add = False
    output, left = layer(x)
    torch.testing.assert_close(output, F.linear(x, weight, bias))
    assert left is None


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_column_then_row_is_the_whole_product(num_ranks: int) -> None:
    up, up_bias, down, down_bias = torch.randn(6, 5), torch.randn(6), torch.randn(4, 6), torch.randn(4)
    x = torch.randn(7, 5)
    total = torch.zeros(7, 4)
    for group in ranks(num_ranks):
        column = ColumnParallelLinear(5, 6, tp_group=group)
        row = RowParallelLinear(6, 4, reduce_results=False, tp_group=group)
        for layer, weight, bias in ((column, up, up_bias), (row, down, down_bias)):
            load(layer, "weight", weight)
            load(layer, "bias", bias)
        total += row(column(x)[0])[0]
    torch.testing.assert_close(total, F.linear(F.linear(x, up, up_bias), down, down_bias))


def test_row_cuts_a_whole_input() -> None:
    weight, x = torch.randn(4, 6), torch.randn(3, 6)
    total = torch.zeros(3, 4)
    for group in ranks(2):
        row = RowParallelLinear(6, 4, bias=False, input_is_parallel=False, reduce_results=False, tp_group=group)
        load(row, "weight", weight)
        total += row(x)[0]
    torch.testing.assert_close(total, x @ weight.T)


@pytest.mark.parametrize("fused", [False, True])
def test_merged_shards(fused: bool) -> None:
    gate, up, x = torch.randn(4, 5), torch.randn(6, 5), torch.randn(3, 5)
    outputs = []
    for group in ranks(2):
        layer = MergedColumnParallelLinear(5, [4, 6], bias=False, tp_group=group)
        if fused:
            load(layer, "weight", torch.cat((gate, up)))
        else:
            load(layer, "weight", up, 1)
            load(layer, "weight", gate, 0)
        outputs.append(layer(x)[0].split([2, 3], dim=-1))
    torch.testing.assert_close(torch.cat([output[0] for output in outputs], dim=-1), x @ gate.T)
    torch.testing.assert_close(torch.cat([output[1] for output in outputs], dim=-1), x @ up.T)


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_a_layer_and_its_plain_activation(name: str) -> None:
    """In one pass, where the device has it, or in two; a large float32 weight is packed."""
    activation, layer = get_act_fn(name), ColumnParallelLinear(256, 320)
    for param, shape in (("weight", (320, 256)), ("bias", (320,))):
        load(layer, param, torch.randn(shape))
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.quant_method.ends_in(layer, activation) == (name == "gelu" and kernels_work())
    x, seen = torch.randn(2, 5, 256), []
    expected = activation(layer(x)[0])
    torch.testing.assert_close(layer.activated(x, activation), expected, rtol=1e-5, atol=1e-5)
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(layer.activated(x, activation), expected)
    assert torch.equal(seen[0][0], layer(x)[0])
    hook.remove()


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_layer_and_its_activation(dtype: torch.dtype, name: str) -> None:
    """In one pass or in two, it is the same; who watches either of the two sees it."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        activation = get_act_and_mul_fn(name)
        layer = MergedColumnParallelLinear(16, [64, 64])
        for param, shape in (("weight", (128, 16)), ("bias", (128,))):
            load(layer, param, torch.randn(shape))
        layer.quant_method.process_weights_after_loading(layer)
    finally:
        torch.set_default_dtype(previous)
    has_kernel = name in ("silu", "gelu_pytorch_tanh") and dtype == torch.bfloat16 and kernels_work()
    assert layer.quant_method.ends_in(layer, activation) == has_kernel
    for shape in ((3, 16), (2, 5, 16), (0, 16)):
        x, seen = torch.randn(shape).to(dtype), []
        one_by_one = activation(layer(x)[0])
        assert torch.equal(layer.activated(x, activation), one_by_one)
        for module in (layer, activation):
            hook = module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(module))
            assert torch.equal(layer.activated(x, activation), one_by_one)
            hook.remove()
        assert seen == [layer, activation]
    layer.skip_bias_add = True
    with pytest.raises(ValueError, match="the bias that skip_bias_add leaves out belongs before an activation"):
        layer.activated(x, activation)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("num_ranks", "num_kv_heads"), [(1, 2), (2, 2), (4, 2), (4, 1), (2, 4)])
def test_qkv_splits_or_replicates_heads(num_ranks: int, num_kv_heads: int, fused: bool) -> None:
    head, hidden = 3, 5
    parts = {"q": torch.randn(4 * head, hidden), "k": torch.randn(num_kv_heads * head, hidden)}
    parts["v"] = torch.randn(num_kv_heads * head, hidden)
    for group in ranks(num_ranks):
        layer = QKVParallelLinear(hidden, head, 4, num_kv_heads, tp_group=group)
        biases = {name: weight[:, 0] for name, weight in parts.items()}
        for name, tensors in (("weight", parts), ("bias", biases)):
            if fused:
                load(layer, name, torch.cat(list(tensors.values())))
            else:
                for shard_id, tensor in tensors.items():
                    load(layer, name, tensor, shard_id)
        num_heads, kv_here = 4 // num_ranks, max(1, num_kv_heads // num_ranks)
        assert (layer.num_heads, layer.num_kv_heads) == (num_heads, kv_here)
        assert layer.num_kv_head_replicas == max(1, num_ranks // num_kv_heads)
        q, k, v = layer.weight.split([layer.q_size, layer.kv_size, layer.kv_size])
        first_kv = group.rank * num_heads * num_kv_heads // 4  # the key head of this rank's first query head
        assert torch.equal(q, parts["q"][group.rank * num_heads * head :][: num_heads * head])
        assert torch.equal(k, parts["k"][first_kv * head :][: kv_here * head])
        assert torch.equal(v, parts["v"][first_kv * head :][: kv_here * head])
        assert torch.equal(layer.bias, layer.weight[:, 0])


def test_loading_converts_the_dtype_of_a_slice_only() -> None:
    layer = ColumnParallelLinear(5, 6, bias=False, params_dtype=torch.bfloat16, tp_group=RankGroup(1, 2))
    weight = torch.randn(5, 6).T  # a view, not contiguous
    load(layer, "weight", weight)
    assert torch.equal(layer.weight, weight[3:].to(torch.bfloat16))


def test_linear_errors_name_what_is_wrong() -> None:
    qkv = QKVParallelLinear(8, 4, 2, 1, prefix="model.layers.0.self_attn.qkv_proj")
    with pytest.raises(ValueError, match=r"qkv_proj \(shard 'k'\).* expects a tensor of shape \(4, 8\), .* \(8, 8\)"):
        load(qkv, "weight", torch.zeros(8, 8), "k")
    with pytest.raises(ValueError, match=r"shape \(16, 8\), the checkpoint has \(17, 8\)"):
        load(qkv, "weight", torch.zeros(17, 8))
    with pytest.raises(ValueError, match=r"unknown shard_id 'gate'; have \['q', 'k', 'v'\]"):
        load(qkv, "weight", torch.zeros(8, 8), "gate")
    with pytest.raises(ValueError, match="down_proj is not fused"):
        load(RowParallelLinear(4, 4, prefix="down_proj"), "weight", torch.zeros(4, 4), 0)
    with pytest.raises(ValueError, match="number of attention heads 5 is not divisible by 2"):
        QKVParallelLinear(8, 4, 5, 1, tp_group=RankGroup(0, 2))
    with pytest.raises(ValueError, match="tensor-parallel size 8 is not divisible by 3"):
        QKVParallelLinear(8, 4, 8, 3, tp_group=RankGroup(0, 8))


class HalvedConfig(QuantizationConfig):
    """A scheme as one would add it: stores half of each weight, doubles the product; skips what it is told to."""

    class Method(UnquantizedLinearMethod):
        def process_weights_after_loading(self, layer: nn.Module) -> None:
            layer.weight.data.mul_(0.5)

        def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return F.linear(x, 2 * layer.weight, bias)

    def __init__(self) -> None:
        self.seen: list[str] = []

    def get_name(self) -> str:
        return "halved"

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        self.seen.append(prefix)
        return self.Method() if prefix.endswith("proj") else None


def test_a_quantization_scheme_is_asked_by_prefix() -> None:
    scheme, weight, x = HalvedConfig(), torch.randn(4, 3), torch.randn(2, 3)
    taken = ReplicatedLinear(3, 4, bias=False, quant_config=scheme, prefix="a.up_proj")
    left = ReplicatedLinear(3, 4, bias=False, quant_config=scheme, prefix="a.gate")
    VocabParallelEmbedding(3, 4, quant_config=scheme, prefix="embed_tokens")
    assert scheme.seen == ["a.up_proj", "a.gate", "embed_tokens"]
    for layer in (taken, left):
        load(layer, "weight", weight)
        layer.quant_method.process_weights_after_loading(layer)
        torch.testing.assert_close(layer(x)[0], x @ weight.T)
    assert torch.equal(taken.weight, weight / 2) and torch.equal(left.weight, weight)
    with pytest.raises(TypeError, match="needs an EmbeddingMethodBase, got Method"):
        VocabParallelEmbedding(3, 4, quant_config=scheme, prefix="odd_proj")


# Embeddings


@pytest.mark.parametrize(("vocab_size", "num_ranks"), [(7, 1), (7, 2), (8, 2), (3, 4), (10, 4)])
def test_embedding_rows_and_padding(vocab_size: int, num_ranks: int) -> None:
    table, bias = torch.randn(vocab_size, 3), torch.randn(vocab_size)
    rows, biases = [], []
    for group in ranks(num_ranks):
        head = ParallelLMHead(vocab_size, 3, bias=True, tp_group=group)
        head.weight.data.fill_(math.nan)
        load(head, "weight", table)
        load(head, "bias", bias)
        rows.append(head.weight)
        biases.append(head.bias)
    all_rows, all_biases = torch.cat(rows), torch.cat(biases)
    assert torch.equal(all_rows[:vocab_size], table) and torch.equal(all_biases[:vocab_size], bias)
    assert not all_rows[vocab_size:].any() and not all_biases[vocab_size:].any()


def test_embedding_lookup_and_errors() -> None:
    table, layer = torch.randn(7, 3), VocabParallelEmbedding(7, 3, prefix="embed_tokens")
    load(layer, "weight", table)
    assert torch.equal(layer(torch.tensor([6, 0, 3])), table[[6, 0, 3]])
    with pytest.raises(ValueError, match=r"embed_tokens: .* \(7, 3\), the checkpoint has \(8, 3\)"):
        load(layer, "weight", torch.zeros(8, 3))
    with pytest.raises(RuntimeError, match="LogitsProcessor"):
        ParallelLMHead(7, 3)(torch.tensor([1]))


# Norms and activations


@pytest.mark.parametrize("shape", [(5, 8), (5, 3, 8), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = RMSNorm(8, eps=1e-5).to(dtype)
    load(norm, "weight", torch.randn(8))
    x, residual = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    expected = F.rms_norm(x.double(), (8,), norm.weight.double(), 1e-5)
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=1e-2)
    normed, added = norm(x, residual)
    assert torch.equal(added, x + residual) and torch.equal(normed, norm(x + residual))
    normed, handed_on = norm(x, None)
    assert handed_on is x and torch.equal(normed, norm(x))


@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 7), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (GemmaRMSNorm(7, eps=1e-3), Gemma2RMSNorm(7, eps=1e-3)),
        (LayerNorm(7, eps=1e-3), nn.LayerNorm(7, eps=1e-3)),
        (LayerNorm(7, eps=1e-3, bias=False), Cohere2LayerNorm(7, eps=1e-3)),
    ],
)
def test_norms_as_transformers(ours: Any, theirs: nn.Module, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    for name, param in theirs.named_parameters():
        param.data.normal_()
        load(ours, name, param.data)
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    x, residual = 3 * torch.randn(shape, dtype=dtype) + 1, torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x))
    normed, added = ours(x, residual)
    assert torch.equal(added, x + residual) and torch.equal(normed, ours(x + residual))


@pytest.mark.parametrize("name", sorted(_ACT))
def test_activations_as_transformers(name: str) -> None:
    gate, up = torch.randn(4, 6) * 3, torch.randn(4, 6)
    torch.testing.assert_close(get_act_and_mul_fn(name)(torch.cat((gate, up), dim=-1)), ACT2FN[name](gate) * up)
    torch.testing.assert_close(get_act_fn(name)(gate), ACT2FN[name](gate))


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"unknown gated activation 'selu2'; have \['gelu'"):
        get_act_and_mul_fn("selu2")
    with pytest.raises(ValueError, match=r"unknown activation 'selu2'; have \['gelu'"):
        get_act_fn("selu2")
    with pytest.raises(ValueError, match="unknown gelu approximation"):
        GeluAndMul("sigmoid")  # type: ignore[arg-type]


# Attention


def naive_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, start: int, window: int | None, cap: float
) -> torch.Tensor:
    output = torch.zeros(q.shape[0], q.shape[1], v.shape[2])
    for i in range(q.shape[0]):
        position = start + i
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(q.shape[1]):
            kv_head = head * k.shape[1] // q.shape[1]
            scores = k[first : position + 1, kv_head] @ q[i, head] * scaling
            scores = cap * torch.tanh(scores / cap) if cap else scores
            output[i, head] = scores.softmax(0) @ v[first : position + 1, kv_head]
    return output


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (3, 3), (4, 1)])
def test_reference_attention(window: int | None, cap: float, num_heads: int, num_kv_heads: int) -> None:
    q, k, v = torch.randn(4, num_heads, 5), torch.randn(9, num_kv_heads, 5), torch.randn(9, num_kv_heads, 7)
    output = reference.attention(q, k, v, 0.4, q_start=5, window=window, logit_cap=cap)
    torch.testing.assert_close(output, naive_attention(q, k, v, 0.4, 5, window, cap))


def test_reference_attention_sinks_and_dtype() -> None:
    q, k, v = (torch.randn(3, heads, 4).to(torch.bfloat16) for heads in (2, 1, 1))
    assert reference.attention(q, k, v, 0.5, 0).dtype == torch.bfloat16
    plain = reference.attention(q.float(), k.float(), v.float(), 0.5, 0)
    nothing = reference.attention(q.float(), k.float(), v.float(), 0.5, 0, sinks=torch.tensor([-1e9, -1e9]))
    torch.testing.assert_close(nothing, plain)
    first = reference.attention(q.float(), k.float(), v.float(), 0.5, 0, sinks=torch.zeros(2))[0]
    scores = (q[0].float() @ k[0, 0].float()) * 0.5
    torch.testing.assert_close(first, torch.sigmoid(scores)[:, None] * v[0].float())


def test_radix_attention_reshapes_and_delegates() -> None:
    seen: dict[str, Any] = {}

    def forward(q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool, sinks: Any) -> torch.Tensor:
        assert sinks is None and asdict(layer) == asdict(AttentionSpec(3, 4, 2, 6, 5, scaling=0.5))
        seen.update(q=q.shape, k=None if k is None else k.shape, v=None if v is None else v.shape, save=save_kv_cache)
        return q.new_zeros(q.shape[0], 20)

    batch: Any = SimpleNamespace(attn_backend=SimpleNamespace(forward=forward))
    layer = RadixAttention(4, 6, 0.5, 2, 3, v_head_dim=5)
    qkv = torch.randn(7, 24 + 12 + 10)
    assert layer(*qkv.split([24, 12, 10], dim=-1), batch).shape == (7, 20)
    assert seen == {"q": (7, 4, 6), "k": (7, 2, 6), "v": (7, 2, 5), "save": True}
    layer(torch.randn(0, 4, 6), None, None, batch, save_kv_cache=False)
    assert seen == {"q": (0, 4, 6), "k": None, "v": None, "save": False}
    with pytest.raises(ValueError, match="both k and v"):
        layer(torch.randn(1, 24), torch.randn(1, 12), None, batch)


def test_cache_spec_counts_the_query_itself() -> None:
    def spec(**options: Any) -> CacheSpec:
        return RadixAttention(4, 6, 0.5, 2, 0, **options).cache_spec()

    assert spec() == CacheSpec(2, 6, 6, "float32", None)
    assert spec(sliding_window_size=None, v_head_dim=3) == CacheSpec(2, 6, 3, "float32", None)
    assert spec(sliding_window_size=6).window == 7
    assert spec(sliding_window_size=0).window == 1
    assert spec(window=7) == spec(sliding_window_size=6)
    assert spec(window=None).window is None
    with pytest.raises(ValueError, match="ENCODER_ONLY"):
        RadixAttention(4, 6, 0.5, 2, 0, attn_type=AttentionType.ENCODER_ONLY)


def test_a_window_is_given_in_one_count() -> None:
    layer = RadixAttention(4, 6, 0.5, 2, 0, window=7)
    assert layer.spec.window == 7 and layer.sliding_window_size == 6
    assert RadixAttention(4, 6, 0.5, 2, 0).sliding_window_size == -1
    with pytest.raises(ValueError, match=r"layers\.0\.attn: give window or sliding_window_size, not both"):
        RadixAttention(4, 6, 0.5, 2, 0, window=7, sliding_window_size=6, prefix="layers.0.attn")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        RadixAttention(4, 6, 0.5, 2, 0, window=0)


def test_what_an_attention_layer_said_stays() -> None:
    """Its description is made once, so a name of it that is set later would change nothing."""
    layer = RadixAttention(4, 6, 0.5, 2, 3, v_head_dim=5, logit_cap=30.0)
    assert (layer.tp_q_head_num, layer.tp_k_head_num, layer.tp_v_head_num) == (4, 2, 2)
    assert (layer.layer_id, layer.head_dim, layer.qk_head_dim, layer.v_head_dim) == (3, 6, 6, 5)
    assert (layer.scaling, layer.logit_cap, layer.latent) == (0.5, 30.0, False)
    with pytest.raises(AttributeError):
        layer.scaling = 1.0


# Logits


def test_token_logprobs() -> None:
    logits = torch.randn(3, 11) * 5
    expected = logits.log_softmax(-1)
    chosen = torch.tensor([[0, 0, 0], [7, 7, 1], [3, 0, 0]])
    results = token_logprobs(logits, torch.tensor([4, 0, 10]), [0, 2, 99], chosen, [0, 3, 1]).read()
    assert [result.token_id for result in results] == [4, 0, 10]
    for row, result in enumerate(results):
        assert result.logprob == pytest.approx(expected[row, result.token_id].item(), abs=1e-6)
        assert all(
            logprob == pytest.approx(expected[row, i].item(), abs=1e-6) for logprob, i in result.top + result.chosen
        )
        assert result.top == sorted(result.top, reverse=True)
    assert [len(result.top) for result in results] == [0, 2, 11]
    assert [[i for _, i in result.chosen] for result in results] == [[], [7, 7, 1], [3]]
    assert results[1].top[0][1] == logits[1].argmax().item()
    assert token_logprobs(torch.empty(0, 11), torch.empty(0, dtype=torch.int64), []).read() == []
    with pytest.raises(ValueError, match="3 rows, but 1, 3 and 3"):
        token_logprobs(logits, torch.tensor([1]), [0] * 3)


def test_token_logprobs_of_half_precision_logits_are_float32() -> None:
    logits = torch.randn(2, 300).to(torch.bfloat16)
    [first, _] = token_logprobs(logits, torch.tensor([5, 6]), [0, 0]).read()
    assert first.logprob == pytest.approx(logits.float().log_softmax(-1)[0, 5].item(), abs=1e-6)


@pytest.mark.parametrize("num_tokens", [1, ROWS_PER_PIECE - 1, ROWS_PER_PIECE, 2 * ROWS_PER_PIECE + 5])
def test_logits_processor(num_tokens: int) -> None:
    config: Any = SimpleNamespace(vocab_size=9, final_logit_softcapping=3.0)
    head, hidden = ParallelLMHead(9, 4, bias=True), torch.randn(num_tokens, 4) * 4
    load(head, "weight", torch.randn(9, 4))
    load(head, "bias", torch.randn(9))
    batch = make_batch([1] * num_tokens, 0, num_tokens)
    targets = torch.randint(9, (num_tokens,)).tolist()
    rows = list(range(num_tokens))
    batch.prompt_logprobs = [logprob_row(rows, targets, 2, [8, 3]), logprob_row(rows[-1:], [0])]

    output = LogitsProcessor(config, logit_scale=0.5)(batch.input_ids, hidden, head, batch)
    expected = 3.0 * torch.tanh(F.linear(hidden, head.weight, head.bias) * 0.5 / 3.0)
    torch.testing.assert_close(output.next_token_logits, expected[-1:])
    assert output.hidden_states is None
    first, second = (logprobs.read() for logprobs in output.prompt_logprobs)
    assert [result.token_id for result in first] == targets and len(second) == 1
    logprobs = expected.log_softmax(-1)
    for row, result in enumerate(first):
        assert result.logprob == pytest.approx(logprobs[row, targets[row]].item(), abs=1e-5)
        assert result.chosen[1] == (pytest.approx(logprobs[row, 3].item(), abs=1e-5), 3)
        assert len(result.top) == 2


@pytest.mark.parametrize("num_rows", [2, 3, 4, 7])
def test_many_logits_are_computed_in_pieces(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuProvider, "logit_bytes_at_once", 2 * 9 * 4 + 5)  # two rows and a little
    head, hidden = ParallelLMHead(9, 4), torch.randn(num_rows, 4)
    load(head, "weight", torch.randn(9, 4))
    batch = make_batch([1] * num_rows, 0, num_rows)
    batch.sample_rows, batch.prompt_logprobs = torch.arange(num_rows), []
    config: Any = SimpleNamespace(vocab_size=9)
    processor = LogitsProcessor(config)
    output = processor(batch.input_ids, hidden, head, batch)
    assert output.num_rows == num_rows
    pieces = list(output.pieces())
    assert [row for rows, _ in pieces for row in range(num_rows)[rows]] == list(range(num_rows))
    assert {len(logits) for _, logits in pieces} <= {1, 2} and len(pieces) == -(-num_rows // 2)
    torch.testing.assert_close(torch.cat([logits for _, logits in pieces]), processor.logits(hidden, head))
    assert [rows for rows, _ in output.first(1, 1).pieces()] == [slice(0, 1)]

    output.next_token_logits[0, 3] = 7.0  # as a model may change them
    assert output.next_token_logits[0, 3] == 7.0 and len(list(output.pieces())) == 1


def test_logits_processor_with_nothing_to_sample() -> None:
    config: Any = SimpleNamespace(vocab_size=9)
    batch = make_batch([1, 2, 3], 0, 5)
    batch.sample_rows, batch.prompt_logprobs = torch.empty(0, dtype=torch.int64), []
    captured = [torch.randn(3, 4), torch.randn(3, 4)]
    output = LogitsProcessor(config)(batch.input_ids, torch.randn(3, 4), ParallelLMHead(9, 4), batch, captured)
    assert output.next_token_logits.shape == (0, 9) and output.prompt_logprobs == []
    assert torch.equal(output.hidden_states, torch.cat(captured, dim=-1))
