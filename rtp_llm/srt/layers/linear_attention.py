"""Recurrences with decays: lightning attention (MiniMax), the linear recurrent unit of Griffin, and any of channels."""

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.cache.spec import StateSpec, StateTensor
from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.distributed.parallel_state import divide, get_tp_group
from rtp_llm.srt.forward_batch import ForwardBatch, StateWave
from rtp_llm.srt.layers.state import in_waves, state_tensor
from rtp_llm.srt.layers.weights import ShardId, load_part, make_parameter, refuse_shard


class LightningAttention(nn.Module):
    """Linear attention with a constant decay for each head (MiniMax-01, 2025); scores are not scaled.

    Args:
        num_heads, head_dim: of this rank.
        slopes: [num_heads] of this rank: the state is multiplied by ``exp(-slope)`` at each token.
        layer_id: the layer whose states are read and written.
        name: of the state; layers with the same ``layer_id`` have other names.
    """

    def __init__(
        self, num_heads: int, head_dim: int, slopes: torch.Tensor, layer_id: int, name: str = "recurrent"
    ) -> None:
        super().__init__()
        if slopes.shape != (num_heads,):
            raise ValueError(f"slopes must be of shape ({num_heads},), one per head, not {tuple(slopes.shape)}")
        self.num_heads, self.head_dim = num_heads, head_dim
        self.layer_id = layer_id
        self.state_name = name
        self.register_buffer("log_decay", -slopes.float(), persistent=False)
        self._attend = pick("linear_attention")

    def state_spec(self) -> StateSpec:
        """Return a matrix [head_dim of keys, head_dim of values] for each head."""
        return StateSpec((StateTensor(self.state_name, (self.num_heads, self.head_dim, self.head_dim), "float32"),))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """[T, num_heads, head_dim] each -> [T, num_heads, head_dim]."""
        states = state_tensor(forward_batch, self.layer_id, self.state_name)

        def compute(wave: StateWave, *tokens: torch.Tensor) -> torch.Tensor:
            return self._attend(*tokens, self.log_decay, states, wave)

        return in_waves(forward_batch, compute, q, k, v)


class LinearRecurrence(nn.Module):
    """``h = exp(log_decay) h + x`` for each channel, from zero: running means, leaky sums, and gates of your own.

    Computed in float32, whatever x's dtype. It has no parameters: decays are given with each token.

    Args:
        channels: of this rank.
        layer_id: the layer whose states are read and written.
        name: of the state; layers with the same ``layer_id`` have other names.
    """

    def __init__(self, channels: int, layer_id: int, name: str = "recurrent") -> None:
        super().__init__()
        self.channels = channels
        self.layer_id = layer_id
        self.state_name = name
        self._recur = pick("linear_recurrence")

    def state_spec(self) -> StateSpec:
        """Return a number for each channel."""
        return StateSpec((StateTensor(self.state_name, (self.channels,), "float32"),))

    def forward(self, x: torch.Tensor, log_decay: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """[T, channels] -> [T, channels] in x's dtype: h after each token.

        Args:
            log_decay: [T, channels], or [channels] for all tokens: logarithms of the decays, such as
                ``F.logsigmoid(parameter.float())``; -inf forgets what was before.
        """
        if x.dim() != 2 or x.shape[1] != self.channels:
            raise ValueError(f"x must be [tokens, {self.channels}], not {list(x.shape)}")
        states = state_tensor(forward_batch, self.layer_id, self.state_name)

        def compute(wave: StateWave, x: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
            return self._recur(x, log_decay, states, wave)

        return in_waves(forward_batch, compute, x, log_decay.expand(x.shape))


class RGLRU(nn.Module):
    """The real-gated linear recurrent unit (Griffin; De et al., 2024), [T, width] -> [T, width] of this rank.

    Parameters are named as in transformers' RecurrentGemma: ``recurrent_param`` and, for each head, a matrix and a bias
    of both gates.

    Args:
        width: channels of all ranks; num_heads: blocks of channels that share a gate's matrix.
        layer_id: the layer whose states are read and written.
        name: of the state; layers with the same ``layer_id`` have other names.
    """

    def __init__(self, width: int, num_heads: int, layer_id: int, name: str = "recurrent") -> None:
        super().__init__()
        self.tp_group = get_tp_group()
        self.num_heads = divide(num_heads, self.tp_group.world_size, "number of heads of the recurrent unit")
        self.block_width = divide(width, num_heads, "width of the recurrent unit")
        self.channels = self.num_heads * self.block_width
        self.layer_id = layer_id
        self.state_name = name
        square = (self.num_heads, self.block_width, self.block_width)
        self.recurrent_param = make_parameter(torch.empty(self.channels), self.weight_loader)
        self.input_gate_weight = make_parameter(torch.empty(*square), self.weight_loader)
        self.input_gate_bias = make_parameter(torch.empty(*square[:2]), self.weight_loader)
        self.recurrent_gate_weight = make_parameter(torch.empty(*square), self.weight_loader)
        self.recurrent_gate_bias = make_parameter(torch.empty(*square[:2]), self.weight_loader)
        self._recur = pick("linear_recurrence")

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        refuse_shard(shard_id, "RGLRU")
        load_part(param.data, tensor, 0, self.tp_group.rank, self.tp_group.world_size, "RGLRU")

    def state_spec(self) -> StateSpec:
        """Return a number for each channel."""
        return StateSpec((StateTensor(self.state_name, (self.channels,), "float32"),))

    def forward(self, x: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """``positions``: [T]; at position 0 the input is not scaled."""
        input_gate = self._gate(x, self.input_gate_weight, self.input_gate_bias)
        recurrent_gate = self._gate(x, self.recurrent_gate_weight, self.recurrent_gate_bias)
        log_decay = -8.0 * recurrent_gate.float() * F.softplus(self.recurrent_param.float())
        scale = torch.where(positions[:, None] == 0, 1.0, (1 - (2 * log_decay).exp()).sqrt())
        states = state_tensor(forward_batch, self.layer_id, self.state_name)

        def compute(wave: StateWave, x: torch.Tensor, log_decay: torch.Tensor) -> torch.Tensor:
            return self._recur(x, log_decay, states, wave)

        return in_waves(forward_batch, compute, x * input_gate * scale.to(x.dtype), log_decay)

    def _gate(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        blocks = x.view(-1, self.num_heads, self.block_width)
        return (torch.einsum("thi,hio->tho", blocks, weight) + bias).flatten(1).sigmoid()
