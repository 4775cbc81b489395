"""ERNIE 4.5 (Baidu, 2025), dense: Llama with heads rotated in neighbouring pairs, and one switch for all biases."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaDecoderLayer, LlamaForCausalLM
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import rope_of_layer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Ernie4_5Attention(GroupedQueryAttention):
    rotates_in_float32 = True

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            config, layer_id, qkv_bias=config.use_bias, o_bias=config.use_bias, quant_config=quant_config, prefix=prefix
        )

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return rope_of_layer(config, self.head_dim, layer_id, is_neox_style=False, dtype=torch.float32)


class Ernie4_5DecoderLayer(LlamaDecoderLayer):
    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        return GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=prefix,
            bias=config.use_bias,
        )


class Ernie4_5ForCausalLM(LlamaForCausalLM):
    attention_type: type[nn.Module] = Ernie4_5Attention
    layer_type: type[nn.Module] = Ernie4_5DecoderLayer
    gguf = GGUFForm("ernie4_5", presence={"blk.0.attn_q.bias": "use_bias"})


EntryClass = Ernie4_5ForCausalLM
