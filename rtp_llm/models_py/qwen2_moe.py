"""Qwen1.5-MoE and Qwen2-MoE (Qwen Team, 2024): Qwen2 with routed experts and a shared one on most layers."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaDecoderLayer, LlamaForCausalLM
from rtp_llm.models_py.qwen2 import layer_window
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.linear import ReplicatedLinear
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.sparse_moe import SparseMoeBlock
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen2MoeAttention(GroupedQueryAttention):
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
            qkv_bias=config.qkv_bias,
            o_bias=False,
            sliding_window=layer_window(config, layer_id),
            quant_config=quant_config,
            prefix=prefix,
        )


class QwenSparseMoeBlock(SparseMoeBlock):
    """Experts: the ``num_experts_per_tok`` best of each token; with ``norm_topk_prob`` their weights sum to one.

    ``always_renormalizes``: they do whatever the configuration says.
    """

    always_renormalizes = False

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_intermediate_size,
            config.hidden_act,
            renormalize=self.always_renormalizes or config.norm_topk_prob,
            quant_config=quant_config,
            prefix=prefix,
        )


class Qwen2MoeSparseMoeBlock(QwenSparseMoeBlock):
    """Routed experts, plus a shared expert for all tokens, times its gate."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.shared_expert = GatedMLP(
            config.hidden_size,
            config.shared_expert_intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("shared_expert", prefix),
        )
        self.shared_expert_gate = ReplicatedLinear(
            config.hidden_size, 1, bias=False, prefix=add_prefix("shared_expert_gate", prefix)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, _ = self.shared_expert_gate(hidden_states)
        return super().forward(hidden_states) + gate.sigmoid() * self.shared_expert(hidden_states)


class QwenMoeDecoderLayer(LlamaDecoderLayer):
    """A layer: every ``decoder_sparse_step``-th that is not in ``mlp_only_layers`` has experts; others are dense."""

    moe_type: type[nn.Module] = QwenSparseMoeBlock

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        if has_experts(config, layer_id):
            return self.moe_type(config, quant_config, prefix)
        return super().make_mlp(config, layer_id, quant_config, prefix)


def has_experts(config: "PretrainedConfig", layer_id: int) -> bool:
    is_its_turn = (layer_id + 1) % config.decoder_sparse_step == 0
    return config.num_experts > 0 and is_its_turn and layer_id not in config.mlp_only_layers


class Qwen2MoeDecoderLayer(QwenMoeDecoderLayer):
    moe_type = Qwen2MoeSparseMoeBlock


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    attention_type = Qwen2MoeAttention
    layer_type = Qwen2MoeDecoderLayer
    gguf = GGUFForm("qwen2moe", presence={"blk.0.attn_q.bias": "qkv_bias"})


EntryClass = Qwen2MoeForCausalLM
