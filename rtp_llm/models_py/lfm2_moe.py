"""LFM2-MoE (Liquid AI, 2025): LFM2 with experts on all but the first layers."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.lfm2 import GGUF_CHANGES, GGUF_CONFIG, Lfm2DecoderLayer, Lfm2ForCausalLM, from_gguf
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.moe import Routing
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.sparse_moe import SparseMoeBlock
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Lfm2MoeSparseMoeBlock(SparseMoeBlock):
    """Experts, chosen by the sigmoids of their logits plus a bias, and weighted by the sigmoids."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_intermediate_size,
            "silu",
            renormalize=config.norm_topk_prob,
            expert_names=("w1", "w3", "w2"),
            quant_config=quant_config,
            prefix=prefix,
        )
        self.scaling_factor = config.routed_scaling_factor
        self.expert_bias: nn.Parameter | None = None
        if config.use_expert_bias:
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.expert_bias = make_parameter(bias, default_weight_loader)

    def route(self, router_logits: torch.Tensor) -> Routing:
        scores = router_logits.float().sigmoid()
        _, topk_ids = (scores if self.expert_bias is None else scores + self.expert_bias).topk(self.top_k, dim=-1)
        topk_weights = scores.gather(-1, topk_ids)
        if self.renormalize:
            topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-6)
        return topk_weights * self.scaling_factor, topk_ids


class Lfm2MoeDecoderLayer(Lfm2DecoderLayer):
    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        if layer_id >= config.num_dense_layers:
            return Lfm2MoeSparseMoeBlock(config, quant_config, prefix)
        size = config.intermediate_size
        return GatedMLP(config.hidden_size, size, "silu", quant_config=quant_config, prefix=prefix)


class Lfm2MoeForCausalLM(Lfm2ForCausalLM):
    layer_type = Lfm2MoeDecoderLayer
    gguf = GGUFForm(
        "lfm2moe",
        config=GGUF_CONFIG | {"leading_dense_block_count": "num_dense_layers"},
        presence={"blk.{bid}.shortconv.in_proj.bias": "conv_bias", "blk.{bid}.exp_probs_b.bias": "use_expert_bias"},
        adapt=from_gguf,
        changes=GGUF_CHANGES,
    )


EntryClass = Lfm2MoeForCausalLM
