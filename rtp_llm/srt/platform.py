"""Processors and memory of this machine."""

import functools
import os
import platform
import re
from pathlib import Path


def num_cpus() -> int:
    """Number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's features by Linux's names (``avx2``, ``avx512_bf16``); empty on other systems."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return frozenset()  # not Linux
    return frozenset(found[1].split()) if found else frozenset()


def host_memory_bytes() -> tuple[int, int]:
    """``(free, total)`` bytes of the machine's memory, or of this container's if it is limited."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = min(total, _container_limit())
    return min(_available_memory(), total), total


def _available_memory() -> int:
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: free pages are the best there is
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _container_limit() -> int:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue  # another cgroup version, or none
        if text.isdigit():
            return int(text)
    return 1 << 62
