"""A process in a group of its own, which is stopped while others are measured."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

END_WITHIN_S = 20
LAST_LINES = 15


class SideFailed(Exception):
    """An engine's process raised an error or ended; with the last lines of its log."""


class ProcessGroup:
    """A process and all that it starts. Its standard error goes to the file ``log``.

    An idle engine whose threads spin would take time from the one that is measured, so every engine is stopped
    (SIGSTOP) except while it is asked: between ``awake``'s begin and end.
    """

    def __init__(
        self, name: str, command: Sequence[str], variables: Mapping[str, str], log: Path, **pipes: Any
    ) -> None:
        self.name = name
        self._log = log
        with log.open("w") as file:
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file} | pipes
            self.process: subprocess.Popen[str] = subprocess.Popen(
                command, env=dict(variables), start_new_session=True, preexec_fn=_end_with_parent, **options
            )

    @contextmanager
    def awake(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def failure(self, what: str) -> SideFailed:
        """The error, with the end of the log."""
        lines = self._log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        return SideFailed("\n".join([f"{self.name}: {what}; the end of its log:", *(f"    {line}" for line in lines)]))

    def peak_memory(self) -> int:
        """Bytes of the most resident memory that the process itself has had; 0 where /proc does not tell."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)

    def end(self) -> None:
        """Asks the group to end, and makes it."""
        if self.process.poll() is None:
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)
            try:
                self.process.wait(timeout=END_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


def _end_with_parent() -> None:
    """Linux kills the process when the thread that started it ends, however that ends: a stopped one would not see."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
