"""Release pages of memory-mapped files, which need not stay in the process once they are copied."""

import mmap
import re
import weakref
from pathlib import Path

import torch

from rtp_llm.srt.utils.freed_memory import dont_need

_files: "weakref.WeakSet[MappedFile]" = weakref.WeakSet()


class MappedFile:
    """A file that is mapped into this process. On systems other than Linux, ``drop`` does nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        _files.add(self)
        self._ranges: list[range] | None = None  # found when the first tensor is dropped: by then it is mapped

    def drop(self, tensor: torch.Tensor) -> None:
        """Give the tensor's whole pages back to the system; a later access reads them from the file again.

        Only pages of the file's own mapping are dropped, since other memory would lose its content. Changes to a
        private mapping are lost.
        """
        if self._ranges is None:
            self._ranges = mapped_ranges(self._path)
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        inside = any(start in mapped and end - 1 in mapped for mapped in self._ranges)
        if start < end and inside:
            dont_need(start, end - start)


def release(tensor: torch.Tensor) -> None:
    """Drop a tensor's pages if it lies in a MappedFile that is in use: what was read is not needed again."""
    for file in list(_files):
        file.drop(tensor)


def mapped_ranges(path: Path) -> list[range]:
    """Return the ranges of addresses at which the file is mapped."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []  # not Linux
    found = re.findall(rf"^([0-9a-f]+)-([0-9a-f]+) .* {re.escape(str(path))}$", maps, re.MULTILINE)
    return [range(int(start, 16), int(end, 16)) for start, end in found]
