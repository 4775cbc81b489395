"""Qwen3.5 (Qwen Team, 2026): the two kinds of attention of Qwen3-Next, with Qwen3-VL's tower, or text alone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.models_py.qwen2_vl import Qwen2VLForConditionalGeneration, Qwen2VLModel, make_mrope
from rtp_llm.models_py.qwen3_next import (
    DELTA_GGUF_CHANGES,
    DELTA_GGUF_CONFIG,
    DELTA_GGUF_NAMES,
    DELTA_GGUF_PRESENCE,
    GatedAttention,
    Qwen3NextDecoderLayer,
    Qwen3NextModel,
    delta_from_gguf,
)
from rtp_llm.models_py.qwen3_vl import Qwen3VisionTransformer, Qwen3VLProcessor
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PACKED_MODULES = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "in_proj_ba": ["in_proj_b", "in_proj_a"],
}


class Qwen3_5Attention(GatedAttention):
    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return make_mrope(config, self.head_dim, (11, 11, 10), interleaved=True, is_partial=True)


class Qwen3_5DecoderLayer(Qwen3NextDecoderLayer):
    has_grouped_projections = False

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        return GatedMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, quant_config=quant_config, prefix=prefix
        )


GGUF_CHANGES = (
    *DELTA_GGUF_CHANGES,
    (r"\.linear_attn\.(in_proj_[zab]\.weight|A_log|dt_bias)$", "tiled_heads"),
    (r"\.linear_attn\.(in_proj_qkv|conv1d)\.weight$", "tiled_values"),
    (r"\.linear_attn\.out_proj\.weight$", "tiled_inputs"),
)


def from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """As of Qwen3-Next, and set how features are shared by time, row and column."""
    delta_from_gguf(metadata, config)
    sections = metadata[f"{metadata['general.architecture']}.rope.dimension_sections"]
    names = ("rope_theta", "partial_rotary_factor")
    config["rope_parameters"] = {name: config.pop(name) for name in names} | {
        "rope_type": "default",
        "mrope_section": sections[:3],
        "mrope_interleaved": True,
    }


class Qwen3_5ForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = PACKED_MODULES
    # The language model of a published checkpoint, whose tower is passed over.
    rename = [(r"^model\.language_model\.", "model.")]
    ignore = [r"^model\.visual\."]
    attention_type = Qwen3_5Attention
    layer_type = Qwen3_5DecoderLayer
    base_model_type = Qwen3NextModel
    gguf = GGUFForm(
        "qwen35",
        config=DELTA_GGUF_CONFIG,
        defaults={"model_type": "qwen3_5_text"},
        presence=DELTA_GGUF_PRESENCE,
        adapt=from_gguf,
        changes=GGUF_CHANGES,
        names=DELTA_GGUF_NAMES,
    )


class Qwen3_5Model(Qwen2VLModel):
    vision_type = Qwen3VisionTransformer
    language_type = Qwen3NextModel
    attention_type = Qwen3_5Attention
    layer_type = Qwen3_5DecoderLayer


class Qwen3_5ForConditionalGeneration(Qwen2VLForConditionalGeneration):
    packed_modules_mapping = PACKED_MODULES
    model_type = Qwen3_5Model


class Qwen3_5Processor(Qwen3VLProcessor):
    models = [Qwen3_5ForConditionalGeneration]


EntryClass = [Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration]
