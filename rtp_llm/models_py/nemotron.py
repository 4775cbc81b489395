"""Nemotron-4 (NVIDIA, 2024): Llama with layer norms around one, partly rotated heads, squared ReLU and no gate."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.mlp import UngatedMLP
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import rope_of_layer
from rtp_llm.srt.layers.weights import ShardId, default_weight_loader, make_parameter

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class LayerNorm1P(LayerNorm):
    """Layer norm whose checkpoint has weights less one (LayerNorm1P); one is added when they are loaded."""

    def __init__(self, config: "PretrainedConfig") -> None:
        super().__init__(config.hidden_size, eps=config.norm_eps)
        self.weight = make_parameter(torch.ones(config.hidden_size), self.weight_loader)

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        default_weight_loader(param, tensor.to(param.dtype) + 1, shard_id)


class NemotronAttention(GroupedQueryAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        bias = config.attention_bias
        super().__init__(config, layer_id, qkv_bias=bias, o_bias=bias, quant_config=quant_config, prefix=prefix)

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return rope_of_layer(config, self.head_dim, layer_id, is_partial=True)


class NemotronDecoderLayer(LlamaDecoderLayer):
    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return LayerNorm1P(config)

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        sizes = config.hidden_size, config.intermediate_size
        return UngatedMLP(*sizes, config.hidden_act, quant_config, prefix, bias=config.mlp_bias)


class NemotronModel(LlamaModel):
    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return LayerNorm1P(config)


class NemotronForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    attention_type = NemotronAttention
    layer_type = NemotronDecoderLayer
    base_model_type = NemotronModel
    gguf = GGUFForm(
        "nemotron",
        config={"attention.layer_norm_epsilon": "norm_eps"},
        defaults={"partial_rotary_factor": 1.0},
        changes=[(r"norm\.weight$", "plus_one")],
    )


EntryClass = NemotronForCausalLM
