"""Start child Python processes, each with a pipe, which never outlive this process."""

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import NamedTuple


class StartedPython(NamedTuple):
    process: subprocess.Popen
    pipe: Connection
    path: str  # its PYTHONPATH

    @property
    def is_current(self) -> bool:
        """Return whether a process started now would find the same modules."""
        return self.path == _python_path()

    def discard(self) -> None:
        """End the process, if it still runs."""
        self.pipe.close()
        self.process.kill()
        self.process.wait()


def start_python(module: str) -> StartedPython:
    """Start a process that runs ``module.main(FD)`` with this process's ``sys.path``; return it and the other end of
    FD's socket pair.

    The pair is inherited, never opened by name: no other process can reach it, and it closes when either side ends. The
    child does not share this process's standard input. It imports nothing from the working directory (``-P``), which
    may be a checkpoint's, unless that is on this process's ``sys.path``. It is killed when this process ends (see
    ``child.py``).
    """
    ours, theirs = socket.socketpair()
    path = _python_path()
    with theirs:
        fd = theirs.fileno()
        command = [sys.executable, "-P", "-m", "rtp_llm.srt.utils.child", module, str(fd), str(os.getpid())]
        process = _starter.call(
            lambda: subprocess.Popen(
                command, pass_fds=[fd], stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path}
            )
        )
    return StartedPython(process, Connection(ours.detach()), path)


def _python_path() -> str:
    """Return the entries of ``sys.path`` joined. The empty one (the working directory of an interactive session) comes
    last, where it shadows nothing."""
    entries = [entry for entry in sys.path if entry]
    return os.pathsep.join(entries if len(entries) == len(sys.path) else [*entries, os.getcwd()])


class _Starter:
    """Starts processes in one thread, which lives as long as this process: the system kills a child when the thread
    that started it ends."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], subprocess.Popen], Future[subprocess.Popen]]]
        self._calls = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[], subprocess.Popen]) -> subprocess.Popen:
        future: Future[subprocess.Popen] = Future()
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rtp-llm-starter", daemon=True)
                self._thread.start()
        self._calls.put((function, future))
        return future.result()

    def _run(self) -> None:
        while True:
            function, future = self._calls.get()
            try:
                future.set_result(function())
            except BaseException as error:  # raised again in the thread that waits
                future.set_exception(error)


_starter = _Starter()


def _start_afresh() -> None:
    """Replace the starter in a forked process, where its thread does not exist."""
    global _starter
    _starter = _Starter()


os.register_at_fork(after_in_child=_start_afresh)
