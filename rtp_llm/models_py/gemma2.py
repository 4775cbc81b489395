"""Gemma 2 (Gemma Team, 2024): norms before and after each block, capped scores and logits, windows on some layers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM, LlamaModel, layer_window
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.norm import GemmaRMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class ScaledEmbedding(VocabParallelEmbedding):
    """Token embeddings times a factor, ``sqrt(hidden_size)``, which is rounded to the embeddings' dtype first."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        scale: float | None = None,
    ) -> None:
        super().__init__(vocab_size, hidden_size, quant_config=quant_config, prefix=prefix)
        self.scale = torch.tensor(hidden_size**0.5 if scale is None else scale, dtype=self.params_dtype).item()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.scale


class Gemma2Attention(GroupedQueryAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        refuse_bidirectional_attention(config)
        super().__init__(
            config,
            layer_id,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            sliding_window=layer_window(config, layer_id),
            quant_config=quant_config,
            prefix=prefix,
            scaling=config.query_pre_attn_scalar**-0.5,
            logit_cap=config.attn_logit_softcapping or 0.0,
        )


def refuse_bidirectional_attention(config: "PretrainedConfig") -> None:
    if getattr(config, "use_bidirectional_attention", None):
        raise ValueError(
            "use_bidirectional_attention is set, as for embedding models; only causal attention is supported"
        )


class Gemma2DecoderLayer(nn.Module):
    """Attention and feed-forward, each between two norms and added to the residual, which is returned separately."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = Gemma2Attention,
    ) -> None:
        super().__init__()
        self.self_attn = attention_type(config, layer_id, quant_config, add_prefix("self_attn", prefix))
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_activation,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
        )
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states, forward_batch)
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states, residual = self.pre_feedforward_layernorm(hidden_states, residual)
        return self.post_feedforward_layernorm(self.mlp(hidden_states)), residual


class Gemma2Model(LlamaModel):
    def make_embedding(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str
    ) -> VocabParallelEmbedding:
        return ScaledEmbedding(config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=prefix)

    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Set the scale of scores, which a GGUF leaves out; that of 27B is another."""
    of_27b = config["num_hidden_layers"] == 46
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if of_27b else metadata["gemma2.attention.key_length"]
    )


class Gemma2ForCausalLM(LlamaForCausalLM):
    attention_type: type[nn.Module] = Gemma2Attention
    layer_type = Gemma2DecoderLayer
    base_model_type = Gemma2Model
    gguf = GGUFForm("gemma2", adapt=_from_gguf, changes=[(r"norm\.weight$", "plus_one")])


EntryClass = Gemma2ForCausalLM
