"""Work on media in threads: what a failure held is free at once."""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

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
