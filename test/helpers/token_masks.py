"""Masks of tokens, as a grammar makes them."""

from collections.abc import Sequence

import numpy as np

from rtp_llm.srt.plan import TokenMasks


def masks_of(rows: list[int], allowed: Sequence[Sequence[int]], vocab_size: int) -> TokenMasks:
    """Return the masks under which ``allowed[i]`` are the tokens that may come next in ``rows[i]``."""
    num_words = (vocab_size + 31) // 32
    bits = np.zeros((len(rows), 32 * num_words), dtype=np.uint8)
    for line, ids in zip(bits, allowed, strict=True):
        line[list(ids)] = 1
    packed = np.packbits(bits, axis=1, bitorder="little")
    return TokenMasks(rows, packed.view(np.int32).reshape(len(rows), num_words))
