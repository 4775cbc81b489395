"""The gated delta rule in Triton: prompts by chunks of 16 tokens, with the equations of
``recurrent.delta_rule_chunks``, and decoding rows token by token, as ``recurrent.delta_rule_step`` defines it.

A program has some columns of one head's state for one piece of tokens. The triangular system of a chunk is solved by
substitution: powers of its matrix would cancel out where keys are alike.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from rtp_llm.srt.devices.cuda.kernels.gpu import generation, input_precision
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
COLUMNS = 32  # of the state that a program has, token by token


@triton.jit
def _running_sums(x: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """``cumsum`` over lines of [CHUNK, columns], for which Triton 3.6 has no code in some layouts."""
    lines, total = tl.arange(0, CHUNK)[:, None], tl.zeros_like(x)
    for j in range(CHUNK):
        total += tl.where(lines >= j, tl.sum(tl.where(lines == j, x, 0.0), 0)[None, :], 0.0)
    return total


@triton.jit
def _scores(
    left: tl.tensor,
    right: tl.tensor,
    total: tl.tensor,
    BY_CHANNEL: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """[CHUNK, CHUNK]: ``left[t] . exp(total[t] - total[j]) right[j]`` for j <= t, else 0."""
    lines = tl.arange(0, CHUNK)
    if BY_CHANNEL:
        scores = tl.zeros([CHUNK, CHUNK], tl.float32)
        for j in range(CHUNK):
            is_j = (lines == j)[:, None]
            right_j, total_j = tl.sum(tl.where(is_j, right, 0.0), 0), tl.sum(tl.where(is_j, total, 0.0), 0)
            decay = tl.exp(tl.where((lines >= j)[:, None], total - total_j[None, :], float("-inf")))
            column = tl.sum(left * decay * right_j[None, :], 1)
            scores = tl.where((lines == j)[None, :], column[:, None], scores)
        return scores
    else:
        earlier = lines[None, :] <= lines[:, None]
        decay = tl.exp(tl.where(earlier, total - tl.trans(total), float("-inf")))
        return tl.dot(left, tl.trans(right), input_precision=PRECISION) * decay


@triton.jit
def _solved(system: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """The inverse of I + system, which is strictly lower triangular: row i of it is ``e_i - system[i] @ inverse``."""
    lines = tl.arange(0, CHUNK)
    inverse = tl.where(lines[:, None] == lines[None, :], 1.0, 0.0)
    for i in range(1, CHUNK):
        is_i = (lines == i)[:, None]
        factors = tl.sum(tl.where(is_i, system, 0.0), 0)
        row = tl.sum(factors[:, None] * inverse, 0)
        inverse = tl.where(is_i, inverse - row[None, :], inverse)
    return inverse


# long: half of it is the signature, an argument a line
@triton.jit
def _delta_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
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
    num_heads: tl.tensor,
    heads_per_key: tl.tensor,
    k_dim: tl.tensor,
    v_dim: tl.tensor,
    scale: tl.tensor,
    BY_CHANNEL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    piece, head = tl.program_id(0), tl.program_id(1)
    keys, columns, places, in_state = state_tile(head, k_dim, v_dim, KEYS, COLUMNS)
    lines, key_there, column_there = tl.arange(0, CHUNK), keys < k_dim, columns < v_dim
    slot_size = num_heads * k_dim * v_dim
    state = tl.load(slot_of(states, load, piece, slot_size) + places, mask=in_state, other=0.0)
    first, end = tokens_of(cu_seqlens, piece, False)
    key_head = head // heads_per_key
    for start in range(first, end, CHUNK):
        tokens = start + lines
        there = tokens < end
        mask = there[:, None] & key_there[None, :]
        kc = tl.load(k + tokens[:, None] * k_stride + key_head * k_head_stride + keys[None, :], mask=mask, other=0.0)
        vc = tl.load(
            v + tokens[:, None] * v_stride + head * v_head_stride + columns[None, :],
            mask=there[:, None] & column_there[None, :], other=0.0,
        )  # fmt: skip
        kc, vc = kc.to(tl.float32), vc.to(tl.float32)
        if NORMALIZE:
            kc = kc * tl.rsqrt(tl.sum(kc * kc, 1) + 1e-6)[:, None]
        written = tl.load(beta + tokens * num_heads + head, mask=there, other=0.0).to(tl.float32)[:, None]
        if BY_CHANNEL:
            decays = tl.load(g + (tokens[:, None] * num_heads + head) * k_dim + keys[None, :], mask=mask, other=0.0)
            decays = decays.to(tl.float32)
            total, whole = _running_sums(decays, CHUNK), tl.sum(decays, 0)
        else:
            decays = tl.load(g + tokens * num_heads + head, mask=there, other=0.0).to(tl.float32)
            total, whole = tl.cumsum(decays, 0)[:, None], tl.sum(decays[:, None], 0)
        since = tl.exp(total)
        wanted = written * (vc - tl.dot(since * kc, state, input_precision=PRECISION))
        if end - start > 1:
            system = written * _scores(kc, kc, total, BY_CHANNEL, CHUNK, PRECISION)
            system = tl.where(lines[:, None] > lines[None, :], system, 0.0)
            wanted = tl.dot(_solved(system, CHUNK), wanted, input_precision=PRECISION)
        qc = tl.load(q + tokens[:, None] * q_stride + key_head * q_head_stride + keys[None, :], mask=mask, other=0.0)
        qc = qc.to(tl.float32)
        if NORMALIZE:
            qc = qc * tl.rsqrt(tl.sum(qc * qc, 1) + 1e-6)[:, None]
        qc = qc * scale
        result = tl.dot(since * qc, state, input_precision=PRECISION)
        scores = _scores(qc, kc, total, BY_CHANNEL, CHUNK, PRECISION)
        result = tl.dot(scores, wanted, result, input_precision=PRECISION)
        target = out + (tokens[:, None] * num_heads + head) * v_dim + columns[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=there[:, None] & column_there[None, :])
        to_end = tl.exp(whole[None, :] - total) * kc
        state = tl.dot(tl.trans(to_end), wanted, tl.exp(whole)[:, None] * state, input_precision=PRECISION)
    tl.store(slot_of(states, store, piece, slot_size) + places, state, mask=in_state)


# long: half of it is the signature, an argument a line
@triton.jit
def _delta_tokens_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
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
    num_heads: tl.tensor,
    heads_per_key: tl.tensor,
    k_dim: tl.tensor,
    v_dim: tl.tensor,
    scale: tl.tensor,
    BY_CHANNEL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ONE: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Token by token. ONE: each piece is a token."""
    piece, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    keys, columns, places, in_state = state_tile(head, k_dim, v_dim, KEYS, COLUMNS)
    key_there, column_there = keys < k_dim, columns < v_dim
    slot_size, key_head = num_heads * k_dim * v_dim, head // heads_per_key
    state = tl.load(slot_of(states, load, piece, slot_size) + places, mask=in_state, other=0.0)
    first, end = tokens_of(cu_seqlens, piece, ONE)
    for token in range(first, end):
        of_token = token * num_heads + head
        query = tl.load(q + token * q_stride + key_head * q_head_stride + keys, mask=key_there, other=0.0)
        key = tl.load(k + token * k_stride + key_head * k_head_stride + keys, mask=key_there, other=0.0)
        value = tl.load(v + token * v_stride + head * v_head_stride + columns, mask=column_there, other=0.0)
        query, key = query.to(tl.float32), key.to(tl.float32)
        if NORMALIZE:
            query = query * tl.rsqrt(tl.sum(query * query, 0) + 1e-6)
            key = key * tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
        if BY_CHANNEL:
            decays = tl.load(g + of_token * k_dim + keys, mask=key_there, other=0.0).to(tl.float32)
            state = state * tl.exp(decays)[:, None]
        else:
            state = state * tl.exp(tl.load(g + of_token).to(tl.float32))
        wanted = value.to(tl.float32) - tl.sum(key[:, None] * state, 0)
        wanted = tl.load(beta + of_token).to(tl.float32) * wanted
        state += key[:, None] * wanted[None, :]
        result = tl.sum((query * scale)[:, None] * state, 0)
        tl.store(out + of_token * v_dim + columns, result.to(out.dtype.element_ty), mask=column_there)
    tl.store(slot_of(states, store, piece, slot_size) + places, state, mask=in_state)


def _tile(by_channel: bool) -> tuple[int, int]:
    """(columns, warps) of a program for chunks. Registers are what limits it: none may be spilled."""
    return (32, 8) if generation() >= 9 else (16, 8 if by_channel else 4)


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    states: torch.Tensor,
    rows: StateRows,
    normalize: bool = True,
) -> torch.Tensor:
    """See ``recurrent.gated_delta_rule``."""
    k_dim = k.shape[2]
    if k_dim > MOST_KEYS or not states.is_contiguous():
        return recurrent.gated_delta_rule(q, k, v, g, beta, states, rows, normalize)
    launch = HeadLaunch(q, k, v, rows)
    arguments = (
        *launch.inputs, g.contiguous(), beta.contiguous(), states, launch.out, *launch.rows, *launch.strides,
        *launch.sizes, k_dim**-0.5,
    )  # fmt: skip
    columns, num_warps = _tile(g.dim() == 3) if launch.by_chunks else (COLUMNS, 4)
    constants: dict[str, Any] = {"BY_CHANNEL": g.dim() == 3, "NORMALIZE": normalize}
    constants |= {"KEYS": launch.keys, "COLUMNS": columns, "num_warps": num_warps}
    if launch.by_chunks:
        constants |= {"CHUNK": CHUNK, "PRECISION": input_precision(v.dtype)}
        _delta_kernel[launch.grid(columns)](*arguments, **constants)
    else:
        _delta_tokens_kernel[launch.grid(columns)](*arguments, ONE=launch.is_one, **constants)
    return launch.out


@triton.jit
def _gates_kernel(
    a: tl.tensor,
    b: tl.tensor,
    rate: tl.tensor,
    dt_bias: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
    num: tl.tensor,
    num_heads: tl.tensor,
    per_head: tl.tensor,
    most_written: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num
    of_token = places % (num_heads * per_head)
    x = tl.load(a + places, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(dt_bias + of_token, mask=inside, other=0.0).to(tl.float32)
    decay = tl.load(rate + of_token // per_head, mask=inside, other=0.0).to(tl.float32)
    tl.store(g + places, decay * softplus(x), mask=inside)
    is_first = inside & (places % per_head == 0)
    logits = tl.load(b + places // per_head, mask=is_first, other=0.0).to(tl.float32)
    opened = tl.sigmoid(logits).to(beta.dtype.element_ty).to(tl.float32) * most_written
    tl.store(beta + places // per_head, opened.to(beta.dtype.element_ty), mask=is_first)


def delta_gates(
    a: torch.Tensor, b: torch.Tensor, rate: torch.Tensor, dt_bias: torch.Tensor, most_written: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``recurrent.delta_gates``."""
    a, b = a.contiguous(), b.contiguous()
    g, beta = torch.empty(a.shape, dtype=torch.float32, device=a.device), torch.empty_like(b)
    num_heads = b.shape[1]
    if a.numel():
        _gates_kernel[(triton.cdiv(a.numel(), 256),)](
            a, b, rate.contiguous(), dt_bias.contiguous(), g, beta, a.numel(), num_heads, a.numel() // b.numel(),
            most_written, BLOCK=256, num_warps=4,
        )  # fmt: skip
    return g, beta
