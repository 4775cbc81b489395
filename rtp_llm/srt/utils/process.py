"""Starting Python processes of our own, with a pipe to each."""

import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import NamedTuple


class StartedPython(NamedTuple):
    process: subprocess.Popen
    pipe: Connection
    path: str  # its PYTHONPATH

    @property
    def is_current(self) -> bool:
        """Whether one that is started now would find the same modules."""
        return self.path == _python_path()

    def discard(self) -> None:
        """Ends the process, if it still runs."""
        self.pipe.close()
        self.process.kill()
        self.process.wait()


def start_python(module: str) -> StartedPython:
    """``python -m module FD`` with this process's ``sys.path``, and our end of a socket pair whose other end is FD.

    The pair is inherited, never opened by name: no other process can reach it, and it closes when either side ends. The
    child does not share our standard input.
    """
    ours, theirs = socket.socketpair()
    path = _python_path()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
        )
    return StartedPython(process, Connection(ours.detach()), path)


def _python_path() -> str:
    return os.pathsep.join(entry or os.getcwd() for entry in sys.path)
