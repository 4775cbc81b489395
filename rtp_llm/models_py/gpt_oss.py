"""gpt-oss (OpenAI, 2025): experts on every layer, attention sinks, and windows on every other layer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaDecoderLayer, LlamaForCausalLM, layer_window
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.activation import SwigluOAIAndMul
from rtp_llm.srt.layers.linear import ReplicatedLinear
from rtp_llm.srt.layers.moe import FusedMoE, topk_softmax
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.weights import ShardId, load_part, make_parameter, refuse_shard
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class GptOssAttention(GroupedQueryAttention):
    """Attention with ``sinks`` [heads of this rank]: scores in the softmax that have no value (Xiao et al., 2023)."""

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
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            sliding_window=layer_window(config, layer_id),
            quant_config=quant_config,
            prefix=prefix,
        )
        self.sinks = make_parameter(torch.empty(self.qkv_proj.num_heads), self.load_sinks)

    def load_sinks(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        refuse_shard(shard_id, "sinks")
        group = self.qkv_proj.tp_group
        load_part(param.data, tensor, 0, group.rank, group.world_size, "sinks")

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.prepare_queries_and_keys(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v, forward_batch, sinks=self.sinks))
        return output


class GptOssMLP(nn.Module):
    """Experts: the ``num_experts_per_tok`` best of each token, weighted by a softmax over their logits alone."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router = ReplicatedLinear(
            config.hidden_size, config.num_local_experts, prefix=add_prefix("router", prefix)
        )
        self.experts = FusedMoE(
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
            activation=SwigluOAIAndMul(alpha=config.swiglu_alpha, limit=config.swiglu_limit),
            bias=True,
            is_transposed=True,
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.router(hidden_states)
        topk_weights, topk_ids = topk_softmax(router_logits, self.top_k)
        return self.experts(hidden_states, topk_weights, topk_ids)


class GptOssDecoderLayer(LlamaDecoderLayer):
    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        return GptOssMLP(config, quant_config, prefix)


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    if "rope_scaling" in config:
        config["rope_scaling"]["truncate"] = False  # of YaRN, which no key says


class GptOssForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    attention_type = GptOssAttention
    layer_type = GptOssDecoderLayer
    gguf = GGUFForm(
        "gpt-oss",
        config={"expert_count": "num_local_experts"},
        presence={"blk.0.attn_q.bias": "attention_bias"},
        adapt=_from_gguf,
        names={"blk.{bid}.attn_sinks.weight": "model.layers.{bid}.self_attn.sinks"},
    )


EntryClass = GptOssForCausalLM
