"""EXAONE 4.0 (LG AI Research, 2025): norms after the blocks, normed heads, and positions only in windows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from rtp_llm.models_py.llama import LlamaForCausalLM, NormedHeadsAttention, layer_window
from rtp_llm.models_py.olmo2 import Olmo2DecoderLayer
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import NoPositions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Exaone4Attention(NormedHeadsAttention):
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
            sliding_window=layer_window(config, layer_id),
            quant_config=quant_config,
            prefix=prefix,
        )

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        """Layers that see everything have no positions, in a model that has windows on others."""
        if config.sliding_window is not None and layer_window(config, layer_id) is None:
            return NoPositions()
        return super().make_rope(config, layer_id)


class Exaone4DecoderLayer(Olmo2DecoderLayer):
    norm_type = RMSNorm


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    if config.setdefault("sliding_window", None) is None:
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]


class Exaone4ForCausalLM(LlamaForCausalLM):
    attention_type = Exaone4Attention
    layer_type = Exaone4DecoderLayer
    gguf = GGUFForm("exaone4", adapt=_from_gguf)


EntryClass = Exaone4ForCausalLM
