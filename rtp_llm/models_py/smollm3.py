"""SmolLM3 (Hugging Face, 2025): Llama without positions in every fourth layer."""

from typing import TYPE_CHECKING

from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM, layer_window
from rtp_llm.srt.gguf.form import PERMUTED, GGUFForm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import NoPositions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class SmolLM3Attention(GroupedQueryAttention):
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
        """A 1 in ``no_rope_layers`` means that the layer does rotate."""
        return super().make_rope(config, layer_id) if config.no_rope_layers[layer_id] else NoPositions()


class SmolLM3ForCausalLM(LlamaForCausalLM):
    attention_type = SmolLM3Attention
    gguf = GGUFForm("smollm3", presence={"blk.0.attn_q.bias": "attention_bias"}, changes=PERMUTED)


EntryClass = SmolLM3ForCausalLM
