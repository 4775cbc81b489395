"""Work on media in threads, which ends soon when nobody waits for it any more."""

import asyncio
import io
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


_current = threading.local()  # ``stop``: the event that ends what this thread is doing


class Stopped(BaseException):
    """Nobody waits for this work any more. No Exception, so that no decoder's error handling takes it for one."""


def check_stopped() -> None:
    """Raise Stopped where the caller of the work that this thread does is gone. To be called every now and then."""
    stop: threading.Event | None = getattr(_current, "stop", None)
    if stop is not None and stop.is_set():
        raise Stopped


class WatchedFile(io.BytesIO):
    """A file's bytes, not copied, whose reader is stopped when nobody waits for it."""

    def read(self, size: int | None = -1, /) -> bytes:
        check_stopped()
        return super().read(size)


class Workers:
    """A few threads."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """The function's result; the event loop goes on.

        If this is cancelled, a function that waits for a thread is never called, and one that runs is asked to stop.
        Only when it has ended, and so holds no memory any more, does this return.
        """
        stop = threading.Event()
        pending: Future[T] = self._pool.submit(_call, stop, function, *arguments)
        result = asyncio.wrap_future(pending)
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            stop.set()
            if not pending.cancel():
                await _ended(result)
            raise
        finally:
            del pending, result  # an error in them would hold this frame, which holds them


def _call(stop: threading.Event, function: Callable[..., T], *arguments: Any) -> T:
    _current.stop = stop
    try:
        check_stopped()
        return function(*arguments)
    except Stopped:
        stopped = RuntimeError("the work was stopped")  # which nobody reads
    except BaseException as error:
        _forget(error)
        raise
    finally:
        _current.stop = None
    raise stopped


def _forget(error: BaseException | None) -> None:
    """Free what an error's frames hold, such as the pixels of an image that broke off."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


async def _ended(result: "asyncio.Future[Any]") -> None:
    """Return when it has, however often this task is cancelled meanwhile."""
    while not result.done():
        try:
            await asyncio.wait([result])
        except asyncio.CancelledError:
            continue
    if not result.cancelled():
        result.exception()  # seen
