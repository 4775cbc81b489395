"""Gemma 3 (Gemma Team, 2025), text: Gemma 2 with normed heads in place of capped scores, and a RoPE per layer type."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rtp_llm.models_py.gemma2 import Gemma2ForCausalLM
from rtp_llm.models_py.llama import NormedHeadsAttention, layer_window
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.norm import GemmaRMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Gemma3Attention(NormedHeadsAttention):
    head_norm_type = GemmaRMSNorm

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        if config.attn_logit_softcapping is not None:
            raise ValueError(
                f"attn_logit_softcapping is {config.attn_logit_softcapping}, but Gemma 3 does not cap attention "
                "scores: set it to null"
            )
        super().__init__(
            config,
            layer_id,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            sliding_window=layer_window(config, layer_id),
            quant_config=quant_config,
            prefix=prefix,
            scaling=config.query_pre_attn_scalar**-0.5,
        )


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Set what a GGUF leaves out: the scale of scores, which of 27B is another, and the windows' layers and base."""
    of_27b = config["num_hidden_layers"] == 62
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if of_27b else metadata["gemma3.attention.key_length"]
    )
    config["rope_local_base_freq"] = metadata.get("gemma3.rope.freq_base_swa", 10_000.0)
    if "sliding_window" not in config:
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    attention_type = Gemma3Attention
    gguf = GGUFForm("gemma3", adapt=_from_gguf, changes=[(r"norm\.weight$", "plus_one")])


EntryClass = Gemma3ForCausalLM
