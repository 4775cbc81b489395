"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

The numbers for (seed, position) are a pure function of both, so a request draws the same tokens whichever requests are
in its batch and however often it is interrupted. 32-bit words are held in int64 tensors: the low 64 bits of a product
are right in two's complement, whatever its sign.
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


def exponential(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Exponentially distributed float64 numbers: one per (seed, position) and token.

    Each group of 64 tokens has 16 counters of four words. Words of two of Philox's streams are the upper and the lower
    half of a number of 64 bits: even very rare tokens keep their probability.

    Args:
        seeds: [D] int64, any value (see ``as_int64``); positions: [D] int64, not negative.

    Returns:
        [D, vocab_size], each greater than 0.
    """
    token_ids = torch.arange(vocab_size, device=seeds.device)
    counters, word = token_ids // 64 * 16 + token_ids % 16, token_ids // 16 % 4
    upper, lower = (_words(seeds, positions, counters, word, stream) for stream in (0, 1))
    u = upper.double() * 2.0**-32 + (lower.double() + 0.5) * 2.0**-64
    return -torch.log1p(-u)


def _words(
    seeds: torch.Tensor, positions: torch.Tensor, counters: torch.Tensor, word: torch.Tensor, stream: int
) -> torch.Tensor:
    shape = (len(seeds), len(counters))
    counter = [
        (positions & _WORD)[:, None].expand(shape),
        ((positions >> 32) & _WORD)[:, None].expand(shape),
        counters.expand(shape),
        torch.full_like(counters, stream).expand(shape),
    ]
    words = philox4x32(counter, [(seeds & _WORD)[:, None], ((seeds >> 32) & _WORD)[:, None]])
    return torch.where(
        word == 0, words[0], torch.where(word == 1, words[1], torch.where(word == 2, words[2], words[3]))
    )


def as_int64(seed: int) -> int:
    """Return the int64 with the same 64 bits as a seed in [-2^63, 2^64)."""
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"a seed must be in [-2**63, 2**64), not {seed}")
    return seed - (1 << 64) if seed >= 1 << 63 else seed
