"""Qwen2 and Qwen2.5 (Qwen Team, 2024): Llama with biases on queries, keys and values, and windows on some layers."""

from typing import TYPE_CHECKING

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen2Attention(GroupedQueryAttention):
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
            qkv_bias=True,
            o_bias=False,
            sliding_window=layer_window(config, layer_id),
            quant_config=quant_config,
            prefix=prefix,
        )


def layer_window(config: "PretrainedConfig", layer_id: int) -> int | None:
    """Return the window of a layer, the query's own token included; None: all tokens, also without
    ``use_sliding_window``.

    In a configuration without ``layer_types`` (Qwen3 MoE's) all layers have the window; without the switch
    (Qwen3-VL's) none has.
    """
    if not getattr(config, "use_sliding_window", False):
        return None
    layer_types = getattr(config, "layer_types", None)
    is_sliding = layer_types is None or layer_types[layer_id] == "sliding_attention"
    return config.sliding_window if is_sliding else None


class Qwen2ForCausalLM(LlamaForCausalLM):
    attention_type = Qwen2Attention
    gguf = GGUFForm("qwen2")


EntryClass = Qwen2ForCausalLM
