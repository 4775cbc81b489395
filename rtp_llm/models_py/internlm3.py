"""InternLM3 (Shanghai AI Laboratory, 2025): Llama with a switch for the biases of queries, keys and values alone."""

from typing import TYPE_CHECKING

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class InternLM3Attention(GroupedQueryAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            config, layer_id, qkv_bias=config.qkv_bias, o_bias=config.bias, quant_config=quant_config, prefix=prefix
        )


class InternLM3ForCausalLM(LlamaForCausalLM):
    attention_type = InternLM3Attention


EntryClass = InternLM3ForCausalLM
