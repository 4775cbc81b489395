"""Memory for what steps read from its start to its end, weights, keys and values, and for what they compute.

Linux gives it in pages of 4 KB, and at every page a processor has to look up where the next one lies, in a virtual
machine twice. In pages of 2 MB a product of one row, which is all reading, takes a fifth to a third less time.
"""

import contextlib
import ctypes
import math
import mmap
import os
import sys
import threading
from collections.abc import Sequence

import torch

BLOCK_BYTES = 64 << 20
ALIGNMENT = 64
PIECE_BYTES = 2 << 20  # so short is a wait of others who change the process's memory
KEPT_BYTES = 512 << 20
LARGEST_KEPT_BYTES = 32 << 20  # the most that glibc allows
MOST_TRIES = 16
HUGE_PAGE_BYTES = 2 << 20
TOP_PAD_BYTES = 128 << 10  # as it is without us
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # as glibc numbers them
MADV_POPULATE_WRITE = 23  # since Linux 5.14


class Arena:
    """Hands out memory that is never given back by itself; a block is freed with the last tensor in it."""

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
        """The tensor's values, contiguous."""
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _map(size: int) -> torch.Tensor:
    """[size] bytes, of which only what is touched takes memory."""
    if sys.platform != "linux":
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


weights = Arena()


def keep_freed() -> None:
    """Has the process keep memory that it frees, for what it computes next, ``KEPT_BYTES`` of it in huge pages.

    Every layer allocates its results, and the layer after the next frees them. By itself glibc gives megabytes back to
    the system each time, and takes them again page by page: of a step of 2,048 tokens that is a twentieth, and small
    pages another. Only of the main thread, and of glibc; elsewhere everything stays as it is.
    """
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or not all(hasattr(libc, name) for name in ("mallopt", "malloc_trim", "sbrk")):
        return
    libc.malloc_trim(0)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * KEPT_BYTES)
    libc.mallopt(M_TOP_PAD, KEPT_BYTES)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.sbrk.argtypes, libc.free.argtypes = (
        [ctypes.c_size_t],
        [ctypes.c_ssize_t],
        [ctypes.c_void_p],
    )
    before = libc.sbrk(0)
    taken: list[int] = []
    while libc.sbrk(0) == before and len(taken) < MOST_TRIES:  # until the heap has grown, by M_TOP_PAD more
        taken.append(libc.malloc(LARGEST_KEPT_BYTES - HUGE_PAGE_BYTES))
    for memory in taken:
        libc.free(memory)
    libc.mallopt(M_TOP_PAD, TOP_PAD_BYTES)
    start, end = (at // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES for at in (before + HUGE_PAGE_BYTES - 1, libc.sbrk(0)))
    if start < end:
        libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        libc.madvise(start, end - start, mmap.MADV_HUGEPAGE)


def take_in_background(tensors: Sequence[torch.Tensor], num_bytes: int) -> threading.Thread:
    """Has the system give memory to the first so many bytes of the tensors, an equal part of each, before a step has to
    wait for it; what they contain stays. Only where a core has nothing else to do: steps that come meanwhile go first.
    Where that cannot be done, memory comes when it is written to, as ever."""
    share = min(1.0, num_bytes / max(1, sum(tensor.nbytes for tensor in tensors)))
    thread = threading.Thread(target=_take, args=(list(tensors), share), name="cache memory", daemon=True)
    thread.start()
    return thread


def _take(tensors: list[torch.Tensor], share: float) -> None:
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if madvise is None:
        return
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    with contextlib.suppress(OSError):  # forbidden: then it takes turns with steps
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # of this thread
    for tensor in tensors:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = tensor.data_ptr() + int(tensor.nbytes * share)
        for piece in range(start, end - mmap.PAGESIZE, PIECE_BYTES):
            size = min(PIECE_BYTES, end - piece) // mmap.PAGESIZE * mmap.PAGESIZE
            if madvise(piece, size, MADV_POPULATE_WRITE) != 0:  # an older kernel, or no memory left
                return
