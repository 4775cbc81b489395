"""Rows sorted by expert, gathered and summed, in Triton. See ``kernels/reference.py``.

The sort is stable, and the host knows nothing of the counts. Few ids are each compared with all others, in one launch.
Many are counted: each program counts its ids' experts, sums over the programs before it say where its rows begin, and a
second launch writes each id's place.
"""

import torch
import triton
import triton.language as tl

IDS = 128  # of a program
FEW_IDS = 2048
GROUPS = 64  # experts that a program counts, and ids that it compares with as many at once
BLOCK = 1024  # numbers of a row that a program has


@triton.jit
def _count_kernel(
    ids: tl.tensor,
    counts: tl.tensor,
    num_ids: tl.tensor,
    num_groups: tl.tensor,
    IDS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    part = tl.program_id(0)
    places = part * IDS + tl.arange(0, IDS)
    own = tl.load(ids + places, mask=places < num_ids, other=-1).to(tl.int32)
    for first in range(0, num_groups, GROUPS):
        groups = first + tl.arange(0, GROUPS)
        found = tl.sum((own[:, None] == groups[None, :]).to(tl.int32), 0)
        tl.store(counts + part * num_groups + groups, found, mask=groups < num_groups)


@triton.jit
def _place_kernel(
    ids: tl.tensor,
    starts: tl.tensor,
    order: tl.tensor,
    places: tl.tensor,
    num_ids: tl.tensor,
    num_groups: tl.tensor,
    IDS: tl.constexpr,
) -> None:
    part, line = tl.program_id(0), tl.arange(0, IDS)
    own = part * IDS + line
    group = tl.load(ids + own, mask=own < num_ids, other=-1).to(tl.int32)
    earlier = (group[:, None] == group[None, :]) & (line[None, :] < line[:, None])
    start = tl.load(starts + part * num_groups + group, mask=own < num_ids, other=0)
    place = start + tl.sum(earlier.to(tl.int32), 1)
    tl.store(places + own, place, mask=own < num_ids)
    tl.store(order + place, own.to(tl.int64), mask=own < num_ids)


@triton.jit
def _compare_kernel(
    ids: tl.tensor,
    totals: tl.tensor,
    order: tl.tensor,
    places: tl.tensor,
    num_ids: tl.tensor,
    num_groups: tl.tensor,
    IDS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """An id's place is the number of those that are smaller, or equal and before it. Programs count groups as well."""
    part, line = tl.program_id(0), tl.arange(0, IDS)
    own, groups = part * IDS + line, part * GROUPS + tl.arange(0, GROUPS)
    group = tl.load(ids + own, mask=own < num_ids, other=0).to(tl.int32)
    place, found = tl.zeros([IDS], tl.int32), tl.zeros([GROUPS], tl.int32)
    for first in range(0, num_ids, IDS):
        others = first + line
        other = tl.load(ids + others, mask=others < num_ids, other=0x7FFFFFFF).to(tl.int32)[None, :]
        is_before = (other == group[:, None]) & (others[None, :] < own[:, None])
        place += tl.sum(((other < group[:, None]) | is_before).to(tl.int32), 1)
        found += tl.sum((other == groups[:, None]).to(tl.int32), 1)
    tl.store(places + own, place.to(tl.int64), mask=own < num_ids)
    tl.store(order + place, own.to(tl.int64), mask=own < num_ids)
    tl.store(totals + groups, found.to(tl.int64), mask=groups < num_groups)


def group_rows(ids: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``reference.group_rows``."""
    ids = ids.contiguous()
    parts = triton.cdiv(len(ids), IDS)
    order, places = torch.empty_like(ids), torch.empty_like(ids)
    if len(ids) <= FEW_IDS:
        totals = torch.empty(num_groups, dtype=torch.int64, device=ids.device)
        grid = (max(triton.cdiv(len(ids), GROUPS), triton.cdiv(num_groups, GROUPS)),)
        _compare_kernel[grid](ids, totals, order, places, len(ids), num_groups, IDS=GROUPS, GROUPS=GROUPS, num_warps=8)
        return totals, order, places
    counts = torch.empty(parts, num_groups, dtype=torch.int64, device=ids.device)
    wide = min(64, triton.next_power_of_2(num_groups))
    _count_kernel[(parts,)](ids, counts, len(ids), num_groups, IDS=IDS, GROUPS=wide, num_warps=4)
    totals = counts.sum(0)
    starts = counts.cumsum(0) - counts + (totals.cumsum(0) - totals)
    _place_kernel[(parts,)](ids, starts, order, places, len(ids), num_groups, IDS=IDS, num_warps=8)
    return totals, order, places


@triton.jit
def _gather_kernel(
    x: tl.tensor, order: tl.tensor, rows: tl.tensor, size: tl.tensor, stride: tl.tensor, repeats: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(order + row) // repeats
    values = tl.load(x + source * stride + columns, mask=columns < size, other=0.0)
    tl.store(rows + row * size + columns, values, mask=columns < size)


def gather_rows(x: torch.Tensor, order: torch.Tensor, repeats: int) -> torch.Tensor:
    """See ``reference.gather_rows``."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = torch.empty(len(order), x.shape[1], dtype=x.dtype, device=x.device)
    if rows.numel():
        grid = (len(order), triton.cdiv(x.shape[1], BLOCK))
        _gather_kernel[grid](x, order, rows, x.shape[1], x.stride(0), repeats, BLOCK=BLOCK, num_warps=4)
    return rows


@triton.jit
def _sum_kernel(
    rows: tl.tensor, places: tl.tensor, weights: tl.tensor, out: tl.tensor, size: tl.tensor, top_k: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    dtype = out.dtype.element_ty
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(top_k):
        place = tl.load(places + token * top_k + i)
        weight = tl.load(weights + token * top_k + i).to(dtype).to(tl.float32)
        total += weight * tl.load(rows + place * size + columns, mask=columns < size, other=0.0).to(tl.float32)
    tl.store(out + token * size + columns, total.to(dtype), mask=columns < size)


def sum_rows(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """See ``reference.sum_rows``; sums are in float32."""
    rows, weights = rows.contiguous(), weights.contiguous()
    num_tokens, top_k = weights.shape
    out = torch.empty(num_tokens, rows.shape[1], dtype=rows.dtype, device=rows.device)
    if out.numel():
        grid = (num_tokens, triton.cdiv(rows.shape[1], BLOCK))
        _sum_kernel[grid](rows, places, weights, out, rows.shape[1], top_k, BLOCK=BLOCK, num_warps=4)
    return out
