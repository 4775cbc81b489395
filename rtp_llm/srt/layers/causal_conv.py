"""Short convolutions over the tokens of a sequence, each channel by itself."""

from collections.abc import Sequence

import torch
from torch import nn

from rtp_llm.srt.cache.spec import StateSpec, StateTensor
from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.distributed.parallel_state import get_tp_group
from rtp_llm.srt.forward_batch import ForwardBatch, StateWave
from rtp_llm.srt.layers.linear import OutputShard, output_shards
from rtp_llm.srt.layers.state import in_waves, state_tensor
from rtp_llm.srt.layers.weights import ShardId, check_shape, make_parameter


class CausalConv1d(nn.Module):
    """A convolution of this token's and the last tokens' inputs, [T, channels] -> [T, channels] of this rank.

    As ``torch.nn.Conv1d`` with a group for each channel, and with its names in the checkpoint: ``weight`` [channels, 1,
    kernel_size] (kept as [kernel_size, channels]) and ``bias``.

    Args:
        sizes: channels side by side, such as those of queries, keys and values; each of them is split over ranks. A
            checkpoint has them in one tensor, or in one each (shard ids 0, 1, ...).
        layer_id: the layer whose states are read and written.
        activation: ``"silu"``, or None.
        name: of the state; layers with the same ``layer_id`` have other names.
        num_parts: into how many parts each of ``sizes`` is split, as in MergedColumnParallelLinear; None: as many as
            ranks.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        kernel_size: int,
        layer_id: int,
        bias: bool = False,
        activation: str | None = None,
        name: str = "conv",
        num_parts: Sequence[int] | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.kernel_size = kernel_size
        self.activation = activation
        self.state_name = name
        self.prefix = prefix or type(self).__name__
        if activation not in (None, "silu"):
            raise ValueError(f"{self.prefix}: the activation must be 'silu', or None for none, not {activation!r}")
        self.shards: list[OutputShard] = output_shards(sizes, get_tp_group(), self.prefix, num_parts)
        self.channels = sum(shard.size for shard in self.shards)
        self.weight = make_parameter(torch.zeros(kernel_size, self.channels), self.weight_loader)
        self.bias = make_parameter(torch.zeros(self.channels), self.weight_loader) if bias else None
        self._conv = pick("causal_conv1d")

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        """Load all of ``sizes``, or the one whose place ``shard_id`` is."""
        if shard_id is not None and shard_id not in range(len(self.shards)):
            raise ValueError(f"{self.prefix}: unknown shard_id {shard_id!r}; have {list(range(len(self.shards)))}")
        full_size = sum(shard.full_size for shard in self.shards if shard_id in (None, shard.id))
        check_shape(tensor, (full_size, 1, self.kernel_size) if param.dim() == 2 else (full_size,), self.prefix)
        tensor = tensor[:, 0].t() if param.dim() == 2 else tensor
        start, target = 0, 0
        for shard in self.shards:
            if shard_id in (None, shard.id):
                part = tensor.narrow(-1, start + shard.part * shard.size, shard.size)
                param.data.narrow(-1, target, shard.size).copy_(part)
                start += shard.full_size
            target += shard.size

    def state_spec(self) -> StateSpec:
        """Return the last inputs, oldest first, in the model's dtype."""
        dtype = str(self.weight.dtype).removeprefix("torch.")
        return StateSpec((StateTensor(self.state_name, (self.kernel_size - 1, self.channels), dtype),))

    def forward(
        self,
        x: torch.Tensor,
        forward_batch: ForwardBatch,
        before: torch.Tensor | None = None,
        after: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, channels] to the same. ``before``, ``after``: factors of the inputs, and of the results; both or none."""
        if (before is None) != (after is None):
            raise ValueError(f"{self.prefix}: gates of a convolution are given both, before and after, or none")
        states = state_tensor(forward_batch, self.layer_id, self.state_name)

        def compute(wave: StateWave, x: torch.Tensor, *gates: torch.Tensor) -> torch.Tensor:
            return self._conv(x, self.weight, self.bias, states, wave, self.activation, *gates)

        gates = () if before is None or after is None else (before, after)
        return in_waves(forward_batch, compute, x, *gates)
