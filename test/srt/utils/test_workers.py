"""Threads that compute for an event loop: time limits, calls that do not end, and the end of the process."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from rtp_llm.srt.utils.workers import MAX_STUCK, Busy, Overdue, Workers


def forever() -> None:
    while True:
        time.sleep(0.001)


def stubborn(released: threading.Event) -> Callable[[], None]:
    """Cannot be ended at all, as code in C that does not come back."""

    def run() -> None:
        while not released.is_set():
            with suppress(BaseException):
                released.wait()

    return run


def run(work: Callable[[Workers], Coroutine[Any, Any, None]], num_threads: int = 1) -> None:
    asyncio.run(work(Workers(num_threads, "test-workers")))


def test_results_and_errors_come_back() -> None:
    async def work(workers: Workers) -> None:
        assert await asyncio.gather(*(workers.run(lambda i=i: i * i, 10) for i in range(50))) == [
            i * i for i in range(50)
        ]
        with pytest.raises(ZeroDivisionError):
            await workers.run(lambda: 1 // 0)

    run(work, 3)


def test_an_endless_call_ends_and_others_go_on() -> None:
    async def work(workers: Workers) -> None:
        for _ in range(5):
            with pytest.raises(Overdue):
                await workers.run(forever, 0.05)
            assert await workers.run(lambda: 7, 30) == 7

    run(work)


def test_a_call_that_waits_too_long_is_not_run() -> None:
    calls = []

    async def work(workers: Workers) -> None:
        released = threading.Event()
        first = asyncio.create_task(workers.run(released.wait))
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await workers.run(lambda: calls.append(1), 0.05)
        released.set()
        await first
        assert await workers.run(lambda: len(calls)) == 0

    run(work)


def test_a_cancelled_call_is_taken_back_or_ended() -> None:
    async def work(workers: Workers) -> None:
        running, waiting = (asyncio.create_task(workers.run(forever, 1000)) for _ in range(2))
        await asyncio.sleep(0.05)
        for task in (waiting, running):
            task.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        assert await workers.run(lambda: 7, 30) == 7

    run(work)


def test_calls_that_cannot_be_ended_do_not_take_all_of_the_machine() -> None:
    released, num_before = threading.Event(), threading.active_count()

    async def work(workers: Workers) -> None:
        for _ in range(MAX_STUCK + 1):
            with pytest.raises(Overdue):
                await workers.run(stubborn(released), 0.02)
        with pytest.raises(Busy):
            await workers.run(lambda: 7, 0.02)
        assert threading.active_count() - num_before <= MAX_STUCK + 1
        released.set()
        # They end, each in its time, and then there is room again.
        assert await workers.run(lambda: 7, 60) == 7

    run(work)


def test_a_call_that_does_not_end_does_not_keep_the_process() -> None:
    script = """
import asyncio, threading
from rtp_llm.srt.utils.workers import Workers

async def main():
    asyncio.create_task(Workers(1, "w").run(threading.Event().wait))
    await asyncio.sleep(0.1)

asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
