"""Falcon (Almazrouei et al., 2023): few key heads, blocks side by side; the first ones bias scores by distance."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.gpt_neox import QKVByHeadAttention
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.alibi import alibi_slopes
from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from rtp_llm.srt.layers.mlp import UngatedMLP
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import NoPositions, rope_of_layer
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class FalconAttention(QKVByHeadAttention):
    """Keys have heads of their own, one for all queries (``multi_query``), or, in the newer form, ``num_kv_heads``."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        if config.new_decoder_architecture:
            num_kv_heads = config.num_kv_heads
        else:
            num_kv_heads = 1 if config.multi_query else config.num_attention_heads
        super().__init__(config, layer_id, config.bias, num_kv_heads, quant_config, prefix)

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return NoPositions() if config.alibi else rope_of_layer(config, self.head_dim, layer_id)

    def make_slopes(self, config: "PretrainedConfig") -> torch.Tensor | None:
        """Slopes are rounded to bfloat16, whatever the model's dtype, and biases are scaled as products are."""
        if not config.alibi:
            return None
        return alibi_slopes(self.query_key_value).bfloat16().float() * self.head_dim**-0.5


class FalconDecoderLayer(nn.Module):
    """Attention and feed-forward side by side, of one norm's output or of one each; or one after the other."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.is_parallel, self.has_two_norms = _form(config)
        self.self_attention = FalconAttention(config, layer_id, quant_config, add_prefix("self_attention", prefix))
        self.mlp = UngatedMLP(
            config.hidden_size,
            config.ffn_hidden_size,
            config.activation,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
            bias=config.bias,
            names=("dense_h_to_4h", "dense_4h_to_h"),
        )
        if self.has_two_norms:
            self.ln_attn = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
            self.ln_mlp = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        else:
            self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        if not self.is_parallel:
            self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        if self.has_two_norms:
            to_attention, to_mlp = self.ln_attn(hidden_states), self.ln_mlp(hidden_states)
        else:
            to_attention = to_mlp = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attention(positions, to_attention, forward_batch)
        if not self.is_parallel:
            to_mlp = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.mlp(to_mlp)


def _form(config: "PretrainedConfig") -> tuple[bool, bool]:
    """Whether blocks stand side by side, and whether each then has a norm of its own."""
    num_norms = config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)
    if config.new_decoder_architecture and not config.parallel_attn:
        raise ValueError("new_decoder_architecture needs parallel_attn: its blocks stand side by side")
    if num_norms not in (1, 2) or (num_norms == 2 and not config.new_decoder_architecture):
        raise ValueError(
            f"num_ln_in_parallel_attn must be 1, or 2 with new_decoder_architecture; got {num_norms} with "
            f"new_decoder_architecture={config.new_decoder_architecture}"
        )
    return config.parallel_attn, num_norms == 2


class FalconModel(nn.Module):
    layer_type: type[nn.Module] = FalconDecoderLayer

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("word_embeddings", prefix),
        )
        self.h = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: self.layer_type(config, idx, quant_config, prefix),
            prefix=add_prefix("h", prefix),
        )
        self.ln_f = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def embed(self, input_ids: torch.Tensor, input_embeds: torch.Tensor | None) -> torch.Tensor:
        return self.word_embeddings(input_ids) if input_embeds is None else input_embeds

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T] ids, or [T, hidden_size] embeddings in their place -> [T, hidden_size] after the last norm."""
        hidden_states = self.embed(input_ids, input_embeds)
        for layer in self.h:
            hidden_states = layer(positions, hidden_states, forward_batch)
        return self.ln_f(hidden_states)


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Set the form of the blocks: the newer one has several key heads, and one norm or two."""
    num_kv_heads, has_two_norms = config["num_kv_heads"], config["new_decoder_architecture"]
    config["multi_query"] = num_kv_heads == 1
    config["new_decoder_architecture"] = has_two_norms or 1 < num_kv_heads < config["num_attention_heads"]
    config["num_ln_in_parallel_attn"] = 2 if has_two_norms else 1


class FalconForCausalLM(nn.Module):
    rename = [(r"^(word_embeddings|h|ln_f)\.", r"transformer.\1.")]  # saved from the base model
    base_model_type: type[FalconModel] = FalconModel
    gguf = GGUFForm(
        "falcon",
        config={
            "attention.head_count_kv": "num_kv_heads",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "feed_forward_length": "ffn_hidden_size",
        },
        presence={"blk.0.attn_qkv.bias": "bias", "blk.0.attn_norm_2.weight": "new_decoder_architecture"},
        adapt=_from_gguf,
        changes=[(r"\.query_key_value\.", "by_head")],
    )

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.transformer = self.base_model_type(config, quant_config, add_prefix("transformer", prefix))
        if config.tie_word_embeddings:
            self.lm_head = self.transformer.word_embeddings
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=add_prefix("lm_head", prefix)
            )
        self.logits_processor = LogitsProcessor(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.word_embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        hidden_states = self.transformer(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)


EntryClass = FalconForCausalLM
