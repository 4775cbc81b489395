"""Qwen3-VL-MoE (Bai et al., 2025): Qwen3-VL with experts on most layers of the language model."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.qwen2_moe import QwenMoeDecoderLayer
from rtp_llm.models_py.qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLModel, Qwen3VLProcessor
from rtp_llm.srt.layers.linear import ReplicatedLinear
from rtp_llm.srt.layers.moe import FusedMoE, softmax_topk
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen3VLMoeSparseMoeBlock(nn.Module):
    """Qwen3-MoE's experts, whose weights always sum to one for a token, and whose matrices are transposed in published
    checkpoints."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = ReplicatedLinear(
            config.hidden_size, config.num_experts, bias=False, prefix=add_prefix("gate", prefix)
        )
        self.experts = FusedMoE(
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
            activation=config.hidden_act,
            is_transposed=None,
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.gate(hidden_states)
        topk_weights, topk_ids = softmax_topk(router_logits, self.top_k, renormalize=True)
        return self.experts(hidden_states, topk_weights, topk_ids)


class Qwen3VLMoeDecoderLayer(QwenMoeDecoderLayer):
    moe_type = Qwen3VLMoeSparseMoeBlock


class Qwen3VLMoeModel(Qwen3VLModel):
    layer_type = Qwen3VLMoeDecoderLayer


class Qwen3VLMoeForConditionalGeneration(Qwen3VLForConditionalGeneration):
    model_type = Qwen3VLMoeModel


class Qwen3VLMoeProcessor(Qwen3VLProcessor):
    models = [Qwen3VLMoeForConditionalGeneration]


EntryClass = Qwen3VLMoeForConditionalGeneration
