"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

The number for (seed, position) is a pure function of both, so a request draws the same whoever else is in its batch and
however often it is interrupted. 32-bit words live in int64 tensors: the low 64 bits of a product are right in two's
complement, whatever its sign.
"""

from collections.abc import Sequence

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(
    counter: Sequence[torch.Tensor], key: Sequence[torch.Tensor], num_rounds: int = 10
) -> list[torch.Tensor]:
    """Four random words per element.

    Args:
        counter: four int64 tensors of one shape with values in [0, 2^32); key: two such.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(num_rounds):
        low_product, high_product = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (high_product >> 32) & _WORD ^ c1 ^ k0,
            high_product & _WORD,
            (low_product >> 32) & _WORD ^ c3 ^ k1,
            low_product & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return [c0, c1, c2, c3]


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Uniform float64 numbers in [0, 1), multiples of 2^-53: one per (seed, position).

    Args:
        seeds: int64, any value (see ``as_int64``); positions: int64 of the same shape, not negative.
    """
    zeros = torch.zeros_like(positions)
    counter = [positions & _WORD, (positions >> 32) & _WORD, zeros, zeros]
    words = philox4x32(counter, [seeds & _WORD, (seeds >> 32) & _WORD])
    return ((words[0] << 21) | (words[1] >> 11)).to(torch.float64) * 2.0**-53


def as_int64(seed: int) -> int:
    """The int64 with the same 64 bits as a seed in [-2^63, 2^64)."""
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"a seed must be in [-2**63, 2**64), not {seed}")
    return seed - (1 << 64) if seed >= 1 << 63 else seed
