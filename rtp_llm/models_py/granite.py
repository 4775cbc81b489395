"""Granite 3 (IBM, 2024): Llama with constant factors on embeddings, scores, residual branches and logits."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from rtp_llm.srt.gguf.form import PERMUTED, GGUFForm
from rtp_llm.srt.layers.logits_processor import LogitsProcessor
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class GraniteAttention(GroupedQueryAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            config,
            layer_id,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            quant_config=quant_config,
            prefix=prefix,
            scaling=config.attention_multiplier,
        )


class GraniteDecoderLayer(LlamaDecoderLayer):
    """A Llama layer whose attention and feed-forward are multiplied by ``residual_multiplier``."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = GraniteAttention,
    ) -> None:
        super().__init__(config, layer_id, quant_config, prefix, attention_type)
        self.residual_multiplier = config.residual_multiplier

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states, forward_batch) * self.residual_multiplier
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.feed(hidden_states) * self.residual_multiplier, residual


class GraniteModel(LlamaModel):
    def __init__(
        self,
        config: "PretrainedConfig",
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = GraniteAttention,
        layer_type: type[nn.Module] = GraniteDecoderLayer,
    ) -> None:
        super().__init__(config, quant_config, prefix, attention_type, layer_type)
        self.embedding_multiplier = config.embedding_multiplier

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        embeds = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        return super().forward(input_ids, positions, forward_batch, embeds * self.embedding_multiplier)


GGUF_CONFIG = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


class GraniteForCausalLM(LlamaForCausalLM):
    attention_type = GraniteAttention
    layer_type: type[nn.Module] = GraniteDecoderLayer
    base_model_type = GraniteModel
    gguf = GGUFForm(
        "granite",
        config=GGUF_CONFIG,
        presence={"blk.0.attn_q.bias": "attention_bias", "blk.0.ffn_gate.bias": "mlp_bias"},
        changes=PERMUTED,
    )

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.logits_processor = LogitsProcessor(config, logit_scale=1 / config.logits_scaling)


EntryClass = GraniteForCausalLM
