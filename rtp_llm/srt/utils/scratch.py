"""Temporary folders that do not pile up: a new one first removes those of killed processes."""

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "rtp-llm-"
_OWNER = ".owner"  # locked by the system while the folder's process lives


class ScratchFolder:
    """A new folder for this user alone, in the system's temporary one. Its context gives ``path``."""

    def __init__(self) -> None:
        remove_abandoned()
        self._pid = os.getpid()
        self._lock: int | None = None
        while self._lock is None:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            self._lock = _lock(self.path, create=True)

    def close(self) -> None:
        """Remove the folder with all that is in it. Idempotent; does nothing in a process that was forked."""
        if self._lock is not None and os.getpid() == self._pid:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()


def remove_abandoned() -> None:
    """Remove this user's folders whose processes are dead."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another process may be removing it
            info = folder.lstat()
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
                continue
            lock = _lock(folder, create=False)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path, create: bool) -> int | None:
    """Lock a folder; return the file descriptor, or None if another process has it or has removed the folder."""
    path = folder / _OWNER
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.stat()):
            return fd
    except OSError:
        pass  # locked by another process, or removed
    os.close(fd)
    return None
