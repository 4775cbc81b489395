"""Layers of towers and of models around language models, as vLLM's files call them."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, PretrainedConfig

from rtp_llm.srt.layers.encoder_attention import MMEncoderAttention
from rtp_llm.srt.layers.input_norm import build_mm_input_norm
from rtp_llm.srt.layers.language_model import make_registered_model

LENGTHS = [3, 5, 3, 1]


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of one segment, [s, heads, head_size], whose key heads are repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    weights = (torch.einsum("shd,thd->hst", q, k) * scale).softmax(-1)
    return torch.einsum("hst,thd->shd", weights, v)


@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize("is_flat", [False, True])
def test_a_token_sees_its_own_segment(num_kv_heads: int | None, is_flat: bool) -> None:
    layer = MMEncoderAttention(4, 6, 0.3, num_kv_heads, prefix="tower.attn")
    q, k, v = torch.randn(12, 4, 6), torch.randn(12, num_kv_heads or 4, 6), torch.randn(12, num_kv_heads or 4, 6)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    expected = torch.cat([alone(*parts, 0.3) for parts in zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True)])
    given = [x[None].flatten(2) if is_flat else x[None] for x in (q, k, v)]
    output = layer(*given, cu_seqlens=bounds, max_seqlen=torch.tensor(0))
    assert output.shape == given[0].shape
    torch.testing.assert_close(output.view(12, 4, 6), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(layer(*given, bounds), output)  # the second layer of a pass


def test_without_bounds_each_row_is_a_segment() -> None:
    q, k, v = torch.randn(3, 2, 5, 8).unbind()
    output = MMEncoderAttention(2, 4)(q, k, v)
    heads = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(output, F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
    with pytest.raises(ValueError, match="cu_seqlens end at 7, but there are 10 tokens"):
        MMEncoderAttention(2, 4)(q, k, v, torch.tensor([0, 7]))


def test_pixels_come_normed() -> None:
    assert build_mm_input_norm()(torch.ones(2), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("architectures", [None, ["LlamaForCausalLM"]])
def test_a_language_model_is_found_by_its_configuration(architectures: list[str] | None) -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    model = make_registered_model(config, architectures=architectures)
    assert type(model).__name__ == "LlamaForCausalLM" and model.lm_head.weight.shape == (9, 16)
    with pytest.raises(ValueError, match="names no architectures"):
        make_registered_model(PretrainedConfig())
