"""Gemma 4 (Google DeepMind, 2026), text: heads of two sizes, shared keys and values, and embeddings for every layer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rtp_llm.models_py.gemma2 import ScaledEmbedding
from rtp_llm.models_py.llama import LlamaForCausalLM, LlamaModel, layer_window
from rtp_llm.models_py.olmo2 import Olmo2RMSNorm
from rtp_llm.srt.configs.requirements import require
from rtp_llm.srt.distributed.parallel_state import divide, get_tp_group
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.linear import (
    ColumnParallelLinear,
    OutputShard,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.moe import FusedMoE, Routing, softmax_topk
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.layers.rotary import rope_of_layer
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch

Gemma4RMSNorm = Olmo2RMSNorm  # all in float32, and rounded once


def norm_without_weight(x: torch.Tensor, eps: float) -> torch.Tensor:
    return nn.functional.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def layer_of_keys(config: "PretrainedConfig", layer_id: int) -> int:
    """Return the layer whose keys and values a layer reads: its own, or, in one of the last ``num_kv_shared_layers``,
    those of the last layer before them of the same type."""
    num_own = config.num_hidden_layers - config.num_kv_shared_layers
    if layer_id < num_own:
        return layer_id
    layer_type = config.layer_types[layer_id]
    owners = [other for other in range(num_own) if config.layer_types[other] == layer_type]
    if not owners:
        raise ValueError(
            f"layer {layer_id} is to read keys of another {layer_type!r} layer, but none of the first {num_own} is one"
        )
    return owners[-1]


def unused_by_shared_layers(config: "PretrainedConfig", path: str) -> list[str]:
    """Return what checkpoints have nevertheless for layers that read another's keys and values: weights of their own.

    ``path``: of the layers' module, as a regular expression.
    """
    num_own = config.num_hidden_layers - config.num_kv_shared_layers
    shared = "|".join(str(layer_id) for layer_id in range(num_own, config.num_hidden_layers))
    return [rf"^{path}\.layers\.({shared})\.self_attn\.[kv]_(proj|norm)\."] if shared else []


class QueryKeyLinear(QKVParallelLinear):
    """Queries and keys in one product, for layers whose values are made of their keys: [..., q_size + kv_size]."""

    shard_ids = ("q", "k")

    def _qkv_shards(self) -> list[OutputShard]:
        return super()._qkv_shards()[:2]


class Gemma4Attention(nn.Module):
    """Attention with normed queries, keys and values, whose scores are not scaled.

    Attributes:
        owns_keys: False: keys and values are another layer's, see ``layer_of_keys``.
        values_are_keys: values are the keys before their norm.
    """

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        require(config, "use_bidirectional_attention", (None, "vision"))  # text sees what is before it
        of_layer, window = config.per_layer_config[layer_id], layer_window(config, layer_id)
        ranks = get_tp_group().world_size
        self.head_dim = of_layer.head_dim
        self.num_heads = divide(config.num_attention_heads, ranks, "number of attention heads")
        self.num_kv_heads = max(1, of_layer.num_key_value_heads // ranks)
        self.owns_keys = layer_of_keys(config, layer_id) == layer_id
        self.values_are_keys = config.attention_k_eq_v and window is None
        self.eps = config.rms_norm_eps
        self._make_projections(config, of_layer.num_key_value_heads, quant_config, prefix)
        self.q_norm = Gemma4RMSNorm(self.head_dim, config.rms_norm_eps)
        if self.owns_keys:
            self.k_norm = Gemma4RMSNorm(self.head_dim, config.rms_norm_eps)
        # Only the kind "proportional" has a part of each head that is not rotated.
        is_partial = config.rope_parameters[config.layer_types[layer_id]]["rope_type"] == "proportional"
        self.rotary_emb = rope_of_layer(config, self.head_dim, layer_id, is_partial=is_partial)
        self.attn = RadixAttention(
            self.num_heads,
            self.head_dim,
            scaling=1.0,
            num_kv_heads=self.num_kv_heads,
            layer_id=layer_of_keys(config, layer_id),
            window=window,
            media_are_causal=window is None,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )

    def _make_projections(
        self, config: "PretrainedConfig", num_kv_heads: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        hidden_size, num_heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.o_proj = RowParallelLinear(
            num_heads * self.head_dim,
            hidden_size,
            bias=bias,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
        )
        if not self.owns_keys:
            self.q_proj = ColumnParallelLinear(
                hidden_size,
                num_heads * self.head_dim,
                bias=bias,
                quant_config=quant_config,
                prefix=add_prefix("q_proj", prefix),
            )
            return
        name, kind = ("qk_proj", QueryKeyLinear) if self.values_are_keys else ("qkv_proj", QKVParallelLinear)
        self.add_module(
            name,
            kind(
                hidden_size,
                self.head_dim,
                num_heads,
                num_kv_heads,
                bias=bias,
                quant_config=quant_config,
                prefix=add_prefix(name, prefix),
            ),
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        q, k, v = self._project(hidden_states)
        q = self.q_norm(q)
        if k is None or v is None:
            q, _ = self.rotary_emb(positions, q, q[:, :1])
        else:
            q, k = self.rotary_emb(positions, q, self.k_norm(k))
            v = norm_without_weight(v, self.eps)
        output, _ = self.o_proj(self.attn(q, k, v, forward_batch))
        return output

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """[T, hidden_size] -> queries, keys and values, [T, heads, head_dim] each; None for those of another layer."""
        if not self.owns_keys:
            q, _ = self.q_proj(hidden_states)
            return q.unflatten(-1, (-1, self.head_dim)), None, None
        if self.values_are_keys:
            qk, _ = self.get_submodule("qk_proj")(hidden_states)
            q, k = qk.unflatten(-1, (-1, self.head_dim)).split([self.num_heads, self.num_kv_heads], dim=1)
            return q, k, k
        qkv, _ = self.get_submodule("qkv_proj")(hidden_states)
        by_head = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = by_head.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return q, k, v


class Gemma4Router(nn.Module):
    """Chooses experts by a softmax; their weights sum to one, and are then multiplied by each expert's factor."""

    def __init__(self, config: "PretrainedConfig", prefix: str = "") -> None:
        super().__init__()
        self.top_k, self.eps = config.top_k_experts, config.rms_norm_eps
        self.proj = ReplicatedLinear(
            config.hidden_size, config.num_experts, bias=False, prefix=add_prefix("proj", prefix)
        )
        self.scale = make_parameter(torch.empty(config.hidden_size), default_weight_loader)
        self.per_expert_scale = make_parameter(torch.empty(config.num_experts), default_weight_loader)

    def forward(self, hidden_states: torch.Tensor) -> Routing:
        scaled = norm_without_weight(hidden_states, self.eps) * self.scale * hidden_states.shape[-1] ** -0.5
        router_logits, _ = self.proj(scaled)
        topk_weights, topk_ids = softmax_topk(router_logits, self.top_k, renormalize=True)
        return topk_weights * self.per_expert_scale[topk_ids].float(), topk_ids


class Gemma4DecoderLayer(nn.Module):
    """Attention and feed-forward, each between two norms and added.

    With experts, these and the dense block read the same hidden states, and have norms of their own. With
    ``hidden_size_per_layer_input``, a gate of the result times the layer's own embedding is added, too.
    """

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = Gemma4Attention,
    ) -> None:
        super().__init__()
        self.norm_args = config.hidden_size, config.rms_norm_eps
        self.self_attn = attention_type(config, layer_id, quant_config, add_prefix("self_attn", prefix))
        is_wide = config.use_double_wide_mlp and layer_of_keys(config, layer_id) != layer_id
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size * (2 if is_wide else 1),
            config.hidden_activation,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
        )
        self.input_layernorm = Gemma4RMSNorm(*self.norm_args)
        self.post_attention_layernorm = Gemma4RMSNorm(*self.norm_args)
        self.pre_feedforward_layernorm = Gemma4RMSNorm(*self.norm_args)
        self.post_feedforward_layernorm = Gemma4RMSNorm(*self.norm_args)
        self.layer_scalar = make_parameter(torch.ones(1), default_weight_loader)
        self.has_experts = config.enable_moe_block
        if self.has_experts:
            self._make_experts(config, quant_config, prefix)
        self.has_embedding = bool(config.hidden_size_per_layer_input)
        if self.has_embedding:
            self._make_embedding_gate(config, quant_config, prefix)

    def _make_experts(self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> None:
        self.router = Gemma4Router(config, add_prefix("router", prefix))
        self.experts = FusedMoE(
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
            activation=config.hidden_activation,
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
        )
        self.post_feedforward_layernorm_1 = Gemma4RMSNorm(*self.norm_args)
        self.pre_feedforward_layernorm_2 = Gemma4RMSNorm(*self.norm_args)
        self.post_feedforward_layernorm_2 = Gemma4RMSNorm(*self.norm_args)

    def _make_embedding_gate(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        hidden_size, size = config.hidden_size, config.hidden_size_per_layer_input
        gate, projection = "per_layer_input_gate", "per_layer_projection"
        self.per_layer_input_gate = ReplicatedLinear(
            hidden_size, size, bias=False, quant_config=quant_config, prefix=add_prefix(gate, prefix)
        )
        self.per_layer_projection = ReplicatedLinear(
            size, hidden_size, bias=False, quant_config=quant_config, prefix=add_prefix(projection, prefix)
        )
        self.post_per_layer_input_norm = Gemma4RMSNorm(*self.norm_args)
        self.act_fn = get_act_fn(config.hidden_activation)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        embedding: torch.Tensor | None,
    ) -> torch.Tensor:
        """``embedding``: [T, hidden_size_per_layer_input], of this layer."""
        attended = self.self_attn(positions, self.input_layernorm(hidden_states), forward_batch)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        hidden_states = hidden_states + self.post_feedforward_layernorm(self._feed(hidden_states))
        if embedding is not None:
            gate, _ = self.per_layer_input_gate(hidden_states)
            projected, _ = self.per_layer_projection(self.act_fn(gate) * embedding)
            hidden_states = hidden_states + self.post_per_layer_input_norm(projected)
        return hidden_states * self.layer_scalar

    def _feed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dense = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        if not self.has_experts:
            return dense
        topk_weights, topk_ids = self.router(hidden_states)
        routed = self.experts(self.pre_feedforward_layernorm_2(hidden_states), topk_weights, topk_ids)
        return self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(routed)


class Gemma4Model(LlamaModel):
    def __init__(
        self,
        config: "PretrainedConfig",
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = Gemma4Attention,
        layer_type: type[nn.Module] = Gemma4DecoderLayer,
    ) -> None:
        super().__init__(config, quant_config, prefix, attention_type, layer_type)
        self.num_layers, self.embedding_size = config.num_hidden_layers, config.hidden_size_per_layer_input
        if not self.embedding_size:
            return
        all_layers, projection = self.num_layers * self.embedding_size, "per_layer_model_projection"
        self.embed_tokens_per_layer = ScaledEmbedding(
            config.vocab_size_per_layer_input,
            all_layers,
            quant_config=quant_config,
            prefix=add_prefix("embed_tokens_per_layer", prefix),
            scale=self.embedding_size**0.5,
        )
        self.per_layer_model_projection = ReplicatedLinear(
            config.hidden_size, all_layers, bias=False, quant_config=quant_config, prefix=add_prefix(projection, prefix)
        )
        self.per_layer_projection_norm = Gemma4RMSNorm(self.embedding_size, config.rms_norm_eps)

    def make_embedding(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str
    ) -> VocabParallelEmbedding:
        return ScaledEmbedding(config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=prefix)

    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return Gemma4RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``token_ids``: [T], whose embeddings all layers have, where ``input_embeds`` are given for the first one."""
        hidden_states = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        embeddings = self.layer_embeddings(input_ids if token_ids is None else token_ids, hidden_states)
        for layer, embedding in zip(self.layers, embeddings, strict=True):
            hidden_states = layer(positions, hidden_states, forward_batch, embedding)
        return self.norm(hidden_states)

    def layer_embeddings(self, input_ids: torch.Tensor, hidden_states: torch.Tensor) -> list[torch.Tensor] | list[None]:
        """Return the embeddings [T, hidden_size_per_layer_input] of each layer: a token's own, plus a projection of the
        embedding [T, hidden_size] that the first layer reads."""
        if not self.embedding_size:
            return [None] * self.num_layers
        shape = (self.num_layers, self.embedding_size)
        projected, _ = self.per_layer_model_projection(hidden_states)
        projected = (projected * hidden_states.shape[-1] ** -0.5).unflatten(-1, shape)
        own = self.embed_tokens_per_layer(input_ids).unflatten(-1, shape)
        return list(((self.per_layer_projection_norm(projected) + own) * 2.0**-0.5).unbind(dim=1))


def _from_gguf(metadata: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Tell layers that see everything from those with a window, by heads and rotations, and shared ones by widths."""
    key_heads, widths = config["num_key_value_heads"], config["intermediate_size"]
    if isinstance(key_heads, list):
        by_kind = dict(zip(config["layer_types"], key_heads, strict=True))
        config["num_key_value_heads"] = by_kind["sliding_attention"]
        config["num_global_key_value_heads"] = by_kind["full_attention"]
        config["attention_k_eq_v"] = True
    if isinstance(widths, list):
        config["intermediate_size"], config["use_double_wide_mlp"] = widths[0], True
    factors = config.pop("rope_scaling")["long_factor"]
    whole = {
        "rope_type": "proportional",
        "partial_rotary_factor": sum(factor == 1 for factor in factors) / len(factors),
        "rope_theta": config.pop("rope_theta"),
    }
    in_windows = {"rope_type": "default", "rope_theta": metadata["gemma4.rope.freq_base_swa"]}
    config["rope_parameters"] = {"full_attention": whole, "sliding_attention": in_windows}
    config["vocab_size_per_layer_input"] = config["vocab_size"]


class Gemma4ForCausalLM(LlamaForCausalLM):
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "qk_proj": ["q_proj", "k_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    attention_type = Gemma4Attention
    layer_type = Gemma4DecoderLayer
    base_model_type = Gemma4Model
    gguf = GGUFForm(
        "gemma4",
        config={
            "attention.key_length": "global_head_dim",
            "attention.key_length_swa": "head_dim",
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            "expert_used_count": "top_k_experts",
            "rope.dimension_count": "global_head_dim",
        },
        presence={"blk.0.ffn_gate_inp.weight": "enable_moe_block"},
        adapt=_from_gguf,
        names={
            "blk.{bid}.layer_output_scale.weight": "model.layers.{bid}.layer_scalar",
            "blk.{bid}.ffn_gate_inp.scale": "model.layers.{bid}.router.scale",
            "blk.{bid}.ffn_down_exps.scale": "model.layers.{bid}.router.per_expert_scale",
        },
    )

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.ignore = unused_by_shared_layers(config, "model")


EntryClass = Gemma4ForCausalLM
