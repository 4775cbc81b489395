"""Files of a description and sections of bytes, with checksums: reading notices what is not as it was written.

    [0, 4096)   MAGIC, then place, length and checksum of the description
    sections    one after the other, each from a multiple of 64 on
    the end     the description in JSON, and of each section the length and the checksum of each PIECE_BYTES

Checksums are CRC-32: they find what disks and interrupted writers do, not what somebody made on purpose. Who may write
such a file is a matter of ``private_files.py``.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

MAGIC = b"RTP-LLM checked file 1\0\n"
HEAD = struct.Struct("<24sQQL")  # MAGIC; of the description: place, length, checksum
FIRST_SECTION = 4096
ALIGNMENT = 64
PIECE_BYTES = 4 << 20  # read and checked at once: it stays in a processor's cache
MOST_THREADS = 16

Section = Iterable[memoryview]


class DamagedFileError(ValueError):
    """A file is not as it was written, or not what was expected; the message says what is wrong."""


def write_checked(fd: int, description: Mapping[str, Any], sections: Iterable[Section]) -> int:
    """Write an empty file; return its size. ``sections``: bytes, each of any number of buffers.

    Raises:
        OSError: the file cannot be written.
    """
    place, described = FIRST_SECTION, []
    for section in sections:
        length, checksums = _write_section(fd, place, section)
        described.append((length, checksums))
        place = _aligned(place + length)
    text = json.dumps({"description": description, "sections": described}).encode()
    _write(fd, memoryview(text), place)
    _write(fd, memoryview(HEAD.pack(MAGIC, place, len(text), zlib.crc32(text))), 0)
    return place + len(text)


def _write_section(fd: int, place: int, section: Section) -> tuple[int, list[int]]:
    length, checksum, checksums = 0, 0, []
    for buffer in section:
        done = 0
        while done < len(buffer):
            part = buffer[done : done + PIECE_BYTES - length % PIECE_BYTES]
            _write(fd, part, place + length)
            checksum = zlib.crc32(part, checksum)
            done += len(part)
            length += len(part)
            if length % PIECE_BYTES == 0:
                checksums.append(checksum)
                checksum = 0
    if length % PIECE_BYTES:
        checksums.append(checksum)
    return length, checksums


def _write(fd: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(fd, data, place)
        data, place = data[written:], place + written


def _aligned(place: int) -> int:
    return -(-place // ALIGNMENT) * ALIGNMENT


class CheckedFile:
    """A file that ``write_checked`` has written, open for reading.

    Attributes:
        description: as it was written, after JSON.
        lengths: of the sections.
    """

    def __init__(self, fd: int, described: Mapping[str, Any]) -> None:
        self._fd = fd
        self.description: dict[str, Any] = described["description"]
        self._checksums: list[list[int]] = [checksums for _, checksums in described["sections"]]
        self.lengths: list[int] = [length for length, _ in described["sections"]]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the description; close it afterwards.

        Raises:
            DamagedFileError: it is not whole.
            OSError: it cannot be read.
        """
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return cls(fd, _described(fd))
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        os.close(self._fd)

    def read_into(self, targets: Sequence[memoryview], num_threads: int) -> None:
        """Read each section into a buffer of its length. After an error, buffers hold anything.

        Raises:
            DamagedFileError: a piece differs from what was written, or is missing.
            OSError: it cannot be read.
        """
        pieces, place = [], FIRST_SECTION
        for target, length, checksums in zip(targets, self.lengths, self._checksums, strict=True):
            if len(target) != length:
                raise DamagedFileError(f"a section has {length} bytes, not {len(target)}")
            for number, checksum in enumerate(checksums):
                start = number * PIECE_BYTES
                pieces.append((target[start : start + PIECE_BYTES], place + start, checksum))
            place = _aligned(place + length)
        with ThreadPoolExecutor(max(1, min(num_threads, MOST_THREADS)), "reading weights") as pool:
            for _ in pool.map(lambda piece: self._read(*piece), pieces):
                pass

    def _read(self, target: memoryview, place: int, checksum: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._fd, [target[done:]], place + done)
            if count == 0:
                raise DamagedFileError("it ends early")
            done += count
        if zlib.crc32(target) != checksum:
            raise DamagedFileError(f"bytes from {place} on are not those that were written")


def _described(fd: int) -> Mapping[str, Any]:
    size = os.fstat(fd).st_size
    head = os.pread(fd, HEAD.size, 0)
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        raise DamagedFileError("it does not begin as such a file does")
    _, place, length, checksum = HEAD.unpack(head)
    if place + length != size:
        raise DamagedFileError(f"it has {size} bytes, not {place + length}")
    text = os.pread(fd, length, place)
    if zlib.crc32(text) != checksum:
        raise DamagedFileError("its description is not the one that was written")
    described: Mapping[str, Any] = json.loads(text)
    return described
