"""Layers that keep a state, under the names and with the arguments that vLLM's model files have.

Each returns what vLLM's may write into a tensor that it is given, and is called with ``forward_batch``. The number in
``prefix`` tells whose states are read and written.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.layers import mamba
from rtp_llm.srt.layers.causal_conv import CausalConv1d
from rtp_llm.srt.layers.delta_rule import GatedDeltaRule
from rtp_llm.srt.layers.gated_delta_net import GatedDeltaNet
from rtp_llm.srt.layers.gated_norm import GatedRMSNorm
from rtp_llm.srt.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.utils import add_prefix, extract_layer_index

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch

__all__ = [
    "MambaMixer",
    "MambaMixer2",
    "OlmoHybridGatedDeltaNetAttention",
    "QwenGatedDeltaNetAttention",
    "ShortConv",
]


class MambaMixer(mamba.MambaMixer):
    """The mixer of Mamba 1.

    Args:
        use_rms_norm: whether step sizes and the two vectors are normed (Jamba, Falcon Mamba).
        rms_norm_has_weight: whether these norms have weights.
    """

    def __init__(
        self,
        hidden_size: int,
        ssm_state_size: int,
        conv_kernel_size: int,
        intermediate_size: int,
        time_step_rank: int,
        use_conv_bias: bool,
        use_bias: bool,
        use_rms_norm: bool,
        rms_norm_has_weight: bool = True,
        rms_norm_eps: float = 1e-5,
        activation: str = "silu",
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            hidden_size,
            intermediate_size,
            ssm_state_size,
            time_step_rank,
            conv_kernel_size,
            extract_layer_index(prefix),
            conv_bias=use_conv_bias,
            proj_bias=use_bias,
            activation=activation,
            quant_config=quant_config,
            prefix=prefix,
        )

        def norm(size: int) -> RMSNorm | None:
            return RMSNorm(size, rms_norm_eps, has_weight=rms_norm_has_weight) if use_rms_norm else None

        self.dt_layernorm = norm(time_step_rank)
        self.b_layernorm, self.c_layernorm = norm(ssm_state_size), norm(ssm_state_size)

    def prepare(
        self, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.dt_layernorm is None or self.b_layernorm is None or self.c_layernorm is None:
            return dt, b, c
        return self.dt_layernorm(dt), self.b_layernorm(b), self.c_layernorm(c)


class MambaMixer2(mamba.Mamba2Mixer):
    """The mixer of Mamba 2.

    Args:
        intermediate_size: ``num_heads * head_dim``.
        use_rms_norm: False: the result is only multiplied by the gate.
    """

    def __init__(
        self,
        hidden_size: int,
        ssm_state_size: int,
        conv_kernel_size: int,
        intermediate_size: int,
        use_conv_bias: bool,
        use_bias: bool,
        n_groups: int = 1,
        num_heads: int = 128,
        head_dim: int = 64,
        rms_norm_eps: float = 1e-5,
        activation: str = "silu",
        use_rms_norm: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        if intermediate_size != num_heads * head_dim:
            raise ValueError(
                f"{prefix}: intermediate_size must be num_heads * head_dim, {num_heads} * {head_dim}, not "
                f"{intermediate_size}"
            )
        super().__init__(
            hidden_size,
            num_heads,
            head_dim,
            n_groups,
            ssm_state_size,
            conv_kernel_size,
            extract_layer_index(prefix),
            conv_bias=use_conv_bias,
            proj_bias=use_bias,
            eps=rms_norm_eps,
            has_norm=use_rms_norm,
            activation=activation,
            quant_config=quant_config,
            prefix=prefix,
        )
        ranks = num_heads // self.num_heads
        self.n_groups = self.num_groups * ranks  # with those that several ranks share counted for each of them

    def forward(
        self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch", mup_vector: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, hidden_size] to the same; ``mup_vector``: factors of what ``in_proj`` gives, [1, this rank's part]."""
        projected = self.project(hidden_states)
        return self.mix(projected if mup_vector is None else projected * mup_vector, forward_batch)


class ShortConv(nn.Module):
    """A convolution of the last tokens' inputs, between two gates (LFM2, 2025).

    Args:
        config: has ``conv_L_cache``, the convolution's length, and ``conv_bias``.
        dim: of inputs and outputs.
    """

    def __init__(
        self,
        config: "PretrainedConfig",
        dim: int,
        layer_idx: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        bias = config.conv_bias
        self.in_proj = MergedColumnParallelLinear(
            dim, [dim] * 3, bias=bias, quant_config=quant_config, prefix=add_prefix("in_proj", prefix)
        )
        self.conv = CausalConv1d([dim], config.conv_L_cache, layer_idx, bias=bias, prefix=add_prefix("conv", prefix))
        self.out_proj = RowParallelLinear(
            dim, dim, bias=bias, quant_config=quant_config, prefix=add_prefix("out_proj", prefix)
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        """[T, dim] to the same."""
        projected, _ = self.in_proj(hidden_states)
        before, after, x = projected.chunk(3, dim=-1)
        output, _ = self.out_proj(self.conv(x, forward_batch, before, after))
        return output


class QwenGatedDeltaNetAttention(GatedDeltaNet):
    """Gated DeltaNet with the names of Qwen's checkpoints.

    Args:
        gqa_interleaved_layout: whether outputs of the projections are stored by key heads (Qwen3-Next).
    """

    def __init__(
        self,
        config: "PretrainedConfig",
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        gqa_interleaved_layout: bool = False,
        reduce_results: bool = True,
    ) -> None:
        gate = getattr(config, "output_gate_type", "silu")
        super().__init__(
            config,
            extract_layer_index(prefix),
            quant_config,
            prefix,
            is_grouped=gqa_interleaved_layout,
            gate_activation="silu" if gate == "swish" else gate,
            reduce_results=reduce_results,
        )

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch"
    ) -> torch.Tensor:
        """[T, hidden_size] to the same."""
        return self.mix(hidden_states, forward_batch)


class OlmoHybridGatedDeltaNetAttention(mamba.DecayParameter):
    """Gated DeltaNet with the names of OLMo Hybrid's checkpoints."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        layer_id = extract_layer_index(prefix)
        self.beta_scale = 2.0 if getattr(config, "linear_allow_neg_eigval", False) else 1.0
        k_dim, v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        num_v_heads = config.linear_num_value_heads
        k_size, v_size = config.linear_num_key_heads * k_dim, num_v_heads * v_dim
        sizes = [k_size, k_size, v_size]
        self.in_proj_qkvg = MergedColumnParallelLinear(
            config.hidden_size,
            [*sizes, v_size],
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("in_proj_qkvg", prefix),
        )
        self.b_proj = ColumnParallelLinear(
            config.hidden_size,
            num_v_heads,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("b_proj", prefix),
        )
        self.a_proj = ColumnParallelLinear(
            config.hidden_size,
            num_v_heads,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("a_proj", prefix),
        )
        self.conv1d = CausalConv1d(
            sizes,
            config.linear_conv_kernel_dim,
            layer_id,
            activation=config.hidden_act,
            prefix=add_prefix("conv1d", prefix),
        )
        self.qkv_sizes = [shard.size for shard in self.conv1d.shards]
        own_v_heads = self.qkv_sizes[2] // v_dim
        self.A = self.make_decays(own_v_heads)
        self.dt_bias = self.make_own(own_v_heads)
        self.delta_rule = GatedDeltaRule(self.qkv_sizes[0] // k_dim, own_v_heads, k_dim, v_dim, layer_id)
        self.o_norm = GatedRMSNorm(v_dim, eps=1e-5)
        self.o_proj = RowParallelLinear(
            v_size, config.hidden_size, bias=False, quant_config=quant_config, prefix=add_prefix("o_proj", prefix)
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: "ForwardBatch") -> torch.Tensor:
        """[T, hidden_size] to the same."""
        projected, _ = self.in_proj_qkvg(hidden_states)
        qkv, gate = projected.split([self.conv1d.channels, self.qkv_sizes[2]], dim=-1)
        b, _ = self.b_proj(hidden_states)
        a, _ = self.a_proj(hidden_states)
        q, k, v = self.conv1d(qkv, forward_batch).split(self.qkv_sizes, dim=-1)
        g, beta = self.delta_rule.gates(a, b, self.A, self.dt_bias, self.beta_scale)
        attended = self.delta_rule(q, k, v, g, beta, forward_batch)
        output, _ = self.o_proj(self.o_norm(attended, gate.view_as(attended)).flatten(1))
        return output
