"""Qwen3-Next (Qwen Team, 2025): Gated DeltaNet on most layers, gated attention on others, experts with a shared one.

The delta rule: Yang et al., 2024.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.llama import LlamaForCausalLM, LlamaModel, NormedHeadsAttention
from rtp_llm.models_py.qwen2_moe import Qwen2MoeSparseMoeBlock, QwenMoeDecoderLayer
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.gguf.recurrent import by_layer, state_head_dim
from rtp_llm.srt.layers.gated_delta_net import GatedDeltaNet
from rtp_llm.srt.layers.gated_norm import SigmoidGate
from rtp_llm.srt.layers.linear import QKVParallelLinear
from rtp_llm.srt.layers.norm import GemmaRMSNorm
from rtp_llm.srt.layers.normed_heads import norm_and_rotate
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import rope_of_layer
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class GatedQKVParallelLinear(QKVParallelLinear):
    """Queries, keys and values; each query head is followed by a gate of its size. ``q_size`` is that of both."""

    def _split_heads(self) -> None:
        super()._split_heads()
        self.q_size *= 2


class GatedAttention(NormedHeadsAttention):
    """Attention with partly rotated heads, whose result is multiplied by the sigmoid of a gate."""

    qkv_type = GatedQKVParallelLinear
    head_norm_type = GemmaRMSNorm

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        bias = config.attention_bias
        super().__init__(config, layer_id, qkv_bias=bias, o_bias=bias, quant_config=quant_config, prefix=prefix)
        self.gate_output = SigmoidGate()

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return rope_of_layer(config, self.head_dim, layer_id, is_partial=True)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, gate = q.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        k = k.unflatten(-1, (-1, self.head_dim))
        q, k = norm_and_rotate(self.q_norm, self.k_norm, self.rotary_emb, positions, q, k)
        attended = self.attn(q, k, v, forward_batch)
        output, _ = self.o_proj(self.gate_output(attended, gate))
        return output


class Qwen3NextDecoderLayer(QwenMoeDecoderLayer):
    """A layer of experts, with linear attention where ``layer_types`` says so."""

    moe_type = Qwen2MoeSparseMoeBlock
    has_grouped_projections = True

    def make_mixer(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        attention_type: type[nn.Module],
    ) -> tuple[str, nn.Module]:
        layer_type = config.layer_types[layer_id]
        if layer_type == "linear_attention":
            prefix = add_prefix("linear_attn", prefix)
            is_grouped = self.has_grouped_projections
            return "linear_attn", GatedDeltaNet(config, layer_id, quant_config, prefix, is_grouped=is_grouped)
        if layer_type != "full_attention":
            raise ValueError(
                f"layer_types[{layer_id}] must be 'linear_attention' or 'full_attention', not {layer_type!r}"
            )
        return super().make_mixer(config, layer_id, quant_config, prefix, attention_type)

    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Qwen3NextModel(LlamaModel):
    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


DELTA_GGUF_CONFIG = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "full_attention_interval": "full_attention_interval",
}
DELTA_GGUF_CHANGES = (
    (r"(?<!\.linear_attn\.)norm\.weight$", "plus_one"),
    (r"\.A_log$", "log_decay"),
    (r"\.conv1d\.weight$", "convolution"),
)
DELTA_GGUF_PRESENCE = {"blk.{bid}.attn_q.bias": "attention_bias"}
DELTA_GGUF_NAMES = {"blk.{bid}.ssm_dt.bias": "model.layers.{bid}.linear_attn.dt_bias"}


def delta_from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Set what a GGUF has under other names: the size of value heads, and the kinds of layers."""
    config["linear_value_head_dim"] = state_head_dim(metadata)
    config.setdefault("partial_rotary_factor", 1.0)
    if f"{metadata['general.architecture']}.attention.recurrent_layers" in metadata:
        recurrent = by_layer(metadata, "attention.recurrent_layers")[: config["num_hidden_layers"]]
        config["layer_types"] = ["linear_attention" if of_layer else "full_attention" for of_layer in recurrent]
        config.pop("full_attention_interval", None)


class Qwen3NextForCausalLM(LlamaForCausalLM):
    attention_type = GatedAttention
    layer_type = Qwen3NextDecoderLayer
    base_model_type = Qwen3NextModel
    gguf = GGUFForm(
        "qwen3next",
        config=DELTA_GGUF_CONFIG,
        presence=DELTA_GGUF_PRESENCE,
        adapt=delta_from_gguf,
        changes=(*DELTA_GGUF_CHANGES, (r"\.in_proj_qkvz\.weight$", "by_key_head")),
        names=DELTA_GGUF_NAMES
        | {f"blk.{{bid}}.attn_{x}": "model.layers.{bid}.linear_attn.in_proj_qkvz" for x in ("qkv", "gate")},
    )


EntryClass = Qwen3NextForCausalLM
