"""What kernels of recurrences have in common: a program has a tile of one head's state, for one piece of tokens."""

import torch
import triton
import triton.language as tl

from rtp_llm.srt.kernels.recurrent import StateRows

MOST_KEYS = 256  # of a state
MOST_KEYS_OF_CHUNK = 128  # with more, chunks would spill registers


class HeadLaunch:
    """What launchers of queries, keys and values by heads have in common.

    Attributes:
        inputs: q and k [T, key heads, k_dim], v [T, heads, v_dim], with contiguous components; out: as v.
        rows: slots to load and to store, and where pieces begin; strides: of tokens and heads of the inputs.
        sizes: heads, heads of a key head, k_dim, v_dim; keys: lines of a tile.
        is_one: each piece is a token; by_chunks: else tokens are computed together, if their keys are not too wide.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: StateRows) -> None:
        (num_tokens, num_heads, v_dim), (key_heads, k_dim) = v.shape, k.shape[1:]
        self.inputs = [x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v)]
        self.out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        self.rows = rows.load, rows.store, rows.cu_seqlens
        self.strides = [x.stride(i) for x in self.inputs for i in (0, 1)]
        self.sizes = num_heads, num_heads // key_heads, k_dim, v_dim
        self.keys = max(16, triton.next_power_of_2(k_dim))
        self.is_one = num_tokens == len(rows.load)
        self.by_chunks = not self.is_one and self.keys <= MOST_KEYS_OF_CHUNK

    def grid(self, columns: int) -> tuple[int, int, int]:
        """Programs of so many columns each."""
        num_heads, _, _, v_dim = self.sizes
        return len(self.rows[0]), num_heads, triton.cdiv(v_dim, columns)


@triton.jit
def state_tile(
    head: tl.tensor,
    k_dim: tl.tensor,
    v_dim: tl.tensor,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """(keys, columns, their places in a slot, which of these are in the state); columns are of ``program_id(2)``."""
    keys, columns = tl.arange(0, KEYS), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    places = (head * k_dim + keys[:, None]) * v_dim + columns[None, :]
    return keys, columns, places, (keys < k_dim)[:, None] & (columns < v_dim)[None, :]


@triton.jit
def slot_of(states: tl.tensor, slots: tl.tensor, piece: tl.tensor, slot_size: tl.tensor) -> tl.tensor:
    """Where the slot of a piece begins."""
    return states + tl.load(slots + piece).to(tl.int64) * slot_size


@triton.jit
def tokens_of(cu_seqlens: tl.tensor, piece: tl.tensor, ONE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(first, end) of a piece's tokens. ONE: each piece is a token."""
    if ONE:
        return piece.to(tl.int64), piece.to(tl.int64) + 1
    else:
        return tl.load(cu_seqlens + piece).to(tl.int64), tl.load(cu_seqlens + piece + 1).to(tl.int64)


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    small = tl.exp(tl.minimum(x, 0.0))  # log(1 + y) of a small y is y (1 - y / 2)
    usual = tl.log(1.0 + tl.exp(tl.minimum(x, 20.0)))
    return tl.where(x > 20.0, x, tl.where(x < -8.0, small * (1.0 - 0.5 * small), usual))
