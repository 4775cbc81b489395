"""Rotary positions in Triton, after a norm of each head or without one. See ``kernels/reference.py``.

A program has some heads of one token, of queries or of keys: one launch rotates both.
"""

import torch
import triton
import triton.language as tl

from rtp_llm.srt.kernels import reference

TILE = 1024  # numbers that a program reads, unless a token has fewer
NONE, RMS, GEMMA = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _rotate_heads(
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    first_head: tl.tensor,
    num_heads: tl.tensor,
    x_stride: tl.tensor,
    x_head_stride: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    half: tl.tensor,
    head_size: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
    NEOX: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    dtype = y.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    heads = first_head + tl.arange(0, HEADS)[:, None]
    source, target = x + token * x_stride + heads * x_head_stride, y + (token * num_heads + heads) * head_size
    pairs = tl.arange(0, HALF)[None, :]
    first_places, second_places = (pairs, pairs + half) if NEOX else (2 * pairs, 2 * pairs + 1)
    inside = (heads < num_heads) & (pairs < half)
    first = tl.load(source + first_places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + second_places, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0
    if NORM != NONE:
        columns = tl.arange(0, WHOLE)[None, :]
        whole = tl.load(source + columns, mask=(heads < num_heads) & (columns < head_size), other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(whole * whole, 1) / head_size + eps)[:, None]
        first = _normed(first, factor, weight, first_places, pairs < half, dtype, NORM)
        second = _normed(second, factor, weight, second_places, pairs < half, dtype, NORM)
    c = tl.load(cos + token * half + pairs, mask=pairs < half, other=0.0).to(tl.float32)
    s = tl.load(sin + token * half + pairs, mask=pairs < half, other=0.0).to(tl.float32)
    tl.store(target + first_places, (first * c - second * s).to(dtype), mask=inside)
    tl.store(target + second_places, (second * c + first * s).to(dtype), mask=inside)
    if REST:
        others = 2 * half + tl.arange(0, REST)[None, :]
        inside = (heads < num_heads) & (others < head_size)
        kept = tl.load(source + others, mask=inside, other=0.0).to(tl.float32)
        if NORM != NONE:
            kept = _normed(kept, factor, weight, others, others < head_size, dtype, NORM)
        tl.store(target + others, kept.to(dtype), mask=inside)


@triton.jit
def _normed(
    values: tl.tensor,
    factor: tl.tensor,
    weight: tl.tensor,
    places: tl.tensor,
    inside: tl.tensor,
    dtype: tl.constexpr,
    NORM: tl.constexpr,
) -> tl.tensor:
    weights = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    if NORM == RMS:
        normed = (values * factor).to(dtype).to(tl.float32) * weights
    else:
        normed = values * factor * (1.0 + weights)
    return normed.to(dtype).to(tl.float32)


@triton.jit
def _rotary_kernel(
    q: tl.tensor,
    k: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    q_heads: tl.tensor,
    k_heads: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_stride: tl.tensor,
    k_head_stride: tl.tensor,
    half: tl.tensor,
    head_size: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
    NEOX: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    part = tl.program_id(1)
    q_parts = tl.cdiv(q_heads, HEADS)
    if part < q_parts:
        _rotate_heads(
            q, q_weight, q_out, part * HEADS, q_heads, q_stride, q_head_stride, cos, sin, half, head_size, eps, NORM,
            NEOX, HEADS, HALF, REST, WHOLE,
        )  # fmt: skip
    else:
        _rotate_heads(
            k, k_weight, k_out, (part - q_parts) * HEADS, k_heads, k_stride, k_head_stride, cos, sin, half, head_size,
            eps, NORM, NEOX, HEADS, HALF, REST, WHOLE,
        )  # fmt: skip


def _rotated(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: tuple[torch.Tensor | None, torch.Tensor | None],
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox_style: bool,
    norm: tl.constexpr,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, q_heads, head_size = q.shape
    half, k_heads = cos.shape[1], k.shape[1]
    if len(cos) != num_tokens or k.shape[::2] != q.shape[::2] or 2 * half > head_size:
        raise ValueError(
            f"cosines {list(cos.shape)} do not go with queries {list(q.shape)} and keys {list(k.shape)}, "
            f"[tokens, heads, head size]"
        )
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    whole = triton.next_power_of_2(head_size)
    heads = min(triton.next_power_of_2(max(q_heads, 1)), max(1, TILE // whole))
    rest = head_size - 2 * half
    if num_tokens:
        _rotary_kernel[(num_tokens, triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads))](
            q, k, *weights, cos.contiguous(), sin.contiguous(), q_out, k_out, q_heads, k_heads, q.stride(0),
            q.stride(1), k.stride(0), k.stride(1), half, head_size, eps, NORM=norm.value, NEOX=is_neox_style,
            HEADS=heads, HALF=triton.next_power_of_2(half), REST=triton.next_power_of_2(rest) if rest else 0,
            WHOLE=whole, num_warps=4,
        )  # fmt: skip
    return q_out, k_out


def rotary_pair(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox_style: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if not q.dtype == k.dtype == cos.dtype == sin.dtype or not cos.shape[1]:
        return reference.rotary_pair(q, k, cos, sin, is_neox_style)
    return _rotated(q, k, (None, None), 0.0, cos, sin, is_neox_style, NONE)


def norm_rotary_pair(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox_style: bool,
    is_gemma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtypes = {x.dtype for x in (q, k, cos, sin)} if is_gemma else {x.dtype for x in (q, k, cos, sin, *weights)}
    if len(dtypes) > 1 or not cos.shape[1]:
        return reference.norm_rotary_pair(q, k, weights, eps, cos, sin, is_neox_style, is_gemma)
    return _rotated(q, k, weights, eps, cos, sin, is_neox_style, GEMMA if is_gemma else RMS)
