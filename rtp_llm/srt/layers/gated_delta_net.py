"""Gated DeltaNet (Yang et al., 2024): a convolution, linear attention by the delta rule, a gated norm of each head."""

from typing import TYPE_CHECKING

import torch

from rtp_llm.srt.distributed.parallel_state import divide, get_tp_group
from rtp_llm.srt.layers.causal_conv import CausalConv1d
from rtp_llm.srt.layers.delta_rule import GatedDeltaRule
from rtp_llm.srt.layers.gated_norm import GatedRMSNorm
from rtp_llm.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.mamba import DecayParameter
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch

Projections = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class GatedDeltaNet(DecayParameter):
    """The block, with the names of Qwen's checkpoints.

    Args:
        is_grouped: whether the outputs of ``in_proj_qkvz`` and ``in_proj_ba`` are stored by key heads, those of each
            with the value heads that share it (Qwen3-Next, 2025); False: each kind side by side (Qwen3.5, 2026).
        gate_activation: of the norm's gate, ``"silu"`` or ``"sigmoid"``.
        reduce_results: whether the outputs of all ranks are summed.

    Attributes:
        most_written: how often a token's value is written at most.
    """

    most_written = 1.0

    def __init__(
        self,
        config: "PretrainedConfig",
        layer_id: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        is_grouped: bool = False,
        gate_activation: str = "silu",
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        self.is_grouped = is_grouped
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
        self.norm = GatedRMSNorm(self.v_dim, config.rms_norm_eps, activation=gate_activation)
        self.out_proj = RowParallelLinear(
            ranks * self.v_size,
            config.hidden_size,
            bias=False,
            reduce_results=reduce_results,
            quant_config=quant_config,
            prefix=add_prefix("out_proj", prefix),
        )

    def make_projections(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        """Make the layers that ``project`` calls; a checkpoint may have other ones."""
        ranks = get_tp_group().world_size
        sizes = [ranks * size for size in (self.k_size, self.k_size, self.v_size, self.v_size)]
        self.in_proj_qkvz = self._projection(config, sizes, quant_config, add_prefix("in_proj_qkvz", prefix))
        heads = [ranks * self.num_v_heads] * 2
        self.in_proj_ba = self._projection(config, heads, quant_config, add_prefix("in_proj_ba", prefix))
        if not self.is_grouped:
            self.in_proj_qkvz.shard_ids = ((0, 1, 2), 3)  # type: ignore[assignment]

    def _projection(
        self, config: "PretrainedConfig", sizes: list[int], quant_config: QuantizationConfig | None, prefix: str
    ) -> MergedColumnParallelLinear:
        parts = [sum(sizes)] if self.is_grouped else sizes
        return MergedColumnParallelLinear(
            config.hidden_size, parts, bias=False, quant_config=quant_config, prefix=prefix
        )

    def project(self, hidden_states: torch.Tensor) -> Projections:
        """[T, hidden_size] -> queries, keys and values side by side; gates [T, num_v_heads, v_dim]; what decays are
        made of and how much is written, [T, num_v_heads] each."""
        qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
        if self.is_grouped:
            qkv, z, b, a = self._ungrouped(qkvz, ba)
        else:
            qkv, z = qkvz.split([2 * self.k_size + self.v_size, self.v_size], dim=-1)
            b, a = ba.split([self.num_v_heads, self.num_v_heads], dim=-1)
        return qkv, z.reshape(-1, self.num_v_heads, self.v_dim), a, b

    def _ungrouped(self, qkvz: torch.Tensor, ba: torch.Tensor) -> Projections:
        shared = self.num_v_heads // self.num_k_heads
        sizes = [self.k_dim, self.k_dim, shared * self.v_dim, shared * self.v_dim]
        q, k, v, z = qkvz.unflatten(-1, (self.num_k_heads, -1)).split(sizes, dim=-1)
        b, a = ba.unflatten(-1, (self.num_k_heads, -1)).split([shared, shared], dim=-1)
        return torch.cat([x.flatten(1) for x in (q, k, v)], dim=-1), z, b.flatten(1), a.flatten(1)

    def mix(self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        """[T, hidden_size] to the same."""
        qkv, gate, a, b = self.project(hidden_states)
        qkv = self.conv1d(qkv, forward_batch)
        q, k, v = qkv.split([self.k_size, self.k_size, self.v_size], dim=-1)
        g, beta = self.delta_rule.gates(a, b, self.A, self.dt_bias, self.most_written)
        attended = self.delta_rule(q, k, v, g, beta, forward_batch)
        output, _ = self.out_proj(self.norm(attended, gate).flatten(1))
        return output

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        return self.mix(hidden_states, forward_batch)
