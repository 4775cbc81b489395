"""Qwen3.5-MoE (Qwen Team, 2026): Qwen3.5 with routed experts and a shared one on each layer."""

from typing import TYPE_CHECKING

from torch import nn

from rtp_llm.models_py.qwen2_moe import Qwen2MoeSparseMoeBlock
from rtp_llm.models_py.qwen3_5 import (
    GGUF_CHANGES,
    Qwen3_5DecoderLayer,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5Model,
    Qwen3_5Processor,
    from_gguf,
)
from rtp_llm.models_py.qwen3_next import DELTA_GGUF_CONFIG, DELTA_GGUF_NAMES, DELTA_GGUF_PRESENCE
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen3_5MoeSparseMoeBlock(Qwen2MoeSparseMoeBlock):
    """Routed experts, whose weights always sum to one for a token, plus a shared expert times its gate."""

    always_renormalizes = True


class Qwen3_5MoeDecoderLayer(Qwen3_5DecoderLayer):
    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        return Qwen3_5MoeSparseMoeBlock(config, quant_config, prefix)


class Qwen3_5MoeForCausalLM(Qwen3_5ForCausalLM):
    layer_type = Qwen3_5MoeDecoderLayer
    gguf = GGUFForm(
        "qwen35moe",
        config=DELTA_GGUF_CONFIG,
        defaults={"model_type": "qwen3_5_moe_text"},
        presence=DELTA_GGUF_PRESENCE,
        adapt=from_gguf,
        changes=GGUF_CHANGES,
        names=DELTA_GGUF_NAMES,
    )


class Qwen3_5MoeModel(Qwen3_5Model):
    layer_type = Qwen3_5MoeDecoderLayer


class Qwen3_5MoeForConditionalGeneration(Qwen3_5ForConditionalGeneration):
    model_type = Qwen3_5MoeModel


class Qwen3_5MoeProcessor(Qwen3_5Processor):
    models = [Qwen3_5MoeForConditionalGeneration]


EntryClass = [Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration]
