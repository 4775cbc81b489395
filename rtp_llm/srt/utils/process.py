"""Starting Python processes of our own, with a pipe to each."""

import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection


def start_python(module: str) -> tuple[subprocess.Popen, Connection]:
    """``python -m module FD`` with this process's ``sys.path``, and our end of a socket pair whose other end is FD.

    The pair is inherited, never opened by name: no other process can reach it, and it closes when either side ends. The
    child does not share our standard input.
    """
    ours, theirs = socket.socketpair()
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
        )
    return process, Connection(ours.detach())
