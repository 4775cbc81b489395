"""Memory for weights, keys and values, and results of kernels, in huge pages.

Linux provides pages of 4 KB by default, and a processor must look up the address of each, in a virtual machine twice.
With pages of 2 MB a product of one row, whose time is reading the weight, takes a fifth to a third less time.
"""

import contextlib
import ctypes
import math
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from itertools import zip_longest

import torch

from rtp_llm.srt.devices.cpu import binding

BLOCK_BYTES = 64 << 20
ALIGNMENT = 64
PIECE_BYTES = 2 << 20  # small, since other threads that map memory wait while a piece is populated
HUGE_PAGE_BYTES = 2 << 20
LEAST_REUSED_BYTES = 128 << 10
KEPT_BYTES = 512 << 20  # of results; above it, unused pieces are given back to the system
MADV_POPULATE_WRITE = 23  # since Linux 5.14
WATCHED_S = 0.02  # how long to see whether threads compute
IDLE_SHARE = 0.1  # of a processor, that idle threads use at most


class Arena:
    """Allocates tensors in large blocks; a block is freed with the last tensor in it."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._lock = threading.Lock()

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """As ``torch.empty``."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            if self._used + size > len(self._block):
                self._block, self._used = _map(max(size, BLOCK_BYTES)), 0
            memory = self._block[self._used : self._used + size]
            self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return memory.view(dtype).view(shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy of the tensor."""
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _map(size: int) -> torch.Tensor:
    """Map [size] bytes, aligned to a huge page; only touched pages take memory."""
    if sys.platform != "linux":
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE_BYTES
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)


weights = Arena()


class Reused:
    """Allocates tensors in pieces of memory; a piece is reused when no tensor uses it.

    Args:
        most_bytes: above this, unused pieces are given back to the system; None: never.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        self._most_bytes = most_bytes
        self._pieces: dict[int, list[torch.UntypedStorage]] = {}
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """As ``torch.empty``."""
        tensor, size = torch.empty(0, dtype=dtype), math.prod(shape) * dtype.itemsize
        with self._lock:
            return tensor.set_(self._piece(size), 0, shape)  # type: ignore[call-overload]

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same shape and strides, not initialised."""
        empty, size = torch.empty(0, dtype=tensor.dtype), tensor.untyped_storage().nbytes()
        with self._lock:
            return empty.set_(self._piece(size), tensor.storage_offset(), tensor.shape, tensor.stride())

    def _piece(self, num_bytes: int) -> torch.UntypedStorage:
        """Return the smallest unused piece that is large enough, or a new one."""
        size = _rounded_up(num_bytes)
        for _, pieces in sorted(self._pieces.items()):
            for piece in pieces:
                if piece.nbytes() >= size and _is_free(piece):
                    return piece
        self._make_room(size)
        memory = _map(size) if size >= HUGE_PAGE_BYTES else torch.empty(size, dtype=torch.uint8)
        piece = memory.untyped_storage()
        self._pieces.setdefault(size, []).append(piece)
        return piece

    def lent(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor such that its piece counts as unused, and may be overwritten, although it lies there; one
        that is not in a piece as it is. This object must outlive it."""
        storage = tensor.untyped_storage()
        addresses = {piece.data_ptr() for pieces in self._pieces.values() for piece in pieces}
        if storage.data_ptr() not in addresses:
            return tensor
        memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        alias = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(alias, tensor.storage_offset(), tensor.shape, tensor.stride())

    def _make_room(self, num_bytes: int) -> None:
        held = sum(size * len(pieces) for size, pieces in self._pieces.items())
        if self._most_bytes is not None and held + num_bytes > self._most_bytes:
            self._drop_unused()

    def give_back(self) -> None:
        """Give unused pieces back to the system."""
        with self._lock:
            self._drop_unused()

    def _drop_unused(self) -> None:
        for pieces in self._pieces.values():
            pieces[:] = [piece for piece in pieces if not _is_free(piece)]


def _is_free(piece: torch.UntypedStorage) -> bool:
    return torch._C._storage_Use_Count(piece._cdata) == 1


def _rounded_up(num_bytes: int) -> int:
    """Round up to a power of two, so that tensors of unequal sizes fit the same pieces. Pages that nothing was written
    to take no memory."""
    return max(ALIGNMENT, 1 << max(0, num_bytes - 1).bit_length())


_results = Reused(KEPT_BYTES)


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As ``torch.empty``, for results of kernels.

    Every layer allocates its results, and the layer after the next frees them. For large ones, glibc would return the
    memory to the system each time, and get it again in small pages: a tenth of the time of a step of 2,048 tokens.
    """
    if math.prod(shape) * dtype.itemsize < LEAST_REUSED_BYTES or binding.are_noted():
        return torch.empty(shape, dtype=dtype)  # a recording manages its own memory
    return _results.empty(shape, dtype)


def give_back_results() -> None:
    """Give memory of results that no tensor uses back to the system."""
    _results.give_back()


def take_in_background(tensors: Sequence[torch.Tensor], num_bytes: int) -> threading.Thread:
    """Make the system provide memory for the first ``num_bytes`` of the tensors, an equal share of each and their
    beginnings first, so that steps need not wait for it. Contents stay. It is taken only while the process's other
    threads are idle: a thread of a kernel that wants the processor waits for a whole piece, some milliseconds, and its
    team for it. Where the system does not support this, memory is provided at the first write, as usual."""
    share = min(1.0, num_bytes / max(1, sum(tensor.nbytes for tensor in tensors)))
    of_tensors = [_pieces(tensor.data_ptr(), int(tensor.nbytes * share)) for tensor in tensors]
    pieces = [piece for together in zip_longest(*of_tensors) for piece in together if piece is not None]
    freed = threading.Event()
    watched = [weakref.ref(tensor, lambda _: freed.set()) for tensor in tensors]
    thread = threading.Thread(target=_take, args=(pieces, freed, watched), name="cache memory", daemon=True)
    thread.start()
    return thread


def _pieces(address: int, num_bytes: int) -> list[tuple[int, int]]:
    """Return addresses and sizes of pieces, in whole pages."""
    start, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, address + num_bytes
    pieces = [
        (at, min(PIECE_BYTES, end - at) // mmap.PAGESIZE * mmap.PAGESIZE) for at in range(start, end, PIECE_BYTES)
    ]
    return [(at, size) for at, size in pieces if size]


def _take(pieces: list[tuple[int, int]], freed: threading.Event, watched: object) -> None:
    """Populate the pieces, until ``freed``, which ``watched`` sets as long as it is there. Torch must not be called
    here, since the thread may be stopped at any point when the process ends. Nor need it be: a piece whose memory has
    been freed meanwhile cannot be populated, and one of other memory keeps its contents."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if madvise is None:
        return
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    with contextlib.suppress(OSError):  # not permitted: then it competes with other processes
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # of this thread
    others = _OtherThreads()
    for at, size in pieces:
        while not others.are_idle() and not freed.is_set():
            time.sleep(WATCHED_S)
        if freed.is_set() or madvise(at, size, MADV_POPULATE_WRITE) != 0:  # an older Linux, or no memory left
            return


class _OtherThreads:
    """The threads of this process but the caller's."""

    def __init__(self) -> None:
        self._at, self._computed_s = time.monotonic(), self._compute_s()

    def are_idle(self) -> bool:
        """Whether they have hardly computed since this was asked last."""
        at, computed_s = self._at, self._computed_s
        self._at, self._computed_s = time.monotonic(), self._compute_s()
        return self._computed_s - computed_s < IDLE_SHARE * (self._at - at)

    def _compute_s(self) -> float:
        return time.process_time() - time.thread_time()
