"""Qwen3 (Qwen Team, 2025): Llama with normed query and key heads, and windows on some layers."""

from typing import TYPE_CHECKING

import torch

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM
from rtp_llm.models_py.qwen2 import layer_window
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen3Attention(GroupedQueryAttention):
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
            sliding_window=layer_window(config, layer_id),
            quant_config=quant_config,
            prefix=prefix,
        )
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim)))
        return self.rotary_emb(positions, q, k)


class Qwen3ForCausalLM(LlamaForCausalLM):
    attention_type = Qwen3Attention


EntryClass = Qwen3ForCausalLM
