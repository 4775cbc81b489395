"""Sums, concatenations and rows for each other over ranks of one machine, through memory that they share.

Measured against gloo in docs/scaling.md. Every rank computes the same sums: in the ranks' order, and in float32.
"""

import ctypes
import logging
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist

from rtp_llm.srt.devices.cpu.binding import INT, INT64, POINTER, Kernel, bind
from rtp_llm.srt.distributed.parallel_state import RankGroup

logger = logging.getLogger(__name__)

SLOT_BYTES = 1 << 20  # of what a rank passes on at once
MOST_RANKS = 64
FOLDER = Path("/dev/shm")  # in memory
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PROBLEMS = {1: "another rank did not come in time", 2: "another rank has died"}
DOUBLE = ctypes.c_double


class SharedExchange:
    """The shared memory of a group's ranks. All must call an operation, in the same order."""

    def __init__(self, group: RankGroup, memory: mmap.mmap, timeout_s: float) -> None:
        self._memory = memory
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._place = self._address, group.rank, group.world_size, SLOT_BYTES, timeout_s
        self._rank, self._num_ranks = group.rank, group.world_size
        place = POINTER, INT64, INT64, INT64, DOUBLE
        self._all_reduce: Kernel = bind("exchange", "exchange_all_reduce", *place, POINTER, INT64, INT, result=INT)
        self._all_gather: Kernel = bind("exchange", "exchange_all_gather", *place, POINTER, INT64, POINTER, result=INT)
        rows = POINTER, POINTER, INT64, POINTER  # x, counts, row_bytes, y
        self._all_to_all: Kernel = bind("exchange", "exchange_all_to_all", *place, *rows, result=INT)
        bind("exchange", "exchange_enter", POINTER, INT64)(self._address, group.rank)

    def all_reduce(self, x: torch.Tensor) -> bool:
        """Sum a contiguous tensor in place; return False if it is of a type that is not summed here.

        Raises:
            RuntimeError: another rank has died, or did not come in time.
        """
        if x.dtype not in DTYPES or not x.is_cpu:
            return False
        _check(self._all_reduce(*self._place, x.data_ptr(), x.numel(), DTYPES[x.dtype]))
        return True

    def all_gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return a contiguous tensor of each rank, [ranks, *x.shape]; None if it is not on a CPU. Raise as above."""
        if not x.is_cpu:
            return None
        result = torch.empty((self._num_ranks, *x.shape), dtype=x.dtype)
        _check(self._all_gather(*self._place, x.data_ptr(), x.nbytes, result.data_ptr()))
        return result

    def all_to_all(self, x: torch.Tensor, counts: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """See ``RankGroup.all_to_all``; None if the tensor is not on a CPU. Raise as above."""
        if not x.is_cpu:
            return None
        result = torch.empty((sum(of_rank[self._rank] for of_rank in counts), *x.shape[1:]), dtype=x.dtype)
        table = torch.tensor(counts, dtype=torch.int64)
        row_bytes = x.shape[1:].numel() * x.element_size()
        _check(self._all_to_all(*self._place, x.data_ptr(), table.data_ptr(), row_bytes, result.data_ptr()))
        return result


def _check(problem: int) -> None:
    if problem:
        raise RuntimeError(f"an exchange between ranks failed: {PROBLEMS[problem]}")


def share_memory(group: RankGroup, timeout_s: float) -> SharedExchange | None:
    """Make a group's ranks share memory; None on all of them if one cannot, as on several machines.

    Every rank of the group calls it.
    """
    if not 1 < group.world_size <= MOST_RANKS:
        return None
    size: int = bind("exchange", "exchange_bytes", INT64, INT64, result=INT64)(group.world_size, SLOT_BYTES)
    path = FOLDER / f"rtp-llm-{_agreed_name(group)}"
    memory = None
    if group.rank == 0:
        memory = _created(path, size)
    _agree(group, True)  # now the file exists, if the first rank could make it
    if group.rank:
        memory = _opened(path, size)
    agreed = _agree(group, memory is not None)
    if group.rank == 0:
        path.unlink(missing_ok=True)
    if memory is None or not agreed:
        logger.info("ranks do not share memory: they exchange tensors through %s", dist.get_backend(group.device_group))
        return None
    exchange = SharedExchange(group, memory, timeout_s)
    _agree(group, True)  # before the first exchange, each rank has entered its process
    return exchange


def _agreed_name(group: RankGroup) -> str:
    drawn = torch.tensor(list(uuid4().bytes) if group.rank == 0 else [0] * 16, dtype=torch.int32)
    return bytes(group.all_reduce(drawn).tolist()).hex()


def _agree(group: RankGroup, is_fine: bool) -> bool:
    """Return whether it is on every rank; also a barrier."""
    return int(group.all_reduce(torch.tensor([int(is_fine)], dtype=torch.int32))) == group.world_size


def _created(path: Path, size: int) -> mmap.mmap | None:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        logger.info("no shared memory in %s: %s", FOLDER, error)
        return None
    try:
        os.posix_fallocate(file, 0, size)  # so that there is room: a lack of it would be noticed by a signal only
        return mmap.mmap(file, size)
    except OSError as error:
        logger.info("no shared memory in %s: %s", FOLDER, error)
        return None
    finally:
        os.close(file)


def _opened(path: Path, size: int) -> mmap.mmap | None:
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return mmap.mmap(file, size) if os.fstat(file).st_size == size else None
    finally:
        os.close(file)
