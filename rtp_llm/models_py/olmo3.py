"""OLMo 3 (OLMo Team, 2025): OLMo 2 with windows on most layers, and a RoPE per layer type."""

from typing import TYPE_CHECKING

from rtp_llm.models_py.llama import layer_window
from rtp_llm.models_py.olmo2 import Olmo2Attention, Olmo2ForCausalLM
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Olmo3Attention(Olmo2Attention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, layer_id, quant_config, prefix, sliding_window=layer_window(config, layer_id))


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    attention_type = Olmo3Attention


EntryClass = Olmo3ForCausalLM
