"""Granite 3 MoE (IBM, 2024, 2025): Granite with experts on every layer, and a shared one in some checkpoints."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.granite import GraniteDecoderLayer, GraniteForCausalLM
from rtp_llm.srt.layers.moe import Routing, topk_softmax
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.sparse_moe import SparseMoeBlock

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class GraniteMoeBlock(SparseMoeBlock):
    """Experts whose weights are a softmax over the chosen logits; with ``shared_intermediate_size`` one for all."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(
            config.num_local_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            shared=("shared_mlp", getattr(config, "shared_intermediate_size", 0)),
            quant_config=quant_config,
            prefix=prefix,
        )

    def route(self, router_logits: torch.Tensor) -> Routing:
        return topk_softmax(router_logits, self.top_k)


class GraniteMoeDecoderLayer(GraniteDecoderLayer):
    mlp_name = "block_sparse_moe"

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        return GraniteMoeBlock(config, quant_config, prefix)


class GraniteMoeForCausalLM(GraniteForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    rename = [
        (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
        (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
        (r"\.block_sparse_moe\.router\.(layer\.)?", ".block_sparse_moe.gate."),
        (r"\.shared_mlp\.input_linear\.", ".block_sparse_moe.shared_mlp.gate_up_proj."),
        (r"\.shared_mlp\.output_linear\.", ".block_sparse_moe.shared_mlp.down_proj."),
    ]
    layer_type = GraniteMoeDecoderLayer


class GraniteMoeSharedForCausalLM(GraniteMoeForCausalLM):
    pass


EntryClass = [GraniteMoeForCausalLM, GraniteMoeSharedForCausalLM]
