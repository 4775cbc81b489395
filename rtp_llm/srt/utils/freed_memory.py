"""Freed memory goes back to the system: glibc keeps what many threads freed, to many times what is in use."""

import asyncio
import ctypes
import sys
import time
from collections.abc import Callable

EVERY_S = 5.0
BUSY_S = 0.2  # of processor time, in which something may have been freed


async def give_back_freed_memory() -> None:
    """Have this process's free memory given back every now and then, while it does anything. Runs until cancelled;
    where the C library is not glibc, there is nothing to do."""
    trim = _trim()
    done_s = 0.0
    while trim is not None:
        await asyncio.sleep(EVERY_S)
        if time.process_time() - done_s > BUSY_S:
            await asyncio.to_thread(trim, 0)
            done_s = time.process_time()


def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
