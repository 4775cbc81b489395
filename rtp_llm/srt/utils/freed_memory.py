"""Return memory to the system: what glibc keeps of freed memory, and pages of libraries that only starting needed."""

import asyncio
import ctypes
import functools
import gc
import mmap
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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


def give_back_once() -> None:
    """Collect garbage, as after loading, and return free memory to the system, if the C library is glibc."""
    gc.collect()
    if trim := _trim():
        trim(0)


def drop_library_pages() -> None:
    """Take the pages of library files out of this process, which read much of them only while it started: 45 MB of
    torch's. The system keeps them as files that it has read; those that are used come back at once. Linux only."""
    for pages in unwritten_ranges(_read_smaps()):
        dont_need(pages.start, len(pages))


def unwritten_ranges(smaps: str) -> Iterator[range]:
    """Yield the addresses of files' mappings that hold nothing of this process alone, which would be lost.

    Args:
        smaps: what /proc/PID/smaps says.
    """
    for start, end, fields in _MAPPING.findall(smaps):
        if re.search(r"^Anonymous: +0 kB$", fields, re.MULTILINE):
            yield range(int(start, 16), int(end, 16))


_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) r-[-x]p \S+ \S+ [1-9]\d* +/.*\n((?:[A-Z].*\n)+)", re.MULTILINE)


def _read_smaps() -> str:
    try:
        return Path("/proc/self/smaps").read_text()
    except OSError:
        return ""  # not Linux


def dont_need(start: int, size: int) -> None:
    """Take whole pages out of this process: it finds them as the file has them, or empty."""
    _madvise()(start, size, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function


def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
