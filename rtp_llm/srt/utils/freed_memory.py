"""Return freed memory to the system: glibc keeps what many threads freed, many times the memory in use."""

import asyncio
import ctypes
import sys
import time
from collections.abc import Callable

EVERY_S = 5.0
BUSY_S = 0.2  # of processor time between two trims


async def give_back_freed_memory() -> None:
    """Return this process's free memory to the system from time to time while it works, until cancelled. Do nothing if
    the C library is not glibc."""
    trim = _trim()
    done_s = 0.0
    while trim is not None:
        await asyncio.sleep(EVERY_S)
        if time.process_time() - done_s > BUSY_S:
            await asyncio.to_thread(trim, 0)
            done_s = time.process_time()


def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
