"""Phi-3 and Phi-4 (Microsoft, 2024): Llama with projections that the checkpoint fuses, and partly rotated heads."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import rope_of_layer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Phi3Attention(GroupedQueryAttention):
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

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return rope_of_layer(config, self.head_dim, layer_id, is_partial=True)


def use_window_from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    config["sliding_window"] = config.get("sliding_window") or None  # a GGUF says 0 for none


class Phi3ForCausalLM(LlamaForCausalLM):
    packed_modules_mapping: dict[str, list[str]] = {}  # the checkpoint has qkv_proj and gate_up_proj themselves
    attention_type = Phi3Attention
    gguf = GGUFForm(
        "phi3",
        config={"rope.scaling.original_context_length": "original_max_position_embeddings"},
        adapt=use_window_from_gguf,
    )


EntryClass = Phi3ForCausalLM
