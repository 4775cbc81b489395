"""The entry point of a process of ``start_python``: ``python -P -m rtp_llm.srt.utils.child MODULE FD PARENT``.

Its pipe closes when the parent dies, but a process that is stopped, or busy in a library, does not notice that. So the
system is told to kill it then (Linux: ``PR_SET_PDEATHSIG``), before anything else is imported.
"""

import ctypes
import os
import signal
import sys
from importlib import import_module

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Make the system kill this process when the thread that started it ends; exit if ``parent`` is dead already."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[3]))
    import_module(sys.argv[1]).main(int(sys.argv[2]))
