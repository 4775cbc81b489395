"""Freed memory goes back to the system while an event loop runs."""

import asyncio
import time

import pytest

from rtp_llm.srt.utils import freed_memory
from rtp_llm.srt.utils.freed_memory import BUSY_S, give_back_freed_memory


def test_it_is_given_back_after_work_and_not_without(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    used_s = 10.0
    monkeypatch.setattr(freed_memory, "EVERY_S", 0.001)
    monkeypatch.setattr(freed_memory, "_trim", lambda: trims.append)
    monkeypatch.setattr(time, "process_time", lambda: used_s)

    async def run() -> list[int]:
        nonlocal used_s
        task = asyncio.create_task(give_back_freed_memory())
        counts = []
        for more_s in (BUSY_S / 2, BUSY_S, 0.0):
            await asyncio.sleep(0.2)
            counts.append(len(trims))
            used_s += more_s
        task.cancel()
        return counts

    assert asyncio.run(run()) == [1, 1, 2]


def test_where_there_is_no_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory.sys, "platform", "plan9")
    asyncio.run(asyncio.wait_for(give_back_freed_memory(), 10))


def test_it_can_be_called_here() -> None:
    trim = freed_memory._trim()
    assert trim is None or trim(0) in (0, 1)
