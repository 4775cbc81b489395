"""OLMo 2 (OLMo Team, 2024): Llama with norms after the blocks instead of before, and normed queries and keys."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import GroupedQueryAttention, LlamaForCausalLM, LlamaModel
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.layers.linear import OutputShard
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.norm import Norm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import rope_of_layer
from rtp_llm.srt.layers.weights import ShardId, load_part, make_parameter, refuse_shard
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class Olmo2RMSNorm(Norm):
    """Root-mean-square norm, all in float32 and rounded once."""

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        mean_square = x32.square().mean(dim=-1, keepdim=True)
        return (self.weight.float() * (x32 * torch.rsqrt(mean_square + self.variance_epsilon))).to(x.dtype)


class Olmo2HeadsNorm(nn.Module):
    """Root-mean-square norm over the heads of all ranks together.

    Args:
        shard: the rank's part of the projection that is normed. Ranks may have the same key heads.
    """

    def __init__(self, shard: OutputShard, tp_group: RankGroup, eps: float) -> None:
        super().__init__()
        self.shard = shard
        self.tp_group = tp_group
        self.variance_epsilon = eps
        self.weight = make_parameter(torch.ones(shard.size), self.weight_loader)

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        refuse_shard(shard_id, "norm of heads")
        load_part(param.data, tensor, 0, self.shard.part, self.shard.num_parts, "norm of heads")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, shard.size] -> [T, shard.size]."""
        x32 = x.float()
        # All heads are on equally many ranks, so the ranks' mean is that of all heads.
        mean_square = self.tp_group.all_reduce(x32.square().mean(dim=-1, keepdim=True)) / self.tp_group.world_size
        return self.weigh(x32 * torch.rsqrt(mean_square + self.variance_epsilon), x.dtype)

    def weigh(self, normed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply float32 values by the weight, and round the products."""
        return (self.weight.float() * normed).to(dtype)


class Olmo2Attention(GroupedQueryAttention):
    rotates_in_float32 = True

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        sliding_window: int | None = None,
    ) -> None:
        super().__init__(
            config,
            layer_id,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            sliding_window=sliding_window,
            quant_config=quant_config,
            prefix=prefix,
        )
        q_shard, k_shard, _ = self.qkv_proj.shards
        self.q_norm = Olmo2HeadsNorm(q_shard, self.qkv_proj.tp_group, config.rms_norm_eps)
        self.k_norm = Olmo2HeadsNorm(k_shard, self.qkv_proj.tp_group, config.rms_norm_eps)

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return rope_of_layer(config, self.head_dim, layer_id, dtype=torch.float32)

    def prepare_queries_and_keys(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotate(positions, self.q_norm(q), self.k_norm(k))


class Olmo2DecoderLayer(nn.Module):
    """Attention and feed-forward, each before a norm and added to the residual, which is returned separately."""

    norm_type: type[Norm] = Olmo2RMSNorm

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        attention_type: type[nn.Module] = Olmo2Attention,
    ) -> None:
        super().__init__()
        self.self_attn = attention_type(config, layer_id, quant_config, add_prefix("self_attn", prefix))
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
        )
        self.post_attention_layernorm = self.norm_type(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = self.norm_type(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: "ForwardBatch",
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is not None:
            hidden_states = residual + hidden_states
        attended = self.self_attn(positions, hidden_states, forward_batch)
        residual = hidden_states + self.post_attention_layernorm(attended)
        return self.post_feedforward_layernorm(self.mlp(residual)), residual


class Olmo2Model(LlamaModel):
    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return Olmo2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Olmo2ForCausalLM(LlamaForCausalLM):
    attention_type: type[nn.Module] = Olmo2Attention
    layer_type = Olmo2DecoderLayer
    base_model_type = Olmo2Model
    gguf = GGUFForm("olmo2", presence={"blk.0.attn_q.bias": "attention_bias"})


EntryClass = Olmo2ForCausalLM
