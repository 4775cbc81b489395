"""Threads that compute for an event loop without blocking it, and do not keep the process alive."""

import asyncio
import ctypes
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

MAX_STUCK = 3  # threads that did not end when they should, for each working one


class Overdue(Exception):
    """A call did not end in time."""


class Busy(Exception):
    """A call found no free thread in time."""


class _TimedOut(BaseException):
    """Ends a call in its thread. Not an Exception, which the called function might catch."""


@dataclass(slots=True, eq=False)
class _Job:
    function: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread_id: int = 0  # of the thread that runs it
    start_s: float = 0.0
    is_done: bool = False
    is_ended: bool = False  # by a timeout: its thread takes no other job


class Workers:
    """A few daemon threads. An overdue call is ended by an exception in its thread at the next Python instruction
    (``PyThreadState_SetAsyncExc``), and another thread takes its place. C code that does not return keeps its thread;
    there are at most ``MAX_STUCK`` such threads for each working one.

    Args:
        num_threads: most calls that run at once.
        name: of the threads.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_working = 0
        self._num_stuck = 0

    async def run(self, function: Callable[[], T], timeout_s: float | None = None) -> T:
        """Run ``function()`` in one of the threads. If cancelled, a call that has not begun is withdrawn.

        Args:
            timeout_s: for waiting for a thread, and again for running.

        Raises:
            Busy: no thread was free in time.
            Overdue: it did not end in time. It is ended, without waiting for that.
        """
        self._start_threads()
        job = _Job(function)
        self._jobs.put(job)
        result: asyncio.Future[T] = asyncio.wrap_future(job.future)
        if timeout_s is None:
            return await result
        try:
            await asyncio.wait([result], timeout=timeout_s)
            if not result.done() and job.future.cancel():
                raise Busy
            if not result.done():
                await asyncio.wait([result], timeout=job.start_s + timeout_s - time.monotonic())
            if not result.done():
                raise Overdue
            return result.result()
        finally:
            if not (result.done() or job.future.cancel()):
                self._end(job)

    def _start_threads(self) -> None:
        with self._lock:
            if self._num_working == self._num_threads or self._num_stuck > MAX_STUCK * self._num_threads:
                return
            self._num_working += 1
        threading.Thread(target=self._main, name=self._name, daemon=True).start()

    def _end(self, job: _Job) -> None:
        with job.lock:
            if job.is_done or not job.future.running():
                return
            job.is_ended = True
            with self._lock:
                self._num_working -= 1
                self._num_stuck += 1
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(job.thread_id), ctypes.py_object(_TimedOut))
        self._start_threads()

    def _main(self) -> None:
        with suppress(_TimedOut):  # it may come a little late
            while self._work(self._jobs.get()):
                pass
        with self._lock:
            self._num_stuck -= 1
        self._start_threads()  # for calls that wait because no thread could be added

    def _work(self, job: _Job) -> bool:
        """Run a job; return whether the thread may go on."""
        job.thread_id, job.start_s = threading.get_ident(), time.monotonic()
        if not job.future.set_running_or_notify_cancel():
            return True
        result, error = None, None
        try:
            result = job.function()
        except BaseException as raised:  # raised again where it is awaited
            error = raised
        with job.lock:
            job.is_done = True
        if job.is_ended:
            return False
        if error is not None:
            job.future.set_exception(error)
        else:
            job.future.set_result(result)
        return True
