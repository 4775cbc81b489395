"""Work on media in threads, which stops soon after its caller is cancelled."""

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
    """The caller of this work was cancelled. Not an Exception, so that decoders' error handling lets it pass."""


def check_stopped() -> None:
    """Raise Stopped if the caller of this thread's work was cancelled. Long work calls it often."""
    stop: threading.Event | None = getattr(_current, "stop", None)
    if stop is not None and stop.is_set():
        raise Stopped


class WatchedFile(io.BytesIO):
    """A file's bytes, not copied, whose reads raise Stopped after the caller was cancelled."""

    def read(self, size: int | None = -1, /) -> bytes:
        check_stopped()
        return super().read(size)


class Workers:
    """A pool of threads."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in a thread and return its result.

        If cancelled, a function that waits for a thread is never called, and a running one is stopped. Return only
        after it has ended and released its memory.
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
            del pending, result  # breaks a cycle: their error holds this frame


def _call(stop: threading.Event, function: Callable[..., T], *arguments: Any) -> T:
    _current.stop = stop
    try:
        check_stopped()
        return function(*arguments)
    except Stopped:
        stopped = RuntimeError("the work was stopped")  # only ends the waiting
    except BaseException as error:
        _forget(error)
        raise
    finally:
        _current.stop = None
    raise stopped


def _forget(error: BaseException | None) -> None:
    """Free objects that an error's frames hold, such as the pixels of a broken image."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


async def _ended(result: "asyncio.Future[Any]") -> None:
    """Wait until the work has ended, even if this task is cancelled meanwhile."""
    while not result.done():
        try:
            await asyncio.wait([result])
        except asyncio.CancelledError:
            continue
    if not result.cancelled():
        result.exception()  # mark as retrieved
