"""Llama whose tokens see those behind them (Llama-Nemotron-Embed, 2025): an embedder, and a reranker."""

from typing import TYPE_CHECKING

from torch import nn

from rtp_llm.models_py.llama import LlamaAttention, LlamaForCausalLM
from rtp_llm.srt.layers.encoder_attention import EncoderAttention
from rtp_llm.srt.layers.pooled_decoder import drop_heads
from rtp_llm.srt.layers.pooler import classifiers, embedders
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

POOLINGS = {"avg": "mean", "cls": "cls", "last": "last"}


class LlamaBidirectionalAttention(LlamaAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, layer_id, quant_config, prefix)
        self.attn = EncoderAttention(
            self.qkv_proj.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            layer_id=layer_id,
            prefix=add_prefix("attn", prefix),
        )


def pooling_of(config: "PretrainedConfig") -> str:
    """Return how the configuration's ``pooling`` is called here.

    Raises:
        ValueError: it is not known.
    """
    if config.pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {list(POOLINGS)}, not {config.pooling!r}")
    return POOLINGS[config.pooling]


class LlamaBidirectionalModel(LlamaForCausalLM):
    generates = False
    attention_type = LlamaBidirectionalAttention

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        drop_heads(self)
        self.poolers = embedders(pooling_of(config), config.hidden_size)


class LlamaBidirectionalForSequenceClassification(LlamaForCausalLM):
    generates = False
    attention_type = LlamaBidirectionalAttention

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        drop_heads(self)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.poolers = classifiers(config, pooling_of(config), self.score)


EntryClass = [LlamaBidirectionalModel, LlamaBidirectionalForSequenceClassification]
