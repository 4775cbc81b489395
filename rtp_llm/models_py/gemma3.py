"""Gemma 3 (Gemma Team, 2025), text: Gemma 2 with normed heads in place of capped scores, and a RoPE per layer type."""

from typing import TYPE_CHECKING

import torch

from rtp_llm.models_py.gemma2 import Gemma2ForCausalLM, layer_window, refuse_bidirectional_attention
from rtp_llm.models_py.llama import GroupedQueryAttention
from rtp_llm.srt.layers.norm import GemmaRMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import RotaryEmbedding, get_rope, get_rope_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Gemma3Attention(GroupedQueryAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        refuse_bidirectional_attention(config)
        if config.attn_logit_softcapping is not None:
            raise ValueError(
                f"attn_logit_softcapping is {config.attn_logit_softcapping}, but Gemma 3 does not cap attention "
                "scores: set it to null"
            )
        super().__init__(
            config,
            layer_id,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            sliding_window=layer_window(config, layer_id),
            quant_config=quant_config,
            prefix=prefix,
            scaling=config.query_pre_attn_scalar**-0.5,
        )
        self.q_norm = GemmaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = GemmaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> RotaryEmbedding:
        rope_theta, rope_scaling, _ = get_rope_config(config, config.layer_types[layer_id])
        return get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings,
            base=rope_theta,
            rope_scaling=rope_scaling,
        )

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim)))
        return self.rotary_emb(positions, q, k)


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    attention_type = Gemma3Attention


EntryClass = Gemma3ForCausalLM
