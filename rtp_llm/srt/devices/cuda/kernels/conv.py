"""Causal convolutions with a state in Triton. See ``recurrent.causal_conv1d``.

One launch computes tiles of tokens, each of which finds its piece by bisection; another stores the pieces' last inputs.
"""

import torch
import triton
import triton.language as tl

from rtp_llm.srt.kernels import recurrent
from rtp_llm.srt.kernels.recurrent import StateRows


@triton.jit
def _piece_of(
    cu_seqlens: tl.tensor, tokens: tl.tensor, num_pieces: tl.tensor, STEPS: tl.constexpr, TOKENS: tl.constexpr
) -> tl.tensor:
    """[TOKENS]: the piece n with ``cu_seqlens[n] <= token < cu_seqlens[n + 1]``; there are at most 2 ** STEPS."""
    low, high = tl.zeros([TOKENS], tl.int32), tl.zeros([TOKENS], tl.int32) + num_pieces - 1
    for _ in tl.static_range(STEPS):
        middle = (low + high + 1) // 2
        later = tl.load(cu_seqlens + middle) <= tokens
        low, high = tl.where(later, middle, low), tl.where(later, high, middle - 1)
    return low


@triton.jit
def _seen(
    x: tl.tensor,
    before: tl.tensor,
    states: tl.tensor,
    slots: tl.tensor,
    starts: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    before_stride: tl.tensor,
    KEPT: tl.constexpr,
) -> tl.tensor:
    """Inputs of these tokens, [M, BLOCK]: the step's own, or those before it that the state has."""
    own = inside & (tokens >= starts)[:, None]
    values = tl.load(x + tokens[:, None] * x_stride + columns[None, :], mask=own, other=0.0)
    if before is not None:
        factors = tl.load(before + tokens[:, None] * before_stride + columns[None, :], mask=own, other=0.0)
        values = (factors.to(tl.float32) * values.to(tl.float32)).to(x.dtype.element_ty)
    line = tl.maximum(KEPT + tokens - starts, 0)
    kept = states + (slots * KEPT + line)[:, None] * size + columns[None, :]
    old = tl.load(kept, mask=inside & (tokens < starts)[:, None], other=0.0).to(x.dtype.element_ty)
    return tl.where(own, values, old)


@triton.jit
def _conv_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    states: tl.tensor,
    before: tl.tensor,
    after: tl.tensor,
    y: tl.tensor,
    load: tl.tensor,
    cu_seqlens: tl.tensor,
    num_tokens: tl.tensor,
    num_pieces: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    before_stride: tl.tensor,
    after_stride: tl.tensor,
    KERNEL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STEPS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    dtype = y.dtype.element_ty
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (tokens < num_tokens)[:, None] & (columns < size)[None, :]
    pieces = _piece_of(cu_seqlens, tl.minimum(tokens, num_tokens - 1), num_pieces, STEPS, TOKENS)
    starts, slots = tl.load(cu_seqlens + pieces).to(tl.int64), tl.load(load + pieces).to(tl.int64)
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < size, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(KERNEL):
        at = tokens + (i - (KERNEL - 1))
        seen = _seen(x, before, states, slots, starts, at, columns, inside, size, x_stride, before_stride, KERNEL - 1)
        factor = tl.load(weight + i * size + columns, mask=columns < size, other=0.0).to(tl.float32)
        total += seen.to(tl.float32) * factor[None, :]
    if ACTIVATION == "silu":
        total = total * tl.sigmoid(total)
    elif ACTIVATION == "sigmoid":
        total = tl.sigmoid(total)
    result = total.to(dtype)
    if after is not None:
        factors = tl.load(after + tokens[:, None] * after_stride + columns[None, :], mask=inside, other=0.0)
        result = (factors.to(tl.float32) * result.to(tl.float32)).to(dtype)
    tl.store(y + tokens[:, None] * size + columns[None, :], result, mask=inside)


@triton.jit
def _keep_kernel(
    x: tl.tensor,
    states: tl.tensor,
    before: tl.tensor,
    load: tl.tensor,
    store: tl.tensor,
    cu_seqlens: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    before_stride: tl.tensor,
    KEPT: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    piece, lines = tl.program_id(0), tl.arange(0, LINES)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, end = tl.load(cu_seqlens + piece).to(tl.int64), tl.load(cu_seqlens + piece + 1).to(tl.int64)
    inside = (lines < KEPT)[:, None] & (columns < size)[None, :]
    slots = tl.zeros([LINES], tl.int64) + tl.load(load + piece)
    starts = tl.zeros([LINES], tl.int64) + start
    tokens = end - KEPT + lines
    seen = _seen(x, before, states, slots, starts, tokens, columns, inside, size, x_stride, before_stride, KEPT)
    tl.debug_barrier()  # all of a slot is read before it is written
    target = states + (tl.load(store + piece).to(tl.int64) * KEPT + lines)[:, None] * size + columns[None, :]
    tl.store(target, seen.to(states.dtype.element_ty), mask=inside)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    rows: StateRows,
    activation: str | None = None,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``recurrent.causal_conv1d``."""
    num_tokens, size = x.shape
    kernel_size, num_pieces = len(weight), len(rows.load)
    if kernel_size < 2 or not states.is_contiguous():
        return recurrent.causal_conv1d(x, weight, bias, states, rows, activation, before, after)
    recurrent.activate(x[:0], activation)  # raises if it is unknown
    x = x if x.stride(1) == 1 else x.contiguous()
    before = before if before is None or before.stride(1) == 1 else before.contiguous()
    after = after if after is None or after.stride(1) == 1 else after.contiguous()
    y = torch.empty(num_tokens, size, dtype=x.dtype, device=x.device)
    together = min(16, triton.next_power_of_2(num_tokens))
    block = min(128, triton.next_power_of_2(size))
    before_stride = 0 if before is None else before.stride(0)
    _conv_kernel[(triton.cdiv(num_tokens, together), triton.cdiv(size, block))](
        x, weight.contiguous(), bias, states, before, after, y, rows.load, rows.cu_seqlens, num_tokens, num_pieces,
        size, x.stride(0), before_stride, 0 if after is None else after.stride(0), KERNEL=kernel_size,
        ACTIVATION=activation, STEPS=num_pieces.bit_length(), TOKENS=together, BLOCK=block, num_warps=4,
    )  # fmt: skip
    _keep_kernel[(num_pieces, triton.cdiv(size, block))](
        x, states, before, rows.load, rows.store, rows.cu_seqlens, size, x.stride(0), before_stride,
        KEPT=kernel_size - 1, LINES=triton.next_power_of_2(kernel_size - 1), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return y
