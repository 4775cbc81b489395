"""The mixers of Mamba 1 and Mamba 2: state-space models whose step size depends on the token."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.cache.spec import StateSpec, StateTensor
from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.distributed.parallel_state import divide, get_tp_group
from rtp_llm.srt.forward_batch import ForwardBatch, StateWave
from rtp_llm.srt.layers.causal_conv import CausalConv1d
from rtp_llm.srt.layers.gated_norm import GatedRMSNorm
from rtp_llm.srt.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.state import in_waves, state_tensor
from rtp_llm.srt.layers.weights import ShardId, load_part, make_parameter, refuse_shard
from rtp_llm.srt.utils import add_prefix


class DecayParameter(nn.Module):
    """Base of modules with a parameter ``A``, whose logarithm checkpoints have: ``A = -exp(A_log)``, float32.

    Its parameters made by ``make_own`` are float32 and split over ranks along their first dimension.
    """

    A: nn.Parameter

    def make_own(self, *shape: int) -> nn.Parameter:
        """Make a parameter; ``shape`` is this rank's."""
        return make_parameter(torch.zeros(*shape, dtype=torch.float32), self._load_own)

    def make_decays(self, *shape: int) -> nn.Parameter:
        """Make the parameter ``A``; ``shape`` is this rank's, [heads] or [state_size, channels]."""
        return make_parameter(-torch.ones(*shape, dtype=torch.float32), self._load_decays)

    @property
    def weight_sources(self) -> Mapping[str, tuple[str, ShardId]]:
        return {"A_log": ("A", None)}

    def _load_own(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        refuse_shard(shard_id, type(self).__name__)
        group = get_tp_group()
        load_part(param.data, tensor, 0, group.rank, group.world_size, type(self).__name__)

    def _load_decays(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        refuse_shard(shard_id, type(self).__name__)
        group = get_tp_group()
        target = param.data.t()  # as in the checkpoint; of one dimension it is the same
        tensor = tensor.flatten() if target.dim() == 1 else tensor  # some have [1, 1, heads, 1]
        load_part(target, tensor, 0, group.rank, group.world_size, type(self).__name__)
        param.data.copy_(-param.data.exp())


class StateSpaceDual(nn.Module):
    """The recurrence of Mamba 2 (Dao and Gu, 2024). Its parameters are the mixer's.

    Args:
        num_heads, num_groups: of this rank; head h reads group ``h // (num_heads // num_groups)``.
        layer_id: the layer whose states are read and written.
        dt_limit: bounds of the step size.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_groups: int,
        state_size: int,
        layer_id: int,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_groups, self.state_size = num_groups, state_size
        self.layer_id = layer_id
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        self._ssd = pick("ssd")

    def state_spec(self) -> StateSpec:
        """Return a matrix [state_size, head_dim] for each head."""
        return StateSpec((StateTensor("recurrent", (self.num_heads, self.state_size, self.head_dim), "float32"),))

    def forward(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """Compute the step's tokens.

        Args:
            x: [T, num_heads * head_dim].
            dt: [T, num_heads], from which step sizes are made; a (negative), d and dt_bias: [num_heads].
            b, c: [T, num_groups * state_size].

        Returns:
            [T, num_heads, head_dim].
        """
        states = state_tensor(forward_batch, self.layer_id, "recurrent")
        b, c = (y.unflatten(-1, (self.num_groups, self.state_size)) for y in (b, c))

        def compute(
            wave: StateWave, x: torch.Tensor, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor
        ) -> torch.Tensor:
            return self._ssd(x, dt, a, b, c, d, dt_bias, states, wave, self.dt_limit)

        return in_waves(forward_batch, compute, x.unflatten(-1, (self.num_heads, self.head_dim)), dt, b, c)


class Mamba2Mixer(DecayParameter):
    """The mixer of Mamba 2 (Dao and Gu, 2024), with its names in checkpoints: ``in_proj``, ``conv1d``, ``A_log``,
    ``D``, ``dt_bias``, ``norm``, ``out_proj``.

    Args:
        num_heads, num_groups: of all ranks; heads are split over ranks, groups too, if there are enough of them.
        conv_bias, proj_bias: whether the convolution has a bias, and the projections.
        out_bias: of ``out_proj``; None: as ``proj_bias``.
        has_norm: False: the result is only multiplied by the gate.
        gates_first: whether it is gated before it is normed, or after.
        dt_limit: bounds of the step size.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        num_groups: int,
        state_size: int,
        conv_kernel_size: int,
        layer_id: int,
        conv_bias: bool = True,
        proj_bias: bool = False,
        out_bias: bool | None = None,
        eps: float = 1e-5,
        has_norm: bool = True,
        gates_first: bool = True,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        activation: str = "silu",
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        divide(num_heads, num_groups, "number of heads of a state-space layer")
        self.head_dim, self.state_size = head_dim, state_size
        ranks, size = get_tp_group().world_size, num_heads * head_dim
        group_parts = min(ranks, num_groups)
        self.num_heads = divide(num_heads, ranks, "number of heads of a state-space layer")
        self.num_groups = divide(num_groups, group_parts, "number of groups of a state-space layer")
        parts = [size, size, num_groups * state_size, num_groups * state_size, num_heads]
        num_parts = [ranks, ranks, group_parts, group_parts, ranks]
        self.in_proj = MergedColumnParallelLinear(
            hidden_size,
            parts,
            bias=proj_bias,
            quant_config=quant_config,
            prefix=add_prefix("in_proj", prefix),
            num_parts=num_parts,
        )
        self.conv1d = CausalConv1d(
            parts[1:4],
            conv_kernel_size,
            layer_id,
            bias=conv_bias,
            activation=activation,
            num_parts=num_parts[1:4],
            prefix=add_prefix("conv1d", prefix),
        )
        self.A = self.make_decays(self.num_heads)
        self.D = self.make_own(self.num_heads)
        self.dt_bias = self.make_own(self.num_heads)
        self.ssd = StateSpaceDual(self.num_heads, head_dim, self.num_groups, state_size, layer_id, dt_limit)
        self.norm = GatedRMSNorm(size, eps, size // num_groups, gates_first, is_split=True) if has_norm else None
        self.out_proj = RowParallelLinear(
            size,
            hidden_size,
            bias=proj_bias if out_bias is None else out_bias,
            quant_config=quant_config,
            prefix=add_prefix("out_proj", prefix),
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """[T, hidden_size] to the same."""
        return self.mix(self.project(hidden_states), forward_batch)

    def mix(self, projected: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """Compute the rest from what ``project`` gives."""
        size, group_size = self.num_heads * self.head_dim, self.num_groups * self.state_size
        gate, xbc, dt = projected.split([size, size + 2 * group_size, self.num_heads], dim=-1)
        x, b, c = self.conv1d(xbc, forward_batch).split([size, group_size, group_size], dim=-1)
        y = self.ssd(x, dt, self.A, b, c, self.D, self.dt_bias, forward_batch).flatten(1)
        y = y * F.silu(gate) if self.norm is None else self.norm(y, gate)
        output, _ = self.out_proj(y)
        return output

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> gates, inputs, the groups' two vectors and step sizes, side by side."""
        projected, _ = self.in_proj(hidden_states)
        return projected


class MambaMixer(DecayParameter):
    """The mixer of Mamba 1 (Gu and Dao, 2023), with its names in checkpoints: ``in_proj``, ``conv1d``, ``x_proj``,
    ``dt_proj``, ``A_log``, ``D``, ``out_proj``.

    Args:
        intermediate_size: channels of all ranks; time_step_rank: inputs of ``dt_proj``.
        conv_bias, proj_bias: whether the convolution has a bias, and ``in_proj`` and ``out_proj``.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        state_size: int,
        time_step_rank: int,
        conv_kernel_size: int,
        layer_id: int,
        conv_bias: bool = True,
        proj_bias: bool = False,
        activation: str = "silu",
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.state_size, self.time_step_rank = state_size, time_step_rank
        self.channels = divide(intermediate_size, get_tp_group().world_size, "channels of a state-space layer")
        self.in_proj = MergedColumnParallelLinear(
            hidden_size,
            [intermediate_size] * 2,
            bias=proj_bias,
            quant_config=quant_config,
            prefix=add_prefix("in_proj", prefix),
        )
        self.conv1d = CausalConv1d(
            [intermediate_size],
            conv_kernel_size,
            layer_id,
            bias=conv_bias,
            activation=activation,
            prefix=add_prefix("conv1d", prefix),
        )
        self.x_proj = RowParallelLinear(
            intermediate_size,
            time_step_rank + 2 * state_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("x_proj", prefix),
        )
        self.dt_proj = ColumnParallelLinear(
            time_step_rank,
            intermediate_size,
            bias=True,
            skip_bias_add=True,
            quant_config=quant_config,
            prefix=add_prefix("dt_proj", prefix),
        )
        self.A = self.make_decays(state_size, self.channels)
        self.D = self.make_own(self.channels)
        self.out_proj = RowParallelLinear(
            intermediate_size,
            hidden_size,
            bias=proj_bias,
            quant_config=quant_config,
            prefix=add_prefix("out_proj", prefix),
        )
        self._scan = pick("selective_scan")

    def state_spec(self) -> StateSpec:
        """Return ``state_size`` numbers for each channel."""
        return StateSpec((StateTensor("recurrent", (self.state_size, self.channels), "float32"),))

    def forward(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """[T, hidden_size] to the same."""
        projected, _ = self.in_proj(hidden_states)
        x, gate = projected.split([self.channels, self.channels], dim=-1)
        x = self.conv1d(x, forward_batch)
        projected, _ = self.x_proj(x)
        dt, b, c = self.prepare(*projected.split([self.time_step_rank, self.state_size, self.state_size], dim=-1))
        dt, dt_bias = self.dt_proj(dt)
        states = state_tensor(forward_batch, self.layer_id, "recurrent")

        def compute(
            wave: StateWave, x: torch.Tensor, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor
        ) -> torch.Tensor:
            return self._scan(x, dt, self.A, b, c, self.D, dt_bias, states, wave)

        y = in_waves(forward_batch, compute, x, dt, b, c)
        output, _ = self.out_proj(y * F.silu(gate))
        return output

    def prepare(
        self, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Transform what ``x_proj`` gives, [T, time_step_rank], [T, state_size] twice: it stays as it is."""
        return dt, b, c
