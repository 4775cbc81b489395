"""Mistral (Jiang et al., 2023): Llama with a sliding window on every layer, and no biases."""

from typing import TYPE_CHECKING

import torch

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class MistralAttention(GroupedQueryAttention):
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
            qkv_bias=False,
            o_bias=False,
            sliding_window=config.sliding_window,
            quant_config=quant_config,
            prefix=prefix,
        )


class Ministral3Attention(MistralAttention):
    """Attention whose queries grow with the logarithm of their position, beyond the original context (Mistral AI,
    2025)."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, layer_id, quant_config, prefix)
        self.growth = config.rope_parameters["llama_4_scaling_beta"]
        self.context = config.rope_parameters["original_max_position_embeddings"]

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = super().prepare_queries_and_keys(positions, q, k)
        factors = 1.0 + self.growth * torch.log1p((positions // self.context).float())
        return q * factors.to(q.dtype).view(-1, *[1] * (q.dim() - 1)), k


class MistralForCausalLM(LlamaForCausalLM):
    attention_type = MistralAttention


EntryClass = MistralForCausalLM
