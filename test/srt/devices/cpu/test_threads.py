"""How many threads compute, and where they run."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rtp_llm import Engine
from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.devices.cpu import build, threads
from rtp_llm.srt.devices.reference import provider as reference_provider

needs_kernels = pytest.mark.skipif(not build.kernels_work(), reason="there are no kernels")


def in_a_thread(function: Callable[[], Any]) -> Any:
    """Call it in a thread of its own, whose pool of threads, and whose processors, are its own, too."""
    results: list[Any] = []
    before = torch.get_num_threads()
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    return results[0]


@pytest.mark.parametrize(("asked", "cores", "world_size", "expected"), [(None, 1, 1, 1), (3, 1, 1, 3), (4, 1, 2, 2)])
def test_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, cores: int, world_size: int, expected: int
) -> None:
    monkeypatch.setattr(reference_provider, "compute_cores", lambda: [[cpu] for cpu in range(cores)])

    def use() -> int:
        torch.set_num_threads(2)
        provider_named("reference").use_threads(asked, False, 0, world_size)
        return torch.get_num_threads()

    assert in_a_thread(use) == expected


def test_no_more_threads_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever set OMP_NUM_THREADS, or torch's number, meant it."""
    monkeypatch.setattr(reference_provider, "compute_cores", lambda: [[cpu] for cpu in range(64)])

    def use() -> int:
        torch.set_num_threads(2)
        provider_named("reference").use_threads(None, False, 0, 1)
        return torch.get_num_threads()

    assert in_a_thread(use) == 2


def affinity_of_pool(pinned: bool) -> list[set[int]]:
    """Where the calling thread and the others of its pool may run."""
    before = {int(task) for task in os.listdir("/proc/self/task")}
    torch.set_num_threads(2)
    threads.bind_threads(pinned, 0)
    started = {int(task) for task in os.listdir("/proc/self/task")} - before
    return [os.sched_getaffinity(task) for task in (threading.get_native_id(), *started)]


@needs_kernels
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one processor")
def test_each_thread_has_a_core_of_its_own() -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "compute_cores", lambda: [[first], [second]])
        assert in_a_thread(lambda: affinity_of_pool(pinned=True)) == [{first}, {second}]


@needs_kernels
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one processor")
def test_all_threads_stay_on_the_fast_cores_of_a_hybrid_processor() -> None:
    usable = sorted(os.sched_getaffinity(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "compute_cores", lambda: [[usable[0]], [usable[1]]])
        patch.setattr(threads, "fast_cpus", lambda cpus: usable[:1])
        assert in_a_thread(lambda: affinity_of_pool(pinned=False)) == [set(usable[:1])] * 2


def test_ranks_have_cores_of_their_own() -> None:
    cores = [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert threads.cores_of(2, 1, cores) == [[2, 6], [3, 7]]
    with pytest.raises(ValueError, match="lower --cpu-threads"):
        threads.cores_of(3, 1, cores)


@needs_kernels
def test_an_engine_computes_with_as_many_threads_as_it_is_told() -> None:
    def count() -> int:
        with Engine(cpu_threads=3, inline=True, log_level="error"):
            return build.load("probe").num_threads()

    assert in_a_thread(count) == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
    ids=str,
)
def test_threads_that_wait_sleep_soon_unless_the_environment_says_otherwise(
    given: dict[str, str], expected: str
) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = "import os, rtp_llm; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", program], env=variables | given, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
