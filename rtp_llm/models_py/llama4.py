"""Llama 4 (Meta, 2025), text: experts, attention within chunks, and layers without positions."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaDecoderLayer, LlamaForCausalLM
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.linear import ReplicatedLinear
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.moe import FusedMoE
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import NoPositions, rope_of_layer
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig


LAYER_TYPES = ("full_attention", "chunked_attention")


class Llama4Attention(GroupedQueryAttention):
    """Attention whose heads are rotated and then normed without weights, or have no positions and grow with them."""

    rotates_in_float32 = True

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        if config.layer_types[layer_id] not in LAYER_TYPES:
            raise ValueError(
                f"layer_types[{layer_id}] must be one of {LAYER_TYPES}, not {config.layer_types[layer_id]!r}"
            )
        super().__init__(
            config,
            layer_id,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            quant_config=quant_config,
            prefix=prefix,
            chunk_size=config.attention_chunk_size if config.layer_types[layer_id] == "chunked_attention" else None,
        )
        self.has_positions = bool(config.no_rope_layers[layer_id])
        self.norms_heads = self.has_positions and config.use_qk_norm
        self.is_tuned = not self.has_positions and config.attn_temperature_tuning
        self.eps = config.rms_norm_eps
        self.floor_scale, self.attn_scale = config.floor_scale, config.attn_scale

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        """A 1 in ``no_rope_layers`` means that the layer does rotate."""
        if not config.no_rope_layers[layer_id]:
            return NoPositions()
        return rope_of_layer(config, self.head_dim, layer_id, is_neox_style=False, dtype=torch.float32)

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = self.rotate(positions, q.unflatten(-1, (-1, self.head_dim)), k.unflatten(-1, (-1, self.head_dim)))
        if self.norms_heads:
            q, k = (nn.functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) for x in (q, k))
        if self.is_tuned:
            temperatures = ((positions.float() + 1.0) / self.floor_scale).floor().log1p() * self.attn_scale + 1.0
            q = (q * temperatures[:, None, None]).to(q.dtype)
        return q, k


class Llama4MoE(nn.Module):
    """Routed experts, whose inputs are multiplied by their scores, and a shared one for all tokens."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router = ReplicatedLinear(
            config.hidden_size, config.num_local_experts, bias=False, prefix=add_prefix("router", prefix)
        )
        self.experts = FusedMoE(
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
            activation=config.hidden_act,
            is_transposed=True,
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
        )
        self.shared_expert = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("shared_expert", prefix),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.router(hidden_states)
        topk_logits, topk_ids = router_logits.topk(self.top_k, dim=-1)
        scores = topk_logits.float().sigmoid().to(hidden_states.dtype)
        # Each of a token's experts has an input of its own, so each counts as a token.
        inputs = (hidden_states[:, None] * scores[..., None]).flatten(0, 1)
        weights = torch.ones_like(topk_ids, dtype=torch.float32).view(-1, 1)
        routed = self.experts(inputs, weights, topk_ids.view(-1, 1)).unflatten(0, (-1, self.top_k)).sum(dim=1)
        return self.shared_expert(hidden_states) + routed


class Llama4DecoderLayer(LlamaDecoderLayer):
    mlp_name = "feed_forward"

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        if layer_id in config.moe_layers:
            return Llama4MoE(config, quant_config, prefix)
        return GatedMLP(
            config.hidden_size,
            config.intermediate_size_mlp,
            config.hidden_act,
            quant_config=quant_config,
            prefix=prefix,
        )


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    config["use_qk_norm"] = config["num_local_experts"] != 128  # Maverick has none, and no key says so


class Llama4ForCausalLM(LlamaForCausalLM):
    attention_type = Llama4Attention
    layer_type = Llama4DecoderLayer
    gguf = GGUFForm(
        "llama4",
        config={
            "expert_count": "num_local_experts",
            "feed_forward_length": "intermediate_size_mlp",
            "expert_feed_forward_length": "intermediate_size",
            "interleave_moe_layer_step": "interleave_moe_layer_step",
        },
        defaults={"model_type": "llama4_text"},
        adapt=_from_gguf,
    )


EntryClass = Llama4ForCausalLM
