"""Slopes of ALiBi: scores fall linearly with distance, in each head at its own rate (Press et al., 2022)."""

import math

import torch

from rtp_llm.srt.layers.linear import QKVParallelLinear


def all_alibi_slopes(num_heads: int, max_bias: float = 8.0) -> torch.Tensor:
    """[num_heads] float32 on torch's default device: the slopes of all ranks' heads, in their order.

    With n heads, n a power of two, they are ``2 ** (-max_bias * i / n)`` for i = 1 .. n. Other numbers of heads take
    those of the next power of two: every second one first, from i = 2 on, then the others.
    """
    if num_heads < 1:
        raise ValueError(f"ALiBi needs at least one head, got {num_heads}")
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2.0 ** (-max_bias * i / power) for i in range(1, power + 1)]
    ordered = slopes if power == num_heads else [*slopes[1::2], *slopes[::2]]
    return torch.tensor(ordered[:num_heads], dtype=torch.float32)


def alibi_slopes(projection: QKVParallelLinear, max_bias: float = 8.0) -> torch.Tensor:
    """[projection.num_heads] float32: the slopes of this rank's heads, for ``RadixAttention(alibi_slopes=...)``."""
    slopes = all_alibi_slopes(projection.total_num_heads, max_bias)
    return slopes.chunk(projection.tp_group.world_size)[projection.tp_group.rank]
