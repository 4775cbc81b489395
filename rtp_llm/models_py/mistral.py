"""Mistral (Jiang et al., 2023): Llama with a sliding window on every layer, and no biases."""

from typing import TYPE_CHECKING

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class MistralAttention(GroupedQueryAttention):
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
            qkv_bias=False,
            o_bias=False,
            sliding_window=config.sliding_window,
            quant_config=quant_config,
            prefix=prefix,
        )


class MistralForCausalLM(LlamaForCausalLM):
    attention_type = MistralAttention


EntryClass = MistralForCausalLM
