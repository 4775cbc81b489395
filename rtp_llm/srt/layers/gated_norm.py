"""Gates of a layer's output, and norms times a gate."""

import torch
from torch import nn

from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.distributed.parallel_state import SplitError, divide, get_tp_group
from rtp_llm.srt.kernels.recurrent import activate
from rtp_llm.srt.layers.weights import ShardId, load_part, make_parameter, refuse_shard


class SigmoidGate(nn.Module):
    """``x * sigmoid(gate)``: [T, size] and a gate of the same shape, or [T, heads, size / heads], to [T, size]."""

    def __init__(self) -> None:
        super().__init__()
        self._gate = pick("sigmoid_gate")

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self._gate(x, gate)


class GatedRMSNorm(nn.Module):
    """``norm(x) * weight * act(gate)``, or with ``gates_first`` ``norm(x * act(gate)) * weight``; in float32.

    Args:
        size: of all ranks.
        group_size: neighbours that are normed together; None: all.
        gates_first: whether x is multiplied by the gate before it is normed (Mamba 2) or after (Gated DeltaNet).
        activation: of the gate, ``"silu"`` or ``"sigmoid"``.
        is_split: whether x is this rank's part of ``size``; False: every rank norms all of it, such as each of its
            heads. A group that several ranks share is normed as one.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-6,
        group_size: int | None = None,
        gates_first: bool = False,
        activation: str = "silu",
        is_split: bool = False,
    ) -> None:
        super().__init__()
        self.tp_group = get_tp_group()
        self.num_parts = self.tp_group.world_size if is_split else 1
        own_size = divide(size, self.num_parts, "size of a gated norm")
        self.group_size = group_size or size
        divide(size, self.group_size, "size of a gated norm in groups,")
        self.spans_ranks = own_size % self.group_size != 0
        if self.spans_ranks and self.group_size != size:
            raise SplitError(
                f"groups of {self.group_size} do not fit {own_size} components of a rank; choose another tp_size"
            )
        self.gates_first = gates_first
        self.activation = activation
        self.variance_epsilon = eps
        self.weight = make_parameter(torch.ones(own_size), self.weight_loader)
        self._norm = pick("gated_rms_norm")

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        refuse_shard(shard_id, "gated norm")
        part = self.tp_group.rank if self.num_parts > 1 else 0
        load_part(param.data, tensor, 0, part, self.num_parts, "gated norm")

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """[..., this rank's part of size] each, to the same shape in x's dtype."""
        if self.spans_ranks:
            return self._norm_over_ranks(x, gate)
        options = (self.variance_epsilon, self.group_size, self.gates_first, self.activation)
        return self._norm(x, gate, self.weight, *options)

    def _norm_over_ranks(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        factor = activate(gate.float(), self.activation)
        x32 = x.float() * factor if self.gates_first else x.float()
        mean_square = self.tp_group.all_reduce(x32.square().mean(dim=-1, keepdim=True)) / self.tp_group.world_size
        normed = x32 * torch.rsqrt(mean_square + self.variance_epsilon) * self.weight.float()
        return (normed if self.gates_first else normed * factor).to(x.dtype)
