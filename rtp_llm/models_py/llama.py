"""Llama (Touvron et al., 2023; Llama 3, 2024), and the blocks that models of its form share."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.gguf.form import PERMUTED, GGUFForm
from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.srt.layers.encoder_attention import EncoderAttention, encoder_window, sees_both_ways
from rtp_llm.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.norm import Norm, RMSNorm
from rtp_llm.srt.layers.normed_heads import norm_and_rotate
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.layers.rotary import rope_of_layer
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with rotary positions; several query heads share a key/value head (Ainslie et al., 2023).

    Args:
        sliding_window: tokens that a token sees, itself included; None: all up to it.
        scaling: factor of the scores; None: ``head_dim ** -0.5``.
        logit_cap: c > 0 replaces each score s by ``c * tanh(s / c)``.
        chunk_size: tokens in a chunk of the sequence, of which a token sees its own; None: it is not cut.

    Attributes:
        rotates_in_float32: whether queries and keys are rotated in float32 and rounded once.
        qkv_type: of the projection to queries, keys and values; others are stored in another order.
    """

    rotates_in_float32 = False
    qkv_type: type[QKVParallelLinear] = QKVParallelLinear

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        qkv_bias: bool,
        o_bias: bool,
        sliding_window: int | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        scaling: float | None = None,
        logit_cap: float = 0.0,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(
                f"sliding_window must be a positive number of tokens, or null for none; not {sliding_window}"
            )
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.qkv_proj = self.qkv_type(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=qkv_bias,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.q_size, self.kv_size = self.qkv_proj.q_size, self.qkv_proj.kv_size
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=o_bias,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
        )
        self.rotary_emb = self.make_rope(config, layer_id)
        attn_type: type[nn.Module] = RadixAttention
        if sees_both_ways(config):
            attn_type, sliding_window = EncoderAttention, encoder_window(config, sliding_window)
        self.attn = attn_type(
            self.qkv_proj.num_heads,
            self.head_dim,
            self.head_dim**-0.5 if scaling is None else scaling,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            layer_id=layer_id,
            logit_cap=logit_cap,
            window=sliding_window,
            attention_chunk_size=chunk_size,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        """Return the rotation of whole heads. A model that uses ``partial_rotary_factor`` overrides this."""
        return rope_of_layer(config, self.head_dim, layer_id)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.prepare_queries_and_keys(positions, q, k)
        v = self.prepare_values(v, hidden_states)
        output, _ = self.o_proj(self.attn(q, k, v, forward_batch))
        return output

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform queries [T, q_size] and keys [T, kv_size] between projection and attention: rotate them."""
        return self.rotate(positions, q, k)

    def prepare_values(self, v: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Transform values [T, kv_size] between projection and attention: they stay as they are.

        ``hidden_states``: [T, hidden_size], of which they were made.
        """
        return v

    def rotate(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.rotates_in_float32:
            return self.rotary_emb(positions, q, k)
        rotated_q, rotated_k = self.rotary_emb(positions, q.float(), k.float())
        return rotated_q.to(q.dtype), rotated_k.to(k.dtype)


class NormedHeadsAttention(GroupedQueryAttention):
    """Attention whose query and key heads are normed, each by itself, before they are rotated."""

    head_norm_type: type[Norm] = RMSNorm
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        qkv_bias: bool,
        o_bias: bool,
        sliding_window: int | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        scaling: float | None = None,
    ) -> None:
        super().__init__(config, layer_id, qkv_bias, o_bias, sliding_window, quant_config, prefix, scaling)
        self.q_norm = self.head_norm_type(self.head_dim, config.rms_norm_eps)
        self.k_norm = self.head_norm_type(self.head_dim, config.rms_norm_eps)

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = q.unflatten(-1, (-1, self.head_dim)), k.unflatten(-1, (-1, self.head_dim))
        if self.rotates_in_float32:
            return self.rotate(positions, self.q_norm(q), self.k_norm(k))
        return norm_and_rotate(self.q_norm, self.k_norm, self.rotary_emb, positions, q, k)


def layer_window(config: "PretrainedConfig", layer_id: int) -> int | None:
    """Return the window of a layer by its type, the query's own token included; None: all tokens."""
    layer_type = config.layer_types[layer_id]
    if layer_type == "full_attention":
        return None
    if layer_type != "sliding_attention":
        raise ValueError(f"layer_types[{layer_id}] must be 'full_attention' or 'sliding_attention', not {layer_type!r}")
    if config.sliding_window is None:
        raise ValueError(f"layer_types[{layer_id}] is 'sliding_attention', but sliding_window is null")
    return config.sliding_window


class LlamaAttention(GroupedQueryAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            config,
            layer_id,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            quant_config=quant_config,
            prefix=prefix,
        )


class LlamaDecoderLayer(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual, which is returned separately.

    Attributes:
        mlp_name: of the feed-forward block, as in the checkpoint.
    """

    mlp_name = "mlp"
    self_attn: nn.Module

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = LlamaAttention,
    ) -> None:
        super().__init__()
        self.mixer_name, mixer = self.make_mixer(config, layer_id, quant_config, prefix, attention_type)
        self.add_module(self.mixer_name, mixer)
        mlp = self.make_mlp(config, layer_id, quant_config, add_prefix(self.mlp_name, prefix))
        self.add_module(self.mlp_name, mlp)
        self.input_layernorm = self.make_norm(config)
        self.post_attention_layernorm = self.make_norm(config)

    def make_mixer(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        attention_type: type[nn.Module],
    ) -> tuple[str, nn.Module]:
        """Make the block by which tokens see others, with its name in the checkpoint: attention.

        A model with other blocks on some layers overrides this; they are called as attention is. ``prefix``: the
        layer's.
        """
        return "self_attn", attention_type(config, layer_id, quant_config, add_prefix("self_attn", prefix))

    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        """Make the norm before a block."""
        return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def make_mlp(
        self, config: "PretrainedConfig", layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> nn.Module:
        """Make the dense feed-forward block; a model with experts overrides this."""
        return GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=prefix,
            bias=getattr(config, "mlp_bias", False),
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.get_submodule(self.mixer_name)(positions, hidden_states, forward_batch)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.feed(hidden_states), residual

    def feed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the feed-forward block."""
        return self.get_submodule(self.mlp_name)(hidden_states)


class LlamaModel(nn.Module):
    def __init__(
        self,
        config: "PretrainedConfig",
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = LlamaAttention,
        layer_type: type[nn.Module] = LlamaDecoderLayer,
    ) -> None:
        super().__init__()
        self.embed_tokens = self.make_embedding(config, quant_config, add_prefix("embed_tokens", prefix))
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: layer_type(config, idx, quant_config, prefix, attention_type),
            prefix=add_prefix("layers", prefix),
        )
        self.norm = self.make_norm(config)

    def make_embedding(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str
    ) -> VocabParallelEmbedding:
        return VocabParallelEmbedding(config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=prefix)

    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        """Make the last norm."""
        return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T] ids, or [T, hidden_size] embeddings in their place -> [T, hidden_size] after the last norm."""
        hidden_states = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, forward_batch, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class LlamaForCausalLM(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    attention_type: type[nn.Module] = LlamaAttention
    layer_type: type[nn.Module] = LlamaDecoderLayer
    base_model_type: type[nn.Module] = LlamaModel
    gguf: GGUFForm | tuple[GGUFForm, ...] = GGUFForm(
        "llama",
        presence={"blk.0.attn_q.bias": "attention_bias", "blk.0.ffn_gate.bias": "mlp_bias"},
        changes=PERMUTED,
    )

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.model = self.base_model_type(
            config, quant_config, add_prefix("model", prefix), self.attention_type, self.layer_type
        )
        self.lm_head = self.make_head(config, quant_config, add_prefix("lm_head", prefix))
        self.logits_processor = LogitsProcessor(config)

    def make_head(self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> nn.Module:
        """Make the head. One with a bias is no embedding, which has none: its weight is a copy if they are tied."""
        bias = self.has_head_bias(config)
        if config.tie_word_embeddings and not bias:
            return self.model.get_submodule("embed_tokens")
        if config.tie_word_embeddings:
            self.weight_defaults = {"lm_head.weight": "model.embed_tokens.weight"}
        return ParallelLMHead(
            config.vocab_size, config.hidden_size, bias=bias, quant_config=quant_config, prefix=prefix
        )

    def has_head_bias(self, config: "PretrainedConfig") -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_submodule("embed_tokens")

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        hidden_states = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)


EntryClass = LlamaForCausalLM
