"""OLMo 3 (OLMo Team, 2025): OLMo 2 with windows on most layers, and a RoPE per layer type."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rtp_llm.models_py.llama import layer_window
from rtp_llm.models_py.olmo2 import Olmo2Attention, Olmo2ForCausalLM
from rtp_llm.srt.gguf.form import GGUFForm
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


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Stretch positions in the layers without a window only."""
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling", {"rope_type": "default"})
    in_windows = {"rope_type": "default", "rope_theta": metadata.get("olmo2.rope.freq_base_swa", theta)}
    config["rope_parameters"] = {
        "full_attention": scaling | {"rope_theta": theta},
        "sliding_attention": in_windows,
    }


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    attention_type = Olmo3Attention
    gguf = GGUFForm(
        "olmo2",
        adapt=_from_gguf,
        matches=lambda metadata: metadata.get("olmo2.attention.sliding_window", 0) > 0,
    )


EntryClass = Olmo3ForCausalLM
