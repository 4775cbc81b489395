"""Mixtral (Jiang et al., 2024): Mistral with experts in place of its feed-forward blocks."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.models_py.mistral import MistralAttention
from rtp_llm.srt.layers.linear import ReplicatedLinear
from rtp_llm.srt.layers.moe import FusedMoE, softmax_topk
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class MixtralSparseMoeBlock(nn.Module):
    """Experts: the ``num_experts_per_tok`` best of each token, with weights that sum to one."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = ReplicatedLinear(
            config.hidden_size, config.num_local_experts, bias=False, prefix=add_prefix("gate", prefix)
        )
        self.experts = FusedMoE(
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
            activation=config.hidden_act,
            expert_names=("w1", "w3", "w2"),
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.gate(hidden_states)
        topk_weights, topk_ids = softmax_topk(router_logits, self.top_k, renormalize=True)
        return self.experts(hidden_states, topk_weights, topk_ids)


class MixtralDecoderLayer(nn.Module):
    """Attention and experts, each after a norm and added to the residual, which is returned separately."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = MistralAttention,
    ) -> None:
        super().__init__()
        self.self_attn = attention_type(config, layer_id, quant_config, add_prefix("self_attn", prefix))
        self.block_sparse_moe = MixtralSparseMoeBlock(config, quant_config, add_prefix("block_sparse_moe", prefix))
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states, forward_batch)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.block_sparse_moe(hidden_states), residual


class MixtralForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    rename = [(r"\.mlp\.", ".block_sparse_moe.")]  # the name in transformers 5, which may be saved
    attention_type = MistralAttention
    layer_type = MixtralDecoderLayer


EntryClass = MixtralForCausalLM
