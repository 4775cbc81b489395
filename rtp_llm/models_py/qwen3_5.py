"""Qwen3.5 (Qwen Team, 2026): the two kinds of attention of Qwen3-Next, with Qwen3-VL's tower, or text alone."""

from typing import TYPE_CHECKING

from torch import nn

from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.models_py.qwen2_vl import Qwen2VLForConditionalGeneration, Qwen2VLModel, make_mrope
from rtp_llm.models_py.qwen3_next import GatedAttention, Qwen3NextDecoderLayer, Qwen3NextModel
from rtp_llm.models_py.qwen3_vl import Qwen3VisionTransformer, Qwen3VLProcessor
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


class Qwen3_5ForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = PACKED_MODULES
    # The language model of a published checkpoint, whose tower is passed over.
    rename = [(r"^model\.language_model\.", "model.")]
    ignore = [r"^model\.visual\."]
    attention_type = Qwen3_5Attention
    layer_type = Qwen3_5DecoderLayer
    base_model_type = Qwen3NextModel


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
