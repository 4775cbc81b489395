"""DeepSeek-V3 and R1 (DeepSeek-AI, 2024, 2025): DeepSeek-V2 with experts chosen by corrected sigmoid scores.

A checkpoint's layers past ``num_hidden_layers`` predict further tokens; the loader leaves them out.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.deepseek_v2 import (
    GGUF_CHANGES,
    GGUF_CONFIG,
    GGUF_NAMES,
    DeepseekV2Attention,
    DeepseekV2DecoderLayer,
    DeepseekV2ForCausalLM,
    DeepseekV2MoE,
    add_gguf_sizes,
    check_groups,
)
from rtp_llm.srt.configs.requirements import require
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.moe import Routing, sigmoid_grouped_topk
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class DeepseekV3Attention(DeepseekV2Attention):
    def make_rope(self, config: "PretrainedConfig", is_interleaved: bool = True) -> nn.Module:
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


_SIGMOID = 2  # in a GGUF's metadata


def _is_of_gguf(metadata: Mapping[str, Any]) -> bool:
    """Whether experts are chosen by sigmoid scores; files of GLM-4.7-Flash do not say so."""
    by_sigmoid = metadata.get("deepseek2.expert_gating_func") == _SIGMOID
    is_glm_flash = metadata["deepseek2.block_count"] in (47, 48) and metadata.get("deepseek2.vocab_size") == 154880
    return by_sigmoid or is_glm_flash


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    attention_type: type[nn.Module] = DeepseekV3Attention
    layer_type: type[nn.Module] = DeepseekV3DecoderLayer
    gguf = GGUFForm(
        "deepseek2",
        config=GGUF_CONFIG,
        defaults={"q_lora_rank": None, "norm_topk_prob": False},
        adapt=add_gguf_sizes,
        changes=GGUF_CHANGES,
        names=GGUF_NAMES,
        matches=_is_of_gguf,
    )


EntryClass = DeepseekV3ForCausalLM
