"""DeepSeek-V3 and R1 (DeepSeek-AI, 2024, 2025): DeepSeek-V2 with experts chosen by corrected sigmoid scores.

A checkpoint's layers past ``num_hidden_layers`` predict further tokens; the loader leaves them out.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2DecoderLayer,
    DeepseekV2ForCausalLM,
    DeepseekV2MoE,
    check_groups,
)
from rtp_llm.srt.configs.requirements import require
from rtp_llm.srt.layers.moe import Routing, sigmoid_grouped_topk
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import RotaryEmbedding
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class DeepseekV3Attention(DeepseekV2Attention):
    def make_rope(self, config: "PretrainedConfig", is_interleaved: bool = True) -> RotaryEmbedding:
        return super().make_rope(config, is_interleaved=config.rope_interleave)


class DeepseekV3MoE(DeepseekV2MoE):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.norm_topk_prob = config.norm_topk_prob
        self.gate.e_score_correction_bias = make_parameter(
            torch.empty(config.n_routed_experts, dtype=torch.float32), default_weight_loader
        )

    def check_routing(self, config: "PretrainedConfig") -> None:
        require(config, "topk_method", ("noaux_tc",))
        require(config, "scoring_func", ("sigmoid",))
        check_groups(config)

    def route(self, router_logits: torch.Tensor) -> Routing:
        return sigmoid_grouped_topk(
            router_logits,
            self.gate.get_parameter("e_score_correction_bias"),
            self.top_k,
            self.num_groups,
            self.num_top_groups,
            renormalize=self.norm_topk_prob,
            routed_scaling_factor=self.routed_scaling_factor,
        )


class DeepseekV3DecoderLayer(DeepseekV2DecoderLayer):
    moe_type = DeepseekV3MoE


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    attention_type: type[nn.Module] = DeepseekV3Attention
    layer_type: type[nn.Module] = DeepseekV3DecoderLayer


EntryClass = DeepseekV3ForCausalLM
