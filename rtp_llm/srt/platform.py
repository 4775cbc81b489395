"""The only place that asks which device this is."""

import functools
import os
import platform
import re
from pathlib import Path

import torch


def default_device() -> str:
    """``cuda`` where a GPU is usable, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_device(asked: str | None) -> str:
    """The device that was asked for, if it is there, else the default one. Raises RuntimeError."""
    if asked == "cuda" and not torch.cuda.is_available():
        reason = "has no CUDA support" if torch.version.cuda is None else f"(CUDA {torch.version.cuda}) sees no GPU"
        raise RuntimeError(f"device is 'cuda', but torch {torch.__version__} {reason}; choose device 'cpu'")
    return asked or default_device()


def num_cpus() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the processor can do, in Linux's words (``avx2``, ``avx512_bf16``); empty where the system does not say."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return frozenset()  # not Linux
    return frozenset(found[1].split()) if found else frozenset()


def memory_bytes(device: str) -> tuple[int, int]:
    """``(free, total)`` bytes of the device's memory; for the CPU, of this container if it is limited."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))
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
