"""Read the header of a GGUF, trusting nothing in it: no count makes us allocate more than the file holds."""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # bytes
ALIGNMENT_KEY = "general.alignment"
ARCHITECTURE_KEY = "general.architecture"

MAX_HEADER = 1 << 27  # bytes of metadata and descriptions: six times those of a vocabulary of 262,144 tokens
_MOST_NAME_BYTES = 65535  # of a key, by the format
_MOST_DIMENSIONS = 16  # far more than there are, so that the message can say which

_NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_UINT32, _UINT64 = struct.Struct("<I"), struct.Struct("<Q")


class GGUFError(ValueError):
    """A GGUF cannot be used: it is damaged, or says what is not supported. The message names the key or the tensor."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The description of a tensor, unchecked. ``dimensions``: as in the file, the length of a row first."""

    name: str
    dimensions: tuple[int, ...]
    type: int  # of ggml
    offset: int  # bytes from the beginning of the tensors' data


@dataclass(frozen=True, slots=True)
class Header:
    """``end``: the byte after the header."""

    metadata: dict[str, Any]
    tensors: list[TensorEntry]
    end: int


def read_header(content: Any, path: str, with_vocabulary: bool = True) -> Header:
    """Read the header of a file's content (a buffer).

    Args:
        with_vocabulary: False: arrays below ``tokenizer.`` are left empty, which saves a second and much memory.

    Raises:
        GGUFError: it is damaged, or of a version that is unknown.
    """
    _check_magic(bytes(content[:8]), path)
    reader = _Reader(content, path, 8)
    num_tensors, num_keys = reader.uint64(), reader.uint64()
    metadata: dict[str, Any] = {}
    for number in range(num_keys):
        reader.place = f"key {number + 1} of {num_keys}"
        key = reader.name()
        if key in metadata:
            raise GGUFError(f"{path}: key {shown(key)} is there twice")
        reader.place = f"key {shown(key)}"
        metadata[key] = reader.value(is_skipped=not with_vocabulary and key.startswith("tokenizer."))
    tensors = []
    for number in range(num_tensors):
        reader.place = f"the description of tensor {number + 1} of {num_tensors}"
        tensors.append(reader.tensor())
    return Header(metadata, tensors, reader.offset)


def _check_magic(start: bytes, path: str) -> None:
    if start[:4] != MAGIC:
        raise GGUFError(f"{path} is no GGUF: it begins with {start[:4]!r} instead of {MAGIC!r}{_what_it_is(start)}")
    if len(start) < 8:
        raise GGUFError(f"{path} is truncated: it ends within its first 8 bytes. Download it again")
    version = int.from_bytes(start[4:], "little")
    swapped = int.from_bytes(start[4:], "big")
    if swapped in VERSIONS:
        raise GGUFError(
            f"{path} is big endian, which is not supported. Convert it: "
            f"python -m gguf.scripts.gguf_convert_endian {path} little"
        )
    if version not in VERSIONS:
        raise GGUFError(f"{path} is of version {version}; supported are {' and '.join(map(str, VERSIONS))}")


def _what_it_is(start: bytes) -> str:
    if re.match(rb"version", start):
        return ". It seems to be a pointer of Git LFS: fetch the file itself with `git lfs pull`"
    if re.match(rb"\s*<", start):
        return ". It seems to be a web page: was it downloaded from the page about the file?"
    if start[:4] in (b"ggml", b"ggjt", b"ggmf", b"lmgg", b"tjgg", b"fmgg"):
        return ". It seems to be of a format before GGUF, which is not supported"
    return ""


class _Reader:
    """Reads values one after another. ``place`` says, for errors, what is being read."""

    def __init__(self, content: Any, path: str, offset: int) -> None:
        self.offset = offset
        self.place = "the numbers of keys and tensors"
        self._content = content
        self._path = path
        self._size = len(content)
        self._readers: dict[GGUFValueType, Callable[[], Any]] = {
            GGUFValueType.STRING: self.string,
        }

    def error(self, problem: str) -> GGUFError:
        return GGUFError(f"{self._path}: {self.place}: {problem}")

    def advance(self, size: int) -> int:
        """Skip ``size`` bytes that are there, and return where they begin."""
        start, self.offset = self.offset, self.offset + size
        if self.offset > self._size:
            raise self.error(
                f"needs {size} bytes at byte {start}, but the file has {self._size}: it is damaged or truncated. "
                "Download it again"
            )
        if self.offset > MAX_HEADER:
            raise self.error(f"lies beyond the first {MAX_HEADER} bytes; a header is not that long")
        return start

    def uint32(self) -> int:
        return int(_UINT32.unpack_from(self._content, self.advance(4))[0])

    def uint64(self) -> int:
        return int(_UINT64.unpack_from(self._content, self.advance(8))[0])

    def string(self) -> str:
        length = self.uint64()
        start = self.advance(length)
        try:
            return str(self._content[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"has a text that is not UTF-8, at byte {start + error.start}") from None

    def name(self) -> str:
        start = self.offset
        name = self.string()
        if not name or self.offset - start - 8 > _MOST_NAME_BYTES:
            raise self.error(f"has a name of {len(name)} letters; expected are 1 to {_MOST_NAME_BYTES} bytes")
        return name

    def kind(self) -> GGUFValueType:
        number = self.uint32()
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.error(f"has a value of type {number}, which is unknown") from None

    def value(self, is_skipped: bool = False) -> Any:
        """Read a value of any kind; ``is_skipped``: nothing of an array."""
        kind = self.kind()
        if kind == GGUFValueType.ARRAY:
            return self.array(is_skipped)
        if kind in self._readers:
            return self._readers[kind]()
        [value] = self.numbers(kind, 1)
        return float(str(np.float32(value))) if kind == GGUFValueType.FLOAT32 else value

    def numbers(self, kind: GGUFValueType, count: int) -> list[Any]:
        dtype = np.dtype(_NUMBERS[kind])
        start = self.advance(count * dtype.itemsize)
        values = np.frombuffer(self._content, dtype, count, start)
        return (values != 0).tolist() if kind == GGUFValueType.BOOL else values.tolist()

    def array(self, is_skipped: bool) -> list[Any]:
        kind, length = self.kind(), self.uint64()
        if kind == GGUFValueType.ARRAY:
            raise self.error("is an array of arrays, which is not supported")
        if not is_skipped:
            is_text = kind == GGUFValueType.STRING
            return [self.string() for _ in range(length)] if is_text else self.numbers(kind, length)
        if kind == GGUFValueType.STRING:
            self._skip_strings(length)
        else:
            self.advance(length * np.dtype(_NUMBERS[kind]).itemsize)
        return []

    def _skip_strings(self, count: int) -> None:
        end = self.offset
        for _ in range(count):
            if end + 8 > self._size:
                self.advance(end + 8 - self.offset)  # which is an error
            end += 8 + _UINT64.unpack_from(self._content, end)[0]
        self.advance(end - self.offset)

    def tensor(self) -> TensorEntry:
        name = self.name()
        self.place = f"the description of tensor {shown(name)}"
        num_dimensions = self.uint32()
        if num_dimensions > _MOST_DIMENSIONS:
            raise self.error(f"has {num_dimensions} dimensions; expected are 1 to 4")
        dimensions = tuple(self.uint64() for _ in range(num_dimensions))
        return TensorEntry(name, dimensions, self.uint32(), self.uint64())


def shown(value: object) -> str:
    """Write a value from a file for a message; a long one is cut."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
