"""Qwen3 (Qwen Team, 2025): Llama with normed query and key heads, and windows on some layers."""

from typing import TYPE_CHECKING

from rtp_llm.models_py.llama import LlamaForCausalLM, NormedHeadsAttention
from rtp_llm.models_py.qwen2 import layer_window
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen3Attention(NormedHeadsAttention):
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


class Qwen3ForCausalLM(LlamaForCausalLM):
    attention_type = Qwen3Attention
    gguf = GGUFForm("qwen3", presence={"blk.0.attn_q.bias": "attention_bias"})


EntryClass = Qwen3ForCausalLM
