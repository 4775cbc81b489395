"""Processors and memory of this machine."""

import functools
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path("/")
FAST = 0.75  # of the largest capacity: slower cores of a hybrid processor do not compute


def num_cpus() -> int:
    """Number of processors that this process may use at the same time: those that it may run on, or, in a container
    that is given less of their time, as many as that is."""
    return _within_quota(len(usable_cpus()))


def usable_cpus() -> list[int]:
    """Return the logical processors that this process may run on, by their numbers."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def compute_cores(cpus: Sequence[int] | None = None, root: Path = ROOT) -> list[list[int]]:
    """Return the physical cores for threads that compute, each as the logical processors (of ``cpus``; None: those
    that this process may run on) that share it. Two threads on one core would only wait for each other.

    On a hybrid processor these are the fast cores alone: all threads get an equal share of a layer, and wait for the
    slowest. Where the system does not tell, every logical processor counts as a core.
    """
    allowed = usable_cpus() if cpus is None else list(cpus)
    cores: dict[tuple[int, ...], list[int]] = {}
    for cpu in fast_cpus(allowed, root):
        siblings = _cpu_list(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(tuple(siblings or [cpu]), []).append(cpu)
    return list(cores.values())[: _within_quota(len(cores), root)]


def fast_cpus(cpus: Sequence[int], root: Path = ROOT) -> list[int]:
    """Return those of the processors that belong to fast cores; all, unless some are slower.

    Intel names its fast cores; on ARM each has a capacity, of which the largest is 1,024.
    """
    fast = set(_cpu_list(root / "sys/devices/cpu_core/cpus"))
    if not fast:
        files = {cpu: root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity" for cpu in cpus}
        capacity = {cpu: int(text) for cpu, file in files.items() if (text := _text_of(file)).isdigit()}
        fast = {cpu for cpu in capacity if capacity[cpu] >= FAST * max(capacity.values())}
    return [cpu for cpu in cpus if cpu in fast] or list(cpus)


def numa_nodes(root: Path = ROOT) -> list[list[int]]:
    """Return the logical processors of each NUMA node that this process may run on; one node where none is told."""
    allowed = set(usable_cpus())
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    numbered = sorted((int(folder.name.removeprefix("node")), folder) for folder in folders)
    nodes = [[cpu for cpu in _cpu_list(folder / "cpulist") if cpu in allowed] for _, folder in numbered]
    return [node for node in nodes if node] or [sorted(allowed)]


def share_of_nodes(nodes: Sequence[Sequence[int]], place: int, num_places: int, root: Path = ROOT) -> list[int]:
    """Return the logical processors of one of several ranks: whole nodes, or an equal part of one node's cores.

    Raises:
        ValueError: a node has fewer cores than ranks.
    """
    if num_places <= len(nodes):
        own = nodes[place * len(nodes) // num_places : (place + 1) * len(nodes) // num_places]
        return [cpu for node in own for cpu in node]
    number = place * len(nodes) // num_places
    neighbours = [other for other in range(num_places) if other * len(nodes) // num_places == number]
    cores = compute_cores(nodes[number], root)
    if len(cores) < len(neighbours):
        raise ValueError(f"node {number} has {len(cores)} cores for {len(neighbours)} ranks; use fewer")
    which = neighbours.index(place)
    own_cores = cores[which * len(cores) // len(neighbours) : (which + 1) * len(cores) // len(neighbours)]
    return [cpu for core in own_cores for cpu in core]


def _within_quota(num_cpus: int, root: Path = ROOT) -> int:
    quota = cpu_quota(root)
    return num_cpus if quota is None else max(1, min(num_cpus, int(quota)))


_TIME = "cpu"  # the controller of processors' time


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return how much of processors' time this process's control groups allow it, in processors; None: all of it.

    Version 2 has ``cpu.max``, version 1 ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``. The groups above limit, too.
    """
    quotas = []
    for line in _text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and _TIME not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        folder = top / path.strip("/")
        for group in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
            quotas += _quota_of(group)
    return min(quotas, default=None)


def _quota_of(group: Path) -> list[float]:
    """One number, or none: ``max`` or -1 stand for no limit, and the outermost group has no such file."""
    parts = _text_of(group / "cpu.max").split()
    if not parts:
        parts = [_text_of(group / "cpu.cfs_quota_us"), _text_of(group / "cpu.cfs_period_us")]
    return [int(parts[0]) / int(parts[1])] if all(part.isdigit() for part in parts) and int(parts[1]) else []


def _cpu_list(file: Path) -> list[int]:
    """Return the numbers of a list such as ``0-3,8``; none if there is no such file."""
    ranges = [part.partition("-") for part in _text_of(file).split(",") if part]
    return [cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)]


def _text_of(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""  # another system, or another version of it


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's features by Linux's names (``avx2``, ``avx512_bf16``; on ARM ``asimddp``, ``bf16``)."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return _flags_of_apple()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _text_of(ROOT / "proc/cpuinfo"), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def _flags_of_apple() -> frozenset[str]:
    """Return the features that kernels are compiled for and macOS reports (``hw.optional.arm.FEAT_BF16: 1``)."""
    names = {"FEAT_DotProd": "asimddp", "FEAT_BF16": "bf16", "FEAT_I8MM": "i8mm"}
    command = ["/usr/sbin/sysctl", *(f"hw.optional.arm.{name}" for name in names)]
    answer = subprocess.run(command, capture_output=True, text=True).stdout  # without lines for what it does not know
    return frozenset(names[name] for name in re.findall(r"^hw\.optional\.arm\.(\w+): 1$", answer, re.MULTILINE))


def host_memory_bytes() -> tuple[int, int]:
    """``(free, total)`` bytes of the machine's memory, or of this container's if it is limited."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = min(total, _container_limit())
    return min(_available_memory(), total), total


def _available_memory() -> int:
    found = re.search(r"^MemAvailable: *(\d+) kB$", _text_of(ROOT / "proc/meminfo"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")  # not Linux: free pages are the best there is


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
