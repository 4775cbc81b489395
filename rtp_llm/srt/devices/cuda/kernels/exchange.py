"""Sums of rows over GPUs that read each other's memory, and norms of the sums, in one launch.

A program has one row. It writes its GPU's summand to a place that the others read, tells each of them so, waits until
all have told it the same, and adds up all summands in the ranks' order: a sum in one step (one-shot), for rows so few
that the way back and forth takes longer than the bytes. A norm then costs no further launch, and no pass over memory.

Each row has places of its own, two that exchanges use in turns. A GPU that begins the row's exchange e + 2 has seen
that all have begun e + 1, and so nobody reads the place of e any more.
"""

import torch
import triton
import triton.language as tl

MOST_ROWS = 64  # of a sum
ROW_BYTES = 16384  # of a row at most
FLAG_BYTES = 4
RMS, GEMMA = tl.constexpr(1), tl.constexpr(2)


def memory_bytes(num_ranks: int) -> int:
    """Bytes of each rank's memory: a flag for each rank and row, zero at the beginning, then two places of each row."""
    return _places(num_ranks) + 2 * MOST_ROWS * ROW_BYTES


def _places(num_ranks: int) -> int:
    """Where places begin."""
    return num_ranks * MOST_ROWS * FLAG_BYTES


@triton.jit
def _memory_of(memories: tl.tensor, rank: tl.constexpr) -> tl.tensor:
    return tl.load(memories + rank).to(tl.pointer_type(tl.uint8))


@triton.jit
def _place_of(memories: tl.tensor, rank: tl.constexpr, offset: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    return tl.multiple_of((_memory_of(memories, rank) + offset).to(tl.pointer_type(dtype), bitcast=True), 16)


@triton.jit
def _flag_of(
    memories: tl.tensor, of: tl.constexpr, by: tl.constexpr, row: tl.tensor, MOST_ROWS: tl.constexpr
) -> tl.tensor:
    """Where rank ``by`` tells rank ``of`` the number of the row's last exchange that it has begun."""
    flags = _memory_of(memories, of).to(tl.pointer_type(tl.int32), bitcast=True)
    return flags + by * MOST_ROWS + row


# long: half of it is the signature, an argument a line
@triton.jit
def sum_rows_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    added: tl.tensor,
    memories: tl.tensor,
    exchanges: tl.tensor,
    size: tl.tensor,
    places: tl.tensor,
    eps: tl.tensor,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    KIND: tl.constexpr,
    TELLS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """memories: [ranks] int64, addresses; exchanges: [MOST_ROWS] int32, the number of each row's last one.

    KIND 0: out is the sum; else ``add_rms_norm`` or ``add_gemma_rms_norm`` of it. TELLS, SUMS: the two halves.
    """
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    dtype: tl.constexpr = x.dtype.element_ty
    inside, at = columns < size, row.to(tl.int64) * size + columns
    number = tl.load(exchanges + row) + 1
    offset = places + ((number % 2) * MOST_ROWS + row).to(tl.int64) * ROW_BYTES
    if TELLS:
        tl.store(_place_of(memories, RANK, offset, dtype) + columns, tl.load(x + at, mask=inside), mask=inside)
        tl.debug_barrier()
        for rank in tl.static_range(RANKS):
            tl.atomic_xchg(_flag_of(memories, rank, RANK, row, MOST_ROWS), number, sem="release", scope="sys")
    if SUMS:
        for rank in tl.static_range(RANKS):
            flag = _flag_of(memories, RANK, rank, row, MOST_ROWS)
            while tl.atomic_add(flag, 0, sem="acquire", scope="sys") < number:
                pass
        tl.debug_barrier()
        total = tl.zeros([BLOCK], tl.float32)
        for rank in tl.static_range(RANKS):
            place = _place_of(memories, rank, offset, dtype) + columns
            total += tl.load(place, mask=inside, other=0.0, volatile=True).to(tl.float32)
        total = total.to(dtype)
        if KIND:
            total = (total.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(dtype)
            tl.store(added + at, total, mask=inside)
            values = total.to(tl.float32)
            factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
            normed = values * tl.rsqrt(tl.sum(values * values, 0) / size + eps)
            if KIND == RMS:
                normed = normed.to(dtype).to(tl.float32) * factors
            else:
                normed = normed * (1.0 + factors)
            tl.store(out + at, normed.to(dtype), mask=inside)
        else:
            tl.store(out + at, total, mask=inside)
        tl.store(exchanges + row, number)


def sum_rows(
    x: torch.Tensor,
    memories: torch.Tensor,
    exchanges: torch.Tensor,
    rank: int,
    norm: tuple[int, torch.Tensor, torch.Tensor, float] | None = None,
    halves: tuple[bool, bool] = (True, True),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum x [T, size] over the ranks, in place; return it twice, or (norm, sum) with ``norm``.

    Args:
        memories: [ranks] int64, addresses of all ranks' memory; exchanges: [MOST_ROWS] int32 of this rank, zero at the
            beginning.
        norm: its kind, the residual, the weight and eps; then x is left as it is.
        halves: tests of ranks in one thread launch all first halves before the second ones.
    """
    num_rows, size = x.shape
    kind, residual, weight, eps = (0, None, None, 0.0) if norm is None else norm
    out, added = (x, x) if norm is None else (torch.empty_like(x), torch.empty_like(x))
    if x.numel():
        block = triton.next_power_of_2(size)
        sum_rows_kernel[(num_rows,)](
            x, residual, weight, out, added, memories, exchanges, size, _places(len(memories)), eps, RANK=rank,
            RANKS=len(memories), MOST_ROWS=MOST_ROWS, ROW_BYTES=ROW_BYTES, KIND=kind, TELLS=halves[0], SUMS=halves[1],
            BLOCK=block, num_warps=4 if block <= 2048 else 8 if block <= 4096 else 16,
        )  # fmt: skip
    return out, added


def takes(x: torch.Tensor) -> bool:
    """Whether rows of x [T, size] have places."""
    return len(x) <= MOST_ROWS and x.shape[1] * x.element_size() <= ROW_BYTES
