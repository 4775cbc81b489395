"""Plain models of architectures that transformers has no class for, written from the format of their checkpoints.

They compute a sequence anew for each token, and share nothing with the package.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"

    def __init__(
        self,
        vocab_size: int = 99,
        hidden_size: int = 64,
        intermediate_size: int = 96,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        max_position_embeddings: int = 512,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        hidden_act: str = "silu",
        bias: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.max_position_embeddings = num_key_value_heads, max_position_embeddings
        self.rope_theta, self.rms_norm_eps, self.hidden_act, self.bias = rope_theta, rms_norm_eps, hidden_act, bias


class BailingMoeConfig(InternLM2Config):
    model_type = "bailing_moe"

    def __init__(
        self,
        head_dim: int = 16,
        use_qkv_bias: bool = False,
        use_qk_norm: bool = False,
        num_experts: int = 4,
        num_experts_per_tok: int = 2,
        num_shared_experts: int = 1,
        moe_intermediate_size: int = 32,
        norm_topk_prob: bool = True,
        first_k_dense_replace: int = 1,
        partial_rotary_factor: float = 1.0,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.head_dim, self.use_qkv_bias, self.use_qk_norm = head_dim, use_qkv_bias, use_qk_norm
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.num_shared_experts, self.moe_intermediate_size = num_shared_experts, moe_intermediate_size
        self.norm_topk_prob, self.first_k_dense_replace = norm_topk_prob, first_k_dense_replace
        self.partial_rotary_factor = partial_rotary_factor


class BailingMoeV2Config(BailingMoeConfig):
    def __init__(
        self, n_group: int = 1, topk_group: int = 1, routed_scaling_factor: float = 1.0, **others: Any
    ) -> None:
        super().__init__(**others)
        self.n_group, self.topk_group, self.routed_scaling_factor = n_group, topk_group, routed_scaling_factor
        self.score_function, self.moe_router_enable_expert_bias = "sigmoid", True


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of [T, heads, head_dim], where several queries share a key -> [T, heads * head_dim]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1), v).flatten(1)


def rotate(x: torch.Tensor, base: float, part: float = 1.0) -> torch.Tensor:
    """[T, heads, head_dim]: pairs (i, i + half) of the first components turn by their positions."""
    size = int(x.shape[-1] * part)
    angles = torch.arange(len(x))[:, None] / base ** (torch.arange(0, size, 2) / size)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :size].chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., size:]), -1)


class InternLM2Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.head_dim = config, config.hidden_size // config.num_attention_heads
        rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, rows, bias=config.bias)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # By key heads: the queries of one, its key, its value, then the next.
        groups = self.wqkv(x).unflatten(-1, (self.config.num_key_value_heads, -1, self.head_dim))
        q, k, v = groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]
        base = self.config.rope_theta
        return self.wo(attend(rotate(q, base), rotate(k, base), v))


class InternLM2MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class InternLM2Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention, self.feed_forward = InternLM2Attention(config), InternLM2MLP(config)
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class InternLM2Model(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([InternLM2Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class PlainForCausalLM(PreTrainedModel, GenerationMixin):
    """One sequence at a time, without a cache. A subclass makes ``model`` and names its embedding and its head."""

    _tied_weights_keys: dict[str, str] = {}
    embedding_name = "model.word_embeddings"
    head_name = "lm_head"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.make_model(config)
        self.add_module(self.head_name, nn.Linear(config.hidden_size, config.vocab_size, bias=False))
        self.post_init()

    def make_model(self, config: Any) -> nn.Module:
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self.embedding_name)

    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule(self.head_name)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids}  # all of them for each token

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        assert len(input_ids) == 1
        return CausalLMOutput(logits=self.get_output_embeddings()(self.model(input_ids[0]))[None])


class InternLM2ForCausalLM(PlainForCausalLM):
    config_class = InternLM2Config
    embedding_name = "model.tok_embeddings"
    head_name = "output"

    def make_model(self, config: Any) -> nn.Module:
        return InternLM2Model(config)


class BailingAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        rows = (self.num_heads + 2 * self.num_kv_heads) * config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=config.use_qkv_bias)
        self.dense = nn.Linear(self.num_heads * config.head_dim, config.hidden_size, bias=False)
        if config.use_qk_norm:
            self.query_layernorm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
            self.key_layernorm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.query_key_value(x).unflatten(-1, (-1, self.config.head_dim))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 1)
        if self.config.use_qk_norm:
            q, k = self.query_layernorm(q), self.key_layernorm(k)
        base, part = self.config.rope_theta, self.config.partial_rotary_factor
        return self.dense(attend(rotate(q, base, part), rotate(k, base, part), v))


class BailingMLP(nn.Module):
    def __init__(self, config: Any, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BailingGate(nn.Module):
    """[T, hidden_size] -> weights of all experts [T, num_experts], zero of those that were not chosen."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = F.linear(x, self.weight).softmax(-1)
        return self.normed(scores * self.chosen(scores))

    def chosen(self, choice: torch.Tensor) -> torch.Tensor:
        ids = choice.topk(self.config.num_experts_per_tok, -1).indices
        return torch.zeros_like(choice).scatter(-1, ids, 1.0)

    def normed(self, weights: torch.Tensor) -> torch.Tensor:
        return weights / weights.sum(-1, keepdim=True) if self.config.norm_topk_prob else weights


class BailingV2Gate(BailingGate):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.expert_bias = nn.Parameter(torch.empty(config.num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = F.linear(x, self.weight).sigmoid()
        by_group = (scores + self.expert_bias).unflatten(-1, (self.config.n_group, -1))
        group_scores = by_group.topk(2, -1).values.sum(-1)
        best = torch.zeros_like(group_scores).scatter(-1, group_scores.topk(self.config.topk_group, -1).indices, 1.0)
        choice = by_group.masked_fill(best[..., None] == 0, float("-inf")).flatten(-2)
        return self.normed(scores * self.chosen(choice)) * self.config.routed_scaling_factor


class BailingMoe(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        size = config.moe_intermediate_size
        self.gate = BailingV2Gate(config) if hasattr(config, "score_function") else BailingGate(config)
        self.experts = nn.ModuleList([BailingMLP(config, size) for _ in range(config.num_experts)])
        if config.num_shared_experts:
            self.shared_experts = BailingMLP(config, size * config.num_shared_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x)
        routed = sum(weights[:, i, None] * expert(x) for i, expert in enumerate(self.experts))
        return routed + self.shared_experts(x) if hasattr(self, "shared_experts") else routed


class BailingLayer(nn.Module):
    def __init__(self, config: Any, layer_id: int) -> None:
        super().__init__()
        self.attention = BailingAttention(config)
        is_dense = layer_id < config.first_k_dense_replace
        self.mlp = BailingMLP(config, config.intermediate_size) if is_dense else BailingMoe(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class BailingModel(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BailingLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.word_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class BailingMoeForCausalLM(PlainForCausalLM):
    config_class = BailingMoeConfig

    def make_model(self, config: Any) -> nn.Module:
        return BailingModel(config)


class BailingMoeV2ForCausalLM(BailingMoeForCausalLM):
    config_class = BailingMoeV2Config


PLAIN_MODELS: dict[str, type[PlainForCausalLM]] = {
    model.__name__: model for model in (InternLM2ForCausalLM, BailingMoeForCausalLM, BailingMoeV2ForCausalLM)
}
