"""MiniMax-M2 (MiniMax, 2025): norms over all heads at once, partly rotated heads, and experts by sigmoid scores."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaDecoderLayer, LlamaForCausalLM
from rtp_llm.models_py.olmoe import OlmoeHeadsNorm
from rtp_llm.srt.configs.requirements import require
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.moe import Routing, sigmoid_grouped_topk
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import rope_of_layer
from rtp_llm.srt.layers.sparse_moe import SparseMoeBlock
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class MiniMaxM2Attention(GroupedQueryAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        require(config, "use_qk_norm", (True,))
        require(config, "qk_norm_type", ("per_layer",))
        super().__init__(config, layer_id, qkv_bias=False, o_bias=False, quant_config=quant_config, prefix=prefix)
        q_shard, k_shard, _ = self.qkv_proj.shards
        self.q_norm = OlmoeHeadsNorm(q_shard, self.qkv_proj.tp_group, config.rms_norm_eps)
        self.k_norm = OlmoeHeadsNorm(k_shard, self.qkv_proj.tp_group, config.rms_norm_eps)

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return rope_of_layer(config, self.head_dim, layer_id, is_partial=True)

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotate(positions, self.q_norm(q), self.k_norm(k))


class MiniMaxM2SparseMoeBlock(SparseMoeBlock):
    """Experts with the largest sigmoid scores plus a correction; their weights, without it, sum to one."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        require(config, "scoring_func", ("sigmoid",))
        require(config, "shared_intermediate_size", (0,))
        super().__init__(
            config.num_local_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            expert_names=("w1", "w3", "w2"),
            gate_dtype=torch.float32,  # as checkpoints store it
            quant_config=quant_config,
            prefix=prefix,
        )
        self.e_score_correction_bias = make_parameter(
            torch.empty(config.num_local_experts, dtype=torch.float32), default_weight_loader
        )

    def route(self, router_logits: torch.Tensor) -> Routing:
        return sigmoid_grouped_topk(
            router_logits, self.e_score_correction_bias, self.top_k, num_expert_group=1, topk_group=1
        )


class MiniMaxM2DecoderLayer(LlamaDecoderLayer):
    mlp_name = "block_sparse_moe"

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        return MiniMaxM2SparseMoeBlock(config, quant_config, prefix)


class MiniMaxM2ForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    rename = [(r"\.mlp\.", ".block_sparse_moe.")]  # the name in transformers 5, which may be saved
    attention_type = MiniMaxM2Attention
    layer_type = MiniMaxM2DecoderLayer
    gguf = GGUFForm("minimax-m2", config={"expert_count": "num_local_experts", "rope.dimension_count": "rotary_dim"})


EntryClass = MiniMaxM2ForCausalLM
