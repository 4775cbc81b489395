"""Launches of ``attention.py``: tiles by dtype and head size, splits by the number of programs, and the merge."""

from typing import Any

import torch
import triton

from rtp_llm.srt.devices.cuda.attention_rows import (
    LEVELS,
    DecodeRows,
    ExtendRows,
    NewTokens,
    PagedCache,
    Scores,
    SharedRows,
)
from rtp_llm.srt.devices.cuda.kernels import attention as kernels
from rtp_llm.srt.devices.cuda.kernels.gpu import generation, input_precision

PROGRAMS = 528  # that a launch should have: four for each processor of an H200
MOST_SPLITS = 64
MOST_PREFIX_SPLITS = 16


def _pieces(head_dim: int, v_head_dim: int) -> dict[str, int]:
    """Powers of two that a head's components are computed in: keys in two parts, values in one."""
    d1 = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(0, head_dim - d1)
    return {
        "HEAD_DIM": head_dim,
        "V_DIM": v_head_dim,
        "D1": d1,
        "D2": max(16, triton.next_power_of_2(rest)) if rest else 0,
        "DV": max(16, triton.next_power_of_2(v_head_dim)),
    }


def _common(q: torch.Tensor, cache: PagedCache, scores: Scores, latent: bool) -> dict[str, Any]:
    """The constants that all kernels take."""
    pieces = _pieces(q.shape[2], cache.values.shape[2])
    if latent and pieces["D1"] != pieces["V_DIM"]:
        latent = False  # values are read by themselves
    return pieces | {
        "GROUP": q.shape[1] // cache.keys.shape[1],
        "CAPPED": scores.logit_cap > 0,
        "LATENT": latent,
        "PAGE_SIZE": cache.page_size,
        "PRECISION": input_precision(q.dtype),
    }


def _strides(q: torch.Tensor, cache: PagedCache) -> tuple[int, ...]:
    keys, values = cache.keys, cache.values
    return (
        q.stride(0), q.stride(1), cache.page_table.stride(0), keys.stride(0), keys.stride(1), values.stride(0),
        values.stride(1), keys.shape[1],
    )  # fmt: skip


def _new(tokens: NewTokens | None) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...]]:
    """Keys, values and slots, and the strides of both."""
    if tokens is None:
        return (None, None, None), (0, 0, 0, 0)
    k, v = (x if x is None or x.stride(2) == 1 else x.contiguous() for x in (tokens.k, tokens.v))
    of_values = (0, 0) if v is None else (v.stride(0), v.stride(1))
    assert k is not None, "a token has a key"
    return (k, v, tokens.slots), (k.stride(0), k.stride(1), *of_values)


def _keys_at_once(q: torch.Tensor, cache: PagedCache) -> int:
    size = 64 if q.shape[2] <= 128 else 32
    return size // 2 if q.dtype == torch.float32 or cache.key_scales is not None else size


def num_splits(programs: int, most_tokens: int, block: int) -> int:
    """The number of splits of keys: as many as processors can use, and none of less than four blocks."""
    wanted = triton.cdiv(PROGRAMS, max(1, programs))
    return max(1, min(wanted, MOST_SPLITS, triton.next_power_of_2(triton.cdiv(most_tokens, 4 * block))))


def decode(
    q: torch.Tensor,
    out: torch.Tensor,
    cache: PagedCache,
    rows: DecodeRows,
    scores: Scores,
    shared: SharedRows | None = None,
    latent: bool = False,
    new: NewTokens | None = None,
) -> None:
    """Write attention of rows of one token to ``out`` [T, num_heads, v_head_dim]; other tokens' places are left.

    ``new``: the rows' keys and values, to be written to the cache; None: it has them.
    """
    num_rows, num_heads, num_kv_heads = len(rows.starts), q.shape[1], cache.keys.shape[1]
    if not num_rows:
        return
    common, (tensors, strides) = _common(q, cache, scores, latent), _new(new)
    group = common["GROUP"]
    block_m, block_n = min(32, max(16, triton.next_power_of_2(group))), _keys_at_once(q, cache)
    head_programs = num_kv_heads * triton.cdiv(group, block_m)
    splits = num_splits(num_rows * head_programs, cache.most_tokens, block_n)
    prefix_splits = 0
    if shared is not None:
        prefix_splits = min(MOST_PREFIX_SPLITS, num_splits(head_programs, cache.most_tokens, block_n))
    slots = splits + LEVELS * prefix_splits
    parts = torch.empty(num_rows, num_heads, slots, common["V_DIM"] if slots > 1 else 0, device=q.device)
    sums = torch.empty(num_rows, num_heads, slots, device=q.device)
    kernels.decode_kernel[(num_rows, head_programs, splits)](
        q, out, parts, sums, rows.table_rows, rows.starts, rows.tokens, None if shared is None else shared.own_starts,
        *tensors, cache.page_table, cache.keys, cache.values, cache.key_scales, cache.value_scales, scores.sinks,
        scores.alibi_slopes, *_strides(q, cache), *strides, scores.scaling, scores.logit_cap, scores.window,
        scores.chunk, SPLITS=splits, SLOTS=slots, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=_warps(block_m, common["DV"]), num_stages=3, **common,
    )  # fmt: skip
    if slots == 1:
        return
    if shared is not None:
        _prefixes(q, parts, sums, cache, rows, scores, shared, common, splits, prefix_splits)
    kernels.merge_kernel[(num_rows, num_heads)](
        parts, sums, out, rows.tokens, scores.sinks, num_heads, SLOTS=slots, ALL_SLOTS=triton.next_power_of_2(slots),
        V_DIM=common["V_DIM"], DV=common["DV"], num_warps=4,
    )  # fmt: skip


def _warps(block_m: int, dv: int) -> int:
    return 8 if block_m * dv > 8192 else 4


def _prefixes(
    q: torch.Tensor,
    parts: torch.Tensor,
    sums: torch.Tensor,
    cache: PagedCache,
    rows: DecodeRows,
    scores: Scores,
    shared: SharedRows,
    common: dict[str, Any],
    own_splits: int,
    splits: int,
) -> None:
    block_m, block_n, warps, stages = _extend_tile(q, cache.key_scales is not None)
    heads = min(common["GROUP"], block_m)
    tiles = triton.cdiv(len(rows.starts), block_m // heads)
    grid = len(shared.entries) * tiles, cache.keys.shape[1] * triton.cdiv(common["GROUP"], heads), splits
    kernels.prefix_kernel[grid](
        q, parts, sums, shared.entries, shared.members, rows.table_rows, rows.starts, rows.tokens, cache.page_table,
        cache.keys, cache.values, cache.key_scales, cache.value_scales, scores.alibi_slopes, *_strides(q, cache),
        scores.scaling, scores.logit_cap, tiles, HEADS=heads, SPLITS=splits, OWN_SPLITS=own_splits,
        SLOTS=sums.shape[2], BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages, **common,
    )  # fmt: skip


def _extend_tile(q: torch.Tensor, is_int8: bool = False) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages). Registers are what limits a tile: none may be spilled."""
    size = q.shape[2]
    if q.dtype == torch.float32:
        return (32, 16 if generation() < 9 else 32, 4, 2) if size <= 128 else (16, 16, 4, 2)
    if generation() < 9:
        return (64, 16 if is_int8 else 32, 4, 3) if size <= 128 else (32, 16 if size <= 256 else 32, 8, 2)
    if size <= 64:
        return 128, 64, 4, 3
    if size <= 128:
        return 128, 64, 8, 3
    return (64, 32, 8, 2) if size <= 256 else (32, 32, 8, 2)


def extend(
    q: torch.Tensor,
    out: torch.Tensor,
    cache: PagedCache,
    rows: ExtendRows,
    blocks: torch.Tensor,
    scores: Scores,
    visible_ends: torch.Tensor | None = None,
    latent: bool = False,
) -> None:
    """Write attention of rows to ``out`` [T, num_heads, v_head_dim]; ``blocks``: ``rows.blocks``, on the device."""
    if not len(blocks):
        return
    common = _common(q, cache, scores, latent)
    block_m, block_n, warps, stages = _extend_tile(q, cache.key_scales is not None)
    heads = min(common["GROUP"], block_m)
    kernels.extend_kernel[(len(blocks), cache.keys.shape[1] * triton.cdiv(common["GROUP"], heads))](
        q, out, blocks, rows.table_rows, rows.starts, rows.counts, rows.tokens, visible_ends, cache.page_table,
        cache.keys, cache.values, cache.key_scales, cache.value_scales, scores.sinks, scores.alibi_slopes,
        *_strides(q, cache), scores.scaling, scores.logit_cap, scores.window, scores.chunk, HEADS=heads,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages, **common,
    )  # fmt: skip


def tokens_of_block(q: torch.Tensor, num_kv_heads: int) -> int:
    """How many of a row's tokens a program of ``extend`` has."""
    block_m = _extend_tile(q)[0]
    return block_m // min(q.shape[1] // num_kv_heads, block_m)
