"""Qwen3-Next (Qwen Team, 2025): Gated DeltaNet on most layers, gated attention on others, experts with a shared one.

The delta rule: Yang et al., 2024.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.llama import LlamaForCausalLM, LlamaModel, NormedHeadsAttention
from rtp_llm.models_py.qwen2_moe import Qwen2MoeSparseMoeBlock, QwenMoeDecoderLayer
from rtp_llm.srt.distributed.parallel_state import divide, get_tp_group
from rtp_llm.srt.layers.causal_conv import CausalConv1d
from rtp_llm.srt.layers.delta_rule import GatedDeltaRule, log_decay
from rtp_llm.srt.layers.gated_norm import GatedRMSNorm
from rtp_llm.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.mamba import DecayParameter
from rtp_llm.srt.layers.norm import GemmaRMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import rope_of_layer
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class GatedQKVParallelLinear(QKVParallelLinear):
    """Queries, keys and values; each query head is followed by a gate of its size. ``q_size`` is that of both."""

    def _split_heads(self) -> None:
        super()._split_heads()
        self.q_size *= 2


class GatedAttention(NormedHeadsAttention):
    """Attention with partly rotated heads, whose result is multiplied by the sigmoid of a gate."""

    qkv_type = GatedQKVParallelLinear
    head_norm_type = GemmaRMSNorm

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        bias = config.attention_bias
        super().__init__(config, layer_id, qkv_bias=bias, o_bias=bias, quant_config=quant_config, prefix=prefix)

    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> nn.Module:
        return rope_of_layer(config, self.head_dim, layer_id, is_partial=True)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, gate = q.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        q, k = self.rotate(positions, self.q_norm(q), self.k_norm(k.unflatten(-1, (-1, self.head_dim))))
        attended = self.attn(q, k, v, forward_batch)
        output, _ = self.o_proj(attended * gate.flatten(1).sigmoid())
        return output


class GatedDeltaNet(DecayParameter):
    """A convolution, linear attention by the delta rule, and a gated norm of each head.

    A subclass makes the projections, by ``make_projections`` and ``project``.
    """

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        ranks = get_tp_group().world_size
        self.k_dim, self.v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.num_k_heads = divide(config.linear_num_key_heads, ranks, "number of key heads of linear attention")
        self.num_v_heads = divide(config.linear_num_value_heads, ranks, "number of value heads of linear attention")
        self.k_size, self.v_size = self.num_k_heads * self.k_dim, self.num_v_heads * self.v_dim
        self.make_projections(config, quant_config, prefix)
        self.conv1d = CausalConv1d(
            [ranks * self.k_size, ranks * self.k_size, ranks * self.v_size],
            config.linear_conv_kernel_dim,
            layer_id,
            activation=config.hidden_act,
            prefix=add_prefix("conv1d", prefix),
        )
        self.A = self.make_decays(self.num_v_heads)
        self.dt_bias = self.make_own(self.num_v_heads)
        self.delta_rule = GatedDeltaRule(self.num_k_heads, self.num_v_heads, self.k_dim, self.v_dim, layer_id)
        self.norm = GatedRMSNorm(self.v_dim, config.rms_norm_eps)
        self.out_proj = RowParallelLinear(
            ranks * self.v_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("out_proj", prefix),
        )

    def make_projections(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        raise NotImplementedError

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, hidden_size] -> queries, keys and values side by side; gates [T, num_v_heads, v_dim]; what decays are
        made of and how much is written, [T, num_v_heads] each."""
        raise NotImplementedError

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        qkv, gate, a, b = self.project(hidden_states)
        qkv = self.conv1d(qkv, forward_batch)
        q, k, v = qkv.split([self.k_size, self.k_size, self.v_size], dim=-1)
        attended = self.delta_rule(q, k, v, log_decay(a, self.A, self.dt_bias), b.sigmoid(), forward_batch)
        output, _ = self.out_proj(self.norm(attended, gate).flatten(1))
        return output


class Qwen3NextGatedDeltaNet(GatedDeltaNet):
    """Gated DeltaNet whose projections are stored by key heads."""

    def make_projections(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        ranks = get_tp_group().world_size
        self.in_proj_qkvz = ColumnParallelLinear(
            config.hidden_size,
            2 * ranks * (self.k_size + self.v_size),
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("in_proj_qkvz", prefix),
        )
        self.in_proj_ba = ColumnParallelLinear(
            config.hidden_size,
            2 * ranks * self.num_v_heads,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("in_proj_ba", prefix),
        )

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        shared = self.num_v_heads // self.num_k_heads
        qkvz, _ = self.in_proj_qkvz(hidden_states)
        sizes = [self.k_dim, self.k_dim, shared * self.v_dim, shared * self.v_dim]
        q, k, v, z = qkvz.unflatten(-1, (self.num_k_heads, -1)).split(sizes, dim=-1)
        ba, _ = self.in_proj_ba(hidden_states)
        b, a = ba.unflatten(-1, (self.num_k_heads, -1)).split([shared, shared], dim=-1)
        gate = z.reshape(-1, self.num_v_heads, self.v_dim)
        return torch.cat([x.flatten(1) for x in (q, k, v)], dim=-1), gate, a.flatten(1), b.flatten(1)


class Qwen3NextDecoderLayer(QwenMoeDecoderLayer):
    """A layer of experts, with linear attention where ``layer_types`` says so."""

    moe_type = Qwen2MoeSparseMoeBlock
    linear_type: type[GatedDeltaNet] = Qwen3NextGatedDeltaNet

    def make_mixer(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        attention_type: type[nn.Module],
    ) -> tuple[str, nn.Module]:
        layer_type = config.layer_types[layer_id]
        if layer_type == "linear_attention":
            return "linear_attn", self.linear_type(config, layer_id, quant_config, add_prefix("linear_attn", prefix))
        if layer_type != "full_attention":
            raise ValueError(
                f"layer_types[{layer_id}] must be 'linear_attention' or 'full_attention', not {layer_type!r}"
            )
        return super().make_mixer(config, layer_id, quant_config, prefix, attention_type)

    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Qwen3NextModel(LlamaModel):
    def make_norm(self, config: "PretrainedConfig") -> nn.Module:
        return GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Qwen3NextForCausalLM(LlamaForCausalLM):
    attention_type = GatedAttention
    layer_type = Qwen3NextDecoderLayer
    base_model_type = Qwen3NextModel


EntryClass = Qwen3NextForCausalLM
