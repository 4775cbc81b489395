"""StableLM (Bellagente et al., 2024): Llama with layer norms, partly rotated heads, and perhaps blocks side by side."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.linear import OutputShard
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import rope_of_layer
from rtp_llm.srt.layers.weights import ShardId, check_shape, make_parameter

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class StableLmHeadsNorm(nn.Module):
    """Layer norm of each head by itself, without biases, with weights of its own.

    Args:
        shard: the rank's part of the projection that is normed. Ranks may have the same key heads.
    """

    def __init__(self, shard: OutputShard, head_dim: int, eps: float) -> None:
        super().__init__()
        num_heads = shard.size // head_dim
        self.first_head = shard.part * num_heads
        self.variance_epsilon = eps
        self.weight = make_parameter(torch.ones(num_heads, head_dim), self.weight_loader)
        all_heads = num_heads * shard.num_parts
        self.weight_sources = {f"norms.{head}.weight": ("weight", head) for head in range(all_heads)}

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        if not isinstance(shard_id, int):
            raise ValueError(f"norm of heads: weights come head by head, got shard_id {shard_id!r}")
        num_heads, head_dim = param.shape
        check_shape(tensor, (head_dim,), f"norm of head {shard_id}")
        head = shard_id - self.first_head
        if 0 <= head < num_heads:
            param.data[head].copy_(tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, heads * head_dim] -> [T, heads, head_dim]."""
        heads = x.float().unflatten(-1, self.weight.shape)
        return (F.layer_norm(heads, heads.shape[-1:], eps=self.variance_epsilon) * self.weight.float()).to(x.dtype)


class StableLmAttention(GroupedQueryAttention):
    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            config, layer_id, qkv_bias=config.use_qkv_bias, o_bias=False, quant_config=quant_config, prefix=prefix
        )
        self.has_norms = config.qk_layernorm
        if self.has_norms:
            q_shard, k_shard, _ = self.qkv_proj.shards
            self.q_layernorm = StableLmHeadsNorm(q_shard, self.head_dim, config.layer_norm_eps)
            self.k_layernorm = StableLmHeadsNorm(k_shard, self.head_dim, config.layer_norm_eps)

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return rope_of_layer(config, self.head_dim, layer_id, is_partial=True)

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.has_norms:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        return self.rotary_emb(positions, q, k)


class StableLmDecoderLayer(LlamaDecoderLayer):
    """A layer of Llama; with ``use_parallel_residual``, one norm is before both blocks, which stand side by side."""

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = StableLmAttention,
    ) -> None:
        super().__init__(config, layer_id, quant_config, prefix, attention_type)
        self.use_parallel_residual = config.use_parallel_residual
        if self.use_parallel_residual:
            del self.post_attention_layernorm

    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.use_parallel_residual:
            return super().forward(positions, hidden_states, forward_batch, residual)
        normed, residual = self.input_layernorm(hidden_states, residual)
        return self.self_attn(positions, normed, forward_batch) + self.feed(normed), residual


class StableLmModel(LlamaModel):
    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class StableLmForCausalLM(LlamaForCausalLM):
    attention_type = StableLmAttention
    layer_type = StableLmDecoderLayer
    base_model_type = StableLmModel
    gguf = GGUFForm(
        "stablelm",
        config={"use_parallel_residual": "use_parallel_residual"},
        defaults={"partial_rotary_factor": 1.0},
        presence={"blk.0.attn_q.bias": "use_qkv_bias", "blk.0.attn_q_norm.weight": "qk_layernorm"},
        names={
            "blk.{bid}.attn_q_norm": "model.layers.{bid}.self_attn.q_layernorm.norms.{part}",
            "blk.{bid}.attn_k_norm": "model.layers.{bid}.self_attn.k_layernorm.norms.{part}",
        },
    )


EntryClass = StableLmForCausalLM
