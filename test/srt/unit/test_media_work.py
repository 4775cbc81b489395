"""Work on media in threads: what a failure held is free at once, and freed memory goes back to the system."""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from rtp_llm.srt.multimodal import work
from rtp_llm.srt.multimodal.work import Workers


class Pixels:
    pass


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_a_failure_holds_nothing() -> None:
    held: list[weakref.ref[Pixels]] = []

    def break_off() -> None:
        pixels = Pixels()
        held.append(weakref.ref(pixels))
        raise OSError("cut short")

    def decode() -> None:
        try:
            break_off()
        except OSError as error:
            raise ValueError("broken") from error

    async def run() -> None:
        workers = Workers(2, "test-media")
        for _ in range(3):
            with pytest.raises(ValueError, match="broken"):
                await workers.run(decode)

    asyncio.run(run())
    assert [ref() for ref in held] == [None] * 3


def test_memory_goes_back_when_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(work, "TRIM_AFTER_S", 0.05)
    monkeypatch.setattr(work, "_trim", lambda: trims.append(1))
    monkeypatch.setattr(work.sys, "platform", "linux")

    async def run() -> None:
        workers = Workers(2, "test-media")
        await asyncio.gather(*(workers.run(int) for _ in range(10)))
        while not trims:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)

    asyncio.run(run())
    assert len(trims) == 1


def test_trimming_works_here() -> None:
    work._trim()
