"""Memory that is not needed goes back to the system: freed one while an event loop runs, pages of libraries."""

import asyncio
import math
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from rtp_llm.srt.utils import freed_memory
from rtp_llm.srt.utils.freed_memory import (
    BUSY_S,
    drop_library_pages,
    give_back_freed_memory,
    give_back_once,
    unwritten_ranges,
)


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


SMAPS = """\
00400000-00402000 r-xp 00000000 08:01 12 /usr/lib/libone.so
Size:                  8 kB
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
00402000-00403000 r--p 00002000 08:01 12 /usr/lib/libone.so (deleted)
Anonymous:             0 kB
00403000-00404000 r--p 00003000 08:01 12 /usr/lib/libone.so
Rss:                   4 kB
Anonymous:             4 kB
00404000-00405000 rw-p 00004000 08:01 12 /usr/lib/libone.so
Anonymous:             0 kB
00405000-00406000 r--s 00000000 00:01 34 /memfd:shared
Anonymous:             0 kB
00406000-00407000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
00407000-00408000 r--p 00000000 00:00 0
Anonymous:             0 kB
"""


def test_pages_that_hold_what_was_written_stay() -> None:
    assert list(unwritten_ranges(SMAPS)) == [range(0x400000, 0x402000), range(0x402000, 0x403000)]


@pytest.mark.skipif(sys.platform != "linux", reason="pages are told by Linux")
def test_library_pages_leave_and_come_back() -> None:
    def resident() -> int:
        fields = re.findall(
            r" r-xp .*libtorch_cpu\.so\n(?:\w+:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text()
        )
        return sum(map(int, fields))

    ones = torch.ones(100)
    before = resident()
    drop_library_pages()
    assert resident() < before
    give_back_once()
    assert float((ones.exp() @ ones).log()) == pytest.approx(1 + math.log(100))
