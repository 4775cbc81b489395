"""Sums, concatenations and tokens for experts over ranks of one machine, through memory that they share.

Measured against gloo in docs/scaling.md. Every rank computes the same sums: in the ranks' order, and in float32.
"""

import ctypes
import logging
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist

from rtp_llm.srt.devices.cpu import memory
from rtp_llm.srt.devices.cpu.binding import INT, INT64, POINTER, Kernel, bind
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.distributed.unsummed import NormOfSum

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
        sent = (*(POINTER,) * 4, *(INT64,) * 3, *(POINTER,) * 6)
        self._send_tokens: Kernel = bind("exchange", "exchange_send_tokens", *place, *sent, result=INT)
        back = (POINTER, POINTER, INT64, INT, *(POINTER,) * 3)
        self._sum_tokens: Kernel = bind("exchange", "exchange_sum_tokens", *place, *back, result=INT)
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

    def defers(self, x: torch.Tensor) -> bool:
        return False  # a launch less is nothing where a launch is a call

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, norm: NormOfSum) -> None:
        return None

    def all_gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return a contiguous tensor of each rank, [ranks, *x.shape]; None if it is not on a CPU. Raise as above."""
        if not x.is_cpu:
            return None
        result = torch.empty((self._num_ranks, *x.shape), dtype=x.dtype)
        _check(self._all_gather(*self._place, x.data_ptr(), x.nbytes, result.data_ptr()))
        return result

    def send_tokens(
        self,
        tokens: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        counts: Sequence[int],
        num_own_experts: int,
    ) -> "SharedTokens | None":
        """See ``SharedMemory``; None if a row for each rank is too much for a slot, too. Raise as above."""
        if len(tokens) != counts[self._rank]:
            raise ValueError(f"rank {self._rank} has {len(tokens)} tokens to send, but ranks have {list(counts)}")
        top_k, row_bytes = topk_ids.shape[1], tokens.shape[1] * tokens.element_size()
        if not tokens.is_cpu or tokens.dtype not in DTYPES or self._num_ranks * row_bytes + 12 * top_k > SLOT_BYTES:
            return None
        tokens, ids, weights = tokens.contiguous(), topk_ids.contiguous(), topk_weights.float().contiguous()
        num_tokens = sum(counts)
        table = torch.tensor([*counts, 0], dtype=torch.int64)  # and how many have arrived
        places = torch.empty(num_tokens, dtype=torch.int64)
        destinations = torch.empty(len(tokens), dtype=torch.int64)
        rows = memory.empty((num_tokens, tokens.shape[1]), tokens.dtype)
        their_ids, their_weights = ids.new_empty(num_tokens, top_k), weights.new_empty(num_tokens, top_k)
        arrived = table[len(counts) :]
        given = (table, tokens, ids, weights)
        made = (rows, their_ids, their_weights, places, destinations, arrived)
        _check(
            self._send_tokens(
                *self._place, *(x.data_ptr() for x in given), row_bytes, top_k, num_own_experts,
                *(x.data_ptr() for x in made),
            )
        )  # fmt: skip
        here = slice(arrived.item())
        weights = their_weights[here].to(topk_weights.dtype)
        return SharedTokens(rows[here], weights, their_ids[here], self, table, places, destinations)

    def sum_tokens(
        self, summands: torch.Tensor, counts: torch.Tensor, places: torch.Tensor, destinations: torch.Tensor
    ) -> torch.Tensor:
        """See ``ArrivedTokens.sums``. The others are what ``send_tokens`` has noted. Raise as above."""
        summands = summands.contiguous()
        result = memory.empty((len(destinations), summands.shape[1]), summands.dtype)
        pointers = places.data_ptr(), destinations.data_ptr(), result.data_ptr()
        width, dtype = summands.shape[1], DTYPES[summands.dtype]
        _check(self._sum_tokens(*self._place, counts.data_ptr(), summands.data_ptr(), width, dtype, *pointers))
        return result


@dataclass(frozen=True, slots=True)
class SharedTokens:
    """See ``ArrivedTokens``."""

    tokens: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    _exchange: SharedExchange
    _counts: torch.Tensor  # [ranks, and one more]
    _places: torch.Tensor  # [T of all ranks]: of each token in ``tokens``, -1 of those that are not there
    _destinations: torch.Tensor  # [T of this rank]: bit r says that it went to rank r

    def sums(self, summands: torch.Tensor) -> torch.Tensor:
        return self._exchange.sum_tokens(summands, self._counts, self._places, self._destinations)


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
