"""ERNIE 4.5 MoE (Baidu, 2025): ERNIE 4.5 with routed and shared experts on some layers, chosen by corrected scores."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.ernie4_5 import Ernie4_5DecoderLayer, Ernie4_5ForCausalLM
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.moe import Routing
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.sparse_moe import SparseMoeBlock
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Ernie4_5MoeStatics(nn.Module):
    """Holds ``e_score_correction_bias`` [1, num_experts], which is added to scores to choose experts."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.e_score_correction_bias = make_parameter(
            torch.empty(1, num_experts, dtype=torch.float32), default_weight_loader
        )


class Ernie4_5SparseMoeBlock(SparseMoeBlock):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(
            config.moe_num_experts,
            config.moe_k,
            config.hidden_size,
            config.moe_intermediate_size,
            config.hidden_act,
            gate_dtype=torch.float32,
            shared=("shared_experts", config.moe_intermediate_size * config.moe_num_shared_experts),
            shared_bias=config.use_bias,
            quant_config=quant_config,
            prefix=prefix,
        )
        self.least_sum = config.moe_norm_min
        self.moe_statics = Ernie4_5MoeStatics(config.moe_num_experts)

    def route(self, router_logits: torch.Tensor) -> Routing:
        """Choose the largest of a softmax plus a correction, which the weights are without."""
        scores = router_logits.softmax(dim=-1, dtype=torch.float32)
        topk_ids = (scores + self.moe_statics.e_score_correction_bias).topk(self.top_k, dim=-1).indices
        topk_weights = scores.gather(-1, topk_ids)
        return topk_weights / topk_weights.sum(dim=-1, keepdim=True).clamp(min=self.least_sum), topk_ids


class Ernie4_5MoeDecoderLayer(Ernie4_5DecoderLayer):
    """A layer: of those from ``moe_layer_start_index`` to ``moe_layer_end_index`` every ``moe_layer_interval``-th has
    experts."""

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        is_its_turn = (layer_id + 1) % config.moe_layer_interval == 0
        if is_its_turn and config.moe_layer_start_index <= layer_id <= config.moe_layer_end_index:
            return Ernie4_5SparseMoeBlock(config, quant_config, prefix)
        return super().make_mlp(config, layer_id, quant_config, prefix)


class Ernie4_5_MoeForCausalLM(Ernie4_5ForCausalLM):
    ignore = [r"^model\.mtp_"]  # what predicts further tokens
    layer_type = Ernie4_5MoeDecoderLayer
    gguf = GGUFForm(
        "ernie4_5-moe",
        config={
            "expert_count": "moe_num_experts",
            "expert_used_count": "moe_k",
            "expert_shared_count": "moe_num_shared_experts",
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
        },
        presence={"blk.0.attn_q.bias": "use_bias"},
    )

    def has_head_bias(self, config: "PretrainedConfig") -> bool:
        return config.use_bias


EntryClass = Ernie4_5_MoeForCausalLM
