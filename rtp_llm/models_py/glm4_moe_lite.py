"""GLM-4.7-Flash (Zhipu AI, 2026): DeepSeek-V3 with a list of the layers that have experts."""

from typing import TYPE_CHECKING

from torch import nn

from rtp_llm.models_py.deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3MoE
from rtp_llm.models_py.llama import LlamaDecoderLayer
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import get_rope_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Glm4MoeLiteDecoderLayer(LlamaDecoderLayer):
    """A layer: dense where ``mlp_layer_types`` says so, else with experts."""

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        if config.mlp_layer_types[layer_id] == "sparse":
            return DeepseekV3MoE(config, quant_config, prefix)
        return super().make_mlp(config, layer_id, quant_config, prefix)


class Glm4MoeLiteForCausalLM(DeepseekV3ForCausalLM):
    layer_type: type[nn.Module] = Glm4MoeLiteDecoderLayer

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        _, _, partial_rotary_factor = get_rope_config(config)
        if partial_rotary_factor != 1.0:
            raise ValueError(
                f"partial_rotary_factor={partial_rotary_factor} is not supported for {config.model_type}: "
                "qk_rope_head_dim says what is rotated"
            )
        super().__init__(config, quant_config, prefix)


EntryClass = Glm4MoeLiteForCausalLM
