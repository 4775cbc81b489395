"""Granite 3 MoE (IBM, 2024, 2025): Granite with experts on every layer, and a shared one in some checkpoints."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.granite import GGUF_CONFIG, GraniteDecoderLayer, GraniteForCausalLM
from rtp_llm.srt.gguf.form import PERMUTED, GGUFForm
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


GGUF_MOE_CONFIG = GGUF_CONFIG | {
    "expert_count": "num_local_experts",
    "expert_shared_feed_forward_length": "shared_intermediate_size",
}
GGUF_MOE_NAMES = {
    "blk.{bid}.ffn_gate_exps.weight": "model.layers.{bid}.block_sparse_moe.experts.{part}.gate_proj.weight",
    "blk.{bid}.ffn_up_exps.weight": "model.layers.{bid}.block_sparse_moe.experts.{part}.up_proj.weight",
    "blk.{bid}.ffn_down_exps.weight": "model.layers.{bid}.block_sparse_moe.experts.{part}.down_proj.weight",
    "blk.{bid}.ffn_gate_shexp": "model.layers.{bid}.block_sparse_moe.shared_mlp.gate_proj",
    "blk.{bid}.ffn_up_shexp": "model.layers.{bid}.block_sparse_moe.shared_mlp.up_proj",
    "blk.{bid}.ffn_down_shexp": "model.layers.{bid}.block_sparse_moe.shared_mlp.down_proj",
}


class GraniteMoeForCausalLM(GraniteForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    rename = [
        (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
        (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
        (r"\.block_sparse_moe\.router\.(layer\.)?", ".block_sparse_moe.gate."),
        (r"\.shared_mlp\.input_linear\.", ".block_sparse_moe.shared_mlp.gate_up_proj."),
        (r"\.shared_mlp\.output_linear\.", ".block_sparse_moe.shared_mlp.down_proj."),
    ]
    layer_type = GraniteMoeDecoderLayer
    gguf = GGUFForm(
        "granitemoe",
        config=GGUF_MOE_CONFIG,
        presence={"blk.0.attn_q.bias": "attention_bias"},
        changes=PERMUTED,
        names=GGUF_MOE_NAMES,
    )


class GraniteMoeSharedForCausalLM(GraniteMoeForCausalLM):
    gguf = GGUFForm(
        "granitemoe",
        config=GGUF_MOE_CONFIG,
        presence={"blk.0.attn_q.bias": "attention_bias"},
        changes=PERMUTED,
        names=GGUF_MOE_NAMES,
        matches=lambda metadata: "granitemoe.expert_shared_feed_forward_length" in metadata,
    )


EntryClass = [GraniteMoeForCausalLM, GraniteMoeSharedForCausalLM]
