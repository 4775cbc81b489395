"""Writes to the paged cache in Triton, of keys and values in one launch. See ``reference.write_kv``."""

import torch
import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: added and subtracted, rounds a float32 half to even


@triton.jit
def write_heads(
    x: tl.tensor,
    stored: tl.tensor,
    scales: tl.tensor,
    token: tl.tensor,
    slot: tl.tensor,
    first_head: tl.tensor,
    num_heads: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    x_head_stride: tl.tensor,
    stored_stride: tl.tensor,
    stored_head_stride: tl.tensor,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write HEADS heads of one token's keys or values, from ``first_head`` on."""
    heads = first_head + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (heads < num_heads) & (columns < size)
    values = tl.load(x + token * x_stride + heads * x_head_stride + columns, mask=inside, other=0.0)
    if scales is not None:
        values = values.to(tl.float32)
        scale = tl.max(tl.abs(values), 1, keep_dims=True) / 127
        broken = tl.sum(tl.where(values == values, 0, 1), 1, keep_dims=True) > 0
        scale = tl.where(broken, float("nan"), scale)
        rounded = values / tl.maximum(scale, 1.1754943508222875e-38) + ROUND - ROUND
        rounded = tl.where(broken, 0.0, tl.minimum(tl.maximum(rounded, -127.0), 127.0))
        tl.store(scales + slot * num_heads + heads, scale, mask=heads < num_heads)
        values = rounded
    target = stored + slot * stored_stride + heads * stored_head_stride + columns
    tl.store(target, values.to(stored.dtype.element_ty), mask=inside)


@triton.jit
def _write_kernel(
    k: tl.tensor,
    v: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    slots: tl.tensor,
    num_heads: tl.tensor,
    k_size: tl.tensor,
    v_size: tl.tensor,
    k_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_stride: tl.tensor,
    v_head_stride: tl.tensor,
    keys_stride: tl.tensor,
    keys_head_stride: tl.tensor,
    values_stride: tl.tensor,
    values_head_stride: tl.tensor,
    HEADS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
) -> None:
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    slot = tl.load(slots + token).to(tl.int64)
    write_heads(
        k, keys, key_scales, token, slot, head, num_heads, k_size, k_stride, k_head_stride, keys_stride,
        keys_head_stride, HEADS, K_BLOCK,
    )  # fmt: skip
    if v is not None:
        write_heads(
            v, values, value_scales, token, slot, head, num_heads, v_size, v_stride, v_head_stride, values_stride,
            values_head_stride, HEADS, V_BLOCK,
        )  # fmt: skip


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    num_tokens, num_heads, k_size = k.shape
    k = k if k.stride(2) == 1 else k.contiguous()
    other = k if v is None else v if v.stride(2) == 1 else v.contiguous()
    block = triton.next_power_of_2(k_size)
    heads = min(triton.next_power_of_2(num_heads), max(1, 2048 // block))
    if num_tokens:
        _write_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
            k, None if v is None else other, keys, values, key_scales, value_scales, slots, num_heads, k_size,
            other.shape[2], k.stride(0), k.stride(1), other.stride(0), other.stride(1), keys.stride(0), keys.stride(1),
            values.stride(0), values.stride(1), HEADS=heads, K_BLOCK=block,
            V_BLOCK=triton.next_power_of_2(other.shape[2]), num_warps=4,
        )  # fmt: skip
