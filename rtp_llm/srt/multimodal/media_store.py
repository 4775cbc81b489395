"""Encoded media in files, for workers in other processes: messages hold a file's name, not its content."""

import mmap
import os
import threading
import weakref
from contextlib import suppress
from itertools import count
from pathlib import Path

from rtp_llm.srt.request_spec import MediaFile
from rtp_llm.srt.utils.scratch import ScratchFolder


class MediaStore:
    """Writes media into files of this user alone. A file lives as long as the object that ``put`` returned, and at
    most as long as this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder: ScratchFolder | None = None
        self._numbers = count()

    def put(self, content: bytes) -> MediaFile:
        """Write content to a new file. Raise OSError if it cannot be written."""
        path = self._new_path()
        try:
            with open(path, "xb") as file:
                file.write(content)
        except OSError:
            _remove(path)
            raise
        stored = MediaFile(path)
        weakref.finalize(stored, _remove, path)
        return stored

    def _new_path(self) -> str:
        with self._lock:
            if self._folder is None:
                self._folder = ScratchFolder()
                weakref.finalize(self, self._folder.close)
            return str(self._folder.path / f"media-{next(self._numbers)}")


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def open_content(content: bytes | MediaFile) -> bytes | mmap.mmap:
    """Return the bytes of ``PromptMedia.content``. A file is mapped, and may be removed afterwards; writes to the
    mapping stay in this process."""
    if isinstance(content, bytes):
        return content
    with Path(content.path).open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
