"""Linear attention, Mamba and other recurrences in Triton. See ``kernels/recurrent.py``.

Linear attention and Mamba 2 go by chunks of tokens, with products of matrices, and decoding rows by their token alone.
Recurrences of single numbers go token by token.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from rtp_llm.srt.devices.cuda.kernels.gpu import input_precision
from rtp_llm.srt.devices.cuda.kernels.state_tiles import (
    MOST_KEYS,
    HeadLaunch,
    slot_of,
    softplus,
    state_tile,
    tokens_of,
)
from rtp_llm.srt.kernels import recurrent
from rtp_llm.srt.kernels.recurrent import StateRows

CHUNK = 16
COLUMNS = 32  # of a state that a program has
CHANNELS = 64  # of a recurrence of single numbers


@triton.jit
def _time_step(
    dt: tl.tensor, dt_bias: tl.tensor, head: tl.tensor, there: tl.tensor, dt_least: tl.tensor, dt_most: tl.tensor
) -> tl.tensor:
    step = tl.load(dt, mask=there, other=0.0).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + head).to(tl.float32)
    return tl.minimum(tl.maximum(softplus(step), dt_least), dt_most)


# long: half of it is the signature, an argument a line
@triton.jit
def _attention_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    decay: tl.tensor,
    dt: tl.tensor,
    dt_bias: tl.tensor,
    d: tl.tensor,
    states: tl.tensor,
    out: tl.tensor,
    load: tl.tensor,
    store: tl.tensor,
    cu_seqlens: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_stride: tl.tensor,
    v_head_stride: tl.tensor,
    dt_stride: tl.tensor,
    num_heads: tl.tensor,
    heads_per_key: tl.tensor,
    k_dim: tl.tensor,
    v_dim: tl.tensor,
    dt_least: tl.tensor,
    dt_most: tl.tensor,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """With ``dt`` the state-space dual, else linear attention; ``decay``: [num_heads]."""
    piece, head = tl.program_id(0), tl.program_id(1)
    keys, columns, places, in_state = state_tile(head, k_dim, v_dim, KEYS, COLUMNS)
    lines, key_there, column_there = tl.arange(0, CHUNK), keys < k_dim, columns < v_dim
    slot_size = num_heads * k_dim * v_dim
    state = tl.load(slot_of(states, load, piece, slot_size) + places, mask=in_state, other=0.0)
    first, end = tokens_of(cu_seqlens, piece, False)
    key_head, rate = head // heads_per_key, tl.load(decay + head).to(tl.float32)
    for start in range(first, end, CHUNK):
        tokens = start + lines
        there = tokens < end
        mask, v_mask = there[:, None] & key_there[None, :], there[:, None] & column_there[None, :]
        qc = tl.load(q + tokens[:, None] * q_stride + key_head * q_head_stride + keys[None, :], mask=mask, other=0.0)
        kc = tl.load(k + tokens[:, None] * k_stride + key_head * k_head_stride + keys[None, :], mask=mask, other=0.0)
        vc = tl.load(v + tokens[:, None] * v_stride + head * v_head_stride + columns[None, :], mask=v_mask, other=0.0)
        qc, kc, vc = qc.to(tl.float32), kc.to(tl.float32), vc.to(tl.float32)
        scaled, decays = vc, tl.where(there, rate, 0.0)
        if dt is not None:
            step = _time_step(dt + tokens * dt_stride + head, dt_bias, head, there, dt_least, dt_most)
            scaled, decays = step[:, None] * vc, tl.where(there, step * rate, 0.0)
        total, whole = tl.cumsum(decays, 0)[:, None], tl.sum(decays, 0)
        earlier = lines[None, :] <= lines[:, None]
        between = tl.exp(tl.where(earlier, total - tl.trans(total), float("-inf")))
        scores = tl.dot(qc, tl.trans(kc), input_precision=PRECISION) * between
        result = tl.dot(tl.exp(total) * qc, state, input_precision=PRECISION)
        result = tl.dot(scores, scaled, result, input_precision=PRECISION)
        if d is not None:
            result += tl.load(d + head).to(tl.float32) * vc
        target = out + (tokens[:, None] * num_heads + head) * v_dim + columns[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=v_mask)
        to_end = tl.exp(whole - total) * kc
        state = tl.dot(tl.trans(to_end), scaled, tl.exp(whole) * state, input_precision=PRECISION)
    tl.store(slot_of(states, store, piece, slot_size) + places, state, mask=in_state)


# long: half of it is the signature, an argument a line
@triton.jit
def _attention_tokens_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    decay: tl.tensor,
    dt: tl.tensor,
    dt_bias: tl.tensor,
    d: tl.tensor,
    states: tl.tensor,
    out: tl.tensor,
    load: tl.tensor,
    store: tl.tensor,
    cu_seqlens: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_stride: tl.tensor,
    v_head_stride: tl.tensor,
    dt_stride: tl.tensor,
    num_heads: tl.tensor,
    heads_per_key: tl.tensor,
    k_dim: tl.tensor,
    v_dim: tl.tensor,
    dt_least: tl.tensor,
    dt_most: tl.tensor,
    ONE: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """As ``_attention_kernel``, token by token. ONE: each piece is a token."""
    piece, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    keys, columns, places, in_state = state_tile(head, k_dim, v_dim, KEYS, COLUMNS)
    key_there, column_there = keys < k_dim, columns < v_dim
    slot_size, key_head, rate = num_heads * k_dim * v_dim, head // heads_per_key, tl.load(decay + head).to(tl.float32)
    state = tl.load(slot_of(states, load, piece, slot_size) + places, mask=in_state, other=0.0)
    first, end = tokens_of(cu_seqlens, piece, ONE)
    for token in range(first, end):
        query = tl.load(q + token * q_stride + key_head * q_head_stride + keys, mask=key_there, other=0.0)
        key = tl.load(k + token * k_stride + key_head * k_head_stride + keys, mask=key_there, other=0.0)
        value = tl.load(v + token * v_stride + head * v_head_stride + columns, mask=column_there, other=0.0)
        value = value.to(tl.float32)
        scaled, total = value, rate
        if dt is not None:
            step = _time_step(dt + token * dt_stride + head, dt_bias, head, True, dt_least, dt_most)
            scaled, total = step * value, step * rate
        state = tl.exp(total) * state + key.to(tl.float32)[:, None] * scaled[None, :]
        result = tl.sum(query.to(tl.float32)[:, None] * state, 0)
        if d is not None:
            result += tl.load(d + head).to(tl.float32) * value
        target = out + (token * num_heads + head) * v_dim + columns
        tl.store(target, result.to(out.dtype.element_ty), mask=column_there)
    tl.store(slot_of(states, store, piece, slot_size) + places, state, mask=in_state)


def _attended(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    states: torch.Tensor,
    rows: StateRows,
    dt: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    d: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, 0.0),
) -> torch.Tensor:
    launch = HeadLaunch(q, k, v, rows)
    dt = dt if dt is None or dt.stride(1) == 1 else dt.contiguous()
    arguments = (
        *launch.inputs, decay, dt, dt_bias, d, states, launch.out, *launch.rows, *launch.strides,
        0 if dt is None else dt.stride(0), *launch.sizes, *dt_limit,
    )  # fmt: skip
    constants: dict[str, Any] = {"KEYS": launch.keys, "COLUMNS": COLUMNS, "num_warps": 4}
    if launch.by_chunks:
        constants |= {"CHUNK": CHUNK, "PRECISION": input_precision(v.dtype)}
        _attention_kernel[launch.grid(COLUMNS)](*arguments, **constants)
    else:
        _attention_tokens_kernel[launch.grid(COLUMNS)](*arguments, ONE=launch.is_one, **constants)
    return launch.out


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    states: torch.Tensor,
    rows: StateRows,
) -> torch.Tensor:
    """See ``recurrent.linear_attention``."""
    if k.shape[2] > MOST_KEYS or not states.is_contiguous():
        return recurrent.linear_attention(q, k, v, log_decay, states, rows)
    return _attended(q, k, v, log_decay.contiguous(), states, rows)


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    states: torch.Tensor,
    rows: StateRows,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> torch.Tensor:
    """See ``recurrent.ssd``."""
    if b.shape[2] > MOST_KEYS or not states.is_contiguous():
        return recurrent.ssd(x, dt, a, b, c, d, dt_bias, states, rows, dt_limit)
    return _attended(c, b, x, a.contiguous(), states, rows, dt, dt_bias, d, dt_limit)


@triton.jit
def _selective_scan_kernel(
    x: tl.tensor,
    dt: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    dt_bias: tl.tensor,
    states: tl.tensor,
    out: tl.tensor,
    load: tl.tensor,
    store: tl.tensor,
    cu_seqlens: tl.tensor,
    num_channels: tl.tensor,
    state_size: tl.tensor,
    x_stride: tl.tensor,
    dt_stride: tl.tensor,
    b_stride: tl.tensor,
    c_stride: tl.tensor,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    piece = tl.program_id(0)
    channels, lines = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, STATES)
    there, line_there = channels < num_channels, lines < state_size
    inside = line_there[:, None] & there[None, :]
    places = lines[:, None] * num_channels + channels[None, :]
    slot_size = state_size * num_channels
    rates = tl.load(a + places, mask=inside, other=0.0).to(tl.float32)
    state = tl.load(slot_of(states, load, piece, slot_size) + places, mask=inside, other=0.0)
    first, end = tokens_of(cu_seqlens, piece, False)
    for token in range(first, end):
        value = tl.load(x + token * x_stride + channels, mask=there, other=0.0).to(tl.float32)
        step = tl.load(dt + token * dt_stride + channels, mask=there, other=0.0).to(tl.float32)
        if dt_bias is not None:
            step += tl.load(dt_bias + channels, mask=there, other=0.0).to(tl.float32)
        step = softplus(step)
        to_state = tl.load(b + token * b_stride + lines, mask=line_there, other=0.0).to(tl.float32)
        of_state = tl.load(c + token * c_stride + lines, mask=line_there, other=0.0).to(tl.float32)
        state = tl.exp(step[None, :] * rates) * state + (step * value)[None, :] * to_state[:, None]
        result = tl.sum(state * of_state[:, None], 0)
        if d is not None:
            result += tl.load(d + channels, mask=there, other=0.0).to(tl.float32) * value
        tl.store(out + token * num_channels + channels, result.to(out.dtype.element_ty), mask=there)
    tl.store(slot_of(states, store, piece, slot_size) + places, state, mask=inside)


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    states: torch.Tensor,
    rows: StateRows,
) -> torch.Tensor:
    """See ``recurrent.selective_scan``."""
    if not states.is_contiguous():
        return recurrent.selective_scan(x, dt, a, b, c, d, dt_bias, states, rows)
    x, dt, b, c = (y if y.stride(1) == 1 else y.contiguous() for y in (x, dt, b, c))
    state_size, num_channels = a.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _selective_scan_kernel[(len(rows.load), triton.cdiv(num_channels, CHANNELS))](
        x, dt, a.contiguous(), b, c, d, dt_bias, states, out, rows.load, rows.store, rows.cu_seqlens, num_channels,
        state_size, x.stride(0), dt.stride(0), b.stride(0), c.stride(0), STATES=triton.next_power_of_2(state_size),
        CHANNELS=CHANNELS, num_warps=2,
    )  # fmt: skip
    return out


@triton.jit
def _recurrence_kernel(
    x: tl.tensor,
    log_decay: tl.tensor,
    states: tl.tensor,
    out: tl.tensor,
    load: tl.tensor,
    store: tl.tensor,
    cu_seqlens: tl.tensor,
    num_channels: tl.tensor,
    x_stride: tl.tensor,
    decay_stride: tl.tensor,
    CHANNELS: tl.constexpr,
) -> None:
    piece, channels = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = channels < num_channels
    state = tl.load(slot_of(states, load, piece, num_channels) + channels, mask=there, other=0.0)
    first, end = tokens_of(cu_seqlens, piece, False)
    for token in range(first, end):
        value = tl.load(x + token * x_stride + channels, mask=there, other=0.0).to(tl.float32)
        decay = tl.load(log_decay + token * decay_stride + channels, mask=there, other=0.0).to(tl.float32)
        state = tl.exp(decay) * state + value
        tl.store(out + token * num_channels + channels, state.to(out.dtype.element_ty), mask=there)
    tl.store(slot_of(states, store, piece, num_channels) + channels, state, mask=there)


def linear_recurrence(x: torch.Tensor, log_decay: torch.Tensor, states: torch.Tensor, rows: StateRows) -> torch.Tensor:
    """See ``recurrent.linear_recurrence``."""
    if not states.is_contiguous():
        return recurrent.linear_recurrence(x, log_decay, states, rows)
    x, log_decay = (y if y.stride(1) == 1 else y.contiguous() for y in (x, log_decay))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _recurrence_kernel[(len(rows.load), triton.cdiv(x.shape[1], CHANNELS))](
        x, log_decay, states, out, rows.load, rows.store, rows.cu_seqlens, x.shape[1], x.stride(0), log_decay.stride(0),
        CHANNELS=CHANNELS, num_warps=2,
    )  # fmt: skip
    return out
