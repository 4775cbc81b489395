"""Command R7B (Cohere, 2024): attention and feed-forward side by side after one norm; only window layers rotate."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM, LlamaModel, layer_window
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.logits_processor import LogitsProcessor
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import NoPositions, rope_of_layer
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class Cohere2Attention(GroupedQueryAttention):
    rotates_in_float32 = True

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

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        if layer_window(config, layer_id) is None:
            return NoPositions()
        return rope_of_layer(config, self.head_dim, layer_id, is_neox_style=False)


class Cohere2DecoderLayer(nn.Module):
    """Attention and feed-forward of one norm's output, added to the residual, which is returned separately."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = Cohere2Attention,
    ) -> None:
        super().__init__()
        self.self_attn = attention_type(config, layer_id, quant_config, add_prefix("self_attn", prefix))
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
        )
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = self.input_layernorm(hidden_states, residual)
        return self.self_attn(positions, normed, forward_batch) + self.mlp(normed), residual


class Cohere2Model(LlamaModel):
    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)


class Cohere2ForCausalLM(LlamaForCausalLM):
    attention_type = Cohere2Attention
    layer_type = Cohere2DecoderLayer
    base_model_type = Cohere2Model
    gguf = GGUFForm("cohere2")

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.logits_processor = LogitsProcessor(config, logit_scale=config.logit_scale)


EntryClass = Cohere2ForCausalLM
