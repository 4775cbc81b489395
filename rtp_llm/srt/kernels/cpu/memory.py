"""Memory for what every step reads from its start to its end: weights.

Linux gives it in pages of 4 KB, and at every page a processor has to look up where the next one lies, in a virtual
machine twice. In pages of 2 MB a product of one row, which is all reading, takes a fifth to a third less time.
"""

import contextlib
import math
import mmap
import sys
import threading

import torch

BLOCK_BYTES = 64 << 20
ALIGNMENT = 64


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
