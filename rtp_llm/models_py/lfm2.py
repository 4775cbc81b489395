"""LFM2 (Liquid AI, 2025): short convolutions between gates on most layers, attention with normed heads on others."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.gguf.recurrent import kinds_of_layers, num_key_heads
from rtp_llm.srt.layers.causal_conv import CausalConv1d
from rtp_llm.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.normed_heads import norm_and_rotate
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class Lfm2Attention(GroupedQueryAttention):
    """Attention whose query and key heads are normed before they are rotated."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, layer_id, qkv_bias=False, o_bias=False, quant_config=quant_config, prefix=prefix)
        self.q_layernorm = RMSNorm(self.head_dim, config.norm_eps)
        self.k_layernorm = RMSNorm(self.head_dim, config.norm_eps)

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = q.unflatten(-1, (-1, self.head_dim)), k.unflatten(-1, (-1, self.head_dim))
        return norm_and_rotate(self.q_layernorm, self.k_layernorm, self.rotary_emb, positions, q, k)


class Lfm2ShortConv(nn.Module):
    """A convolution of the last tokens' inputs, between two gates."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.conv_bias
        self.in_proj = MergedColumnParallelLinear(
            size, [size] * 3, bias=bias, quant_config=quant_config, prefix=add_prefix("in_proj", prefix)
        )
        self.conv = CausalConv1d([size], config.conv_L_cache, layer_id, bias=bias, prefix=add_prefix("conv", prefix))
        self.out_proj = RowParallelLinear(
            size, size, bias=bias, quant_config=quant_config, prefix=add_prefix("out_proj", prefix)
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        projected, _ = self.in_proj(hidden_states)
        before, after, x = projected.chunk(3, dim=-1)
        output, _ = self.out_proj(self.conv(x, forward_batch, before, after))
        return output


class Lfm2DecoderLayer(LlamaDecoderLayer):
    mlp_name = "feed_forward"

    def make_mixer(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        attention_type: type[nn.Module],
    ) -> tuple[str, nn.Module]:
        if config.layer_types[layer_id] == "conv":
            return "conv", Lfm2ShortConv(config, layer_id, quant_config, add_prefix("conv", prefix))
        return super().make_mixer(config, layer_id, quant_config, prefix, attention_type)

    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return RMSNorm(config.hidden_size, eps=config.norm_eps)

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        return GatedMLP(config.hidden_size, feed_forward_size(config), "silu", quant_config=quant_config, prefix=prefix)


def feed_forward_size(config: "PretrainedConfig") -> int:
    """Return the size of the feed-forward block: of the configuration's, two thirds, times a factor, rounded up."""
    size: int = config.intermediate_size
    if not config.block_auto_adjust_ff_dim:
        return size
    size = int(2 * size / 3)
    if config.block_ffn_dim_multiplier is not None:
        step = config.block_multiple_of
        size = -(-int(config.block_ffn_dim_multiplier * size) // step) * step
    return size


class Lfm2Model(LlamaModel):
    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return RMSNorm(config.hidden_size, eps=config.norm_eps)


GGUF_CONFIG = {"shortconv.l_cache": "conv_L_cache", "attention.layer_norm_rms_epsilon": "norm_eps"}
GGUF_CHANGES = ((r"\.conv\.conv\.weight$", "convolution"),)


def from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Set the kinds of layers, which a GGUF has as numbers of key heads."""
    config["layer_types"] = kinds_of_layers(metadata, "conv")
    config["num_key_value_heads"] = num_key_heads(metadata)


class Lfm2ForCausalLM(LlamaForCausalLM):
    rename = [
        (r"^model\.embedding_norm\.", "model.norm."),
        (r"\.operator_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
        (r"\.feed_forward\.w1\.", ".feed_forward.gate_proj."),
        (r"\.feed_forward\.w3\.", ".feed_forward.up_proj."),
        (r"\.feed_forward\.w2\.", ".feed_forward.down_proj."),
    ]
    attention_type = Lfm2Attention
    layer_type = Lfm2DecoderLayer
    base_model_type = Lfm2Model
    gguf = GGUFForm(
        "lfm2",
        config=GGUF_CONFIG,
        defaults={"block_auto_adjust_ff_dim": False},  # the file has the size that it gives
        presence={"blk.{bid}.shortconv.in_proj.bias": "conv_bias"},
        adapt=from_gguf,
        changes=GGUF_CHANGES,
    )


EntryClass = Lfm2ForCausalLM
