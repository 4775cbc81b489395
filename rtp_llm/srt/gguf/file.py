"""A GGUF file, or all parts of a split one: metadata, and tensors as views of a memory map.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little endian: magic, version, the numbers of tensors and
of keys, the keys with their values, the descriptions of tensors, padding, the tensors' data. The package ``gguf`` knows
the types. Its reader makes arrays of each single token (22 s and 900 MB for a vocabulary of 262,144), and trusts the
counts in a file; this one reads such a header in half a second, and allocates nothing that the file does not hold.
"""

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from rtp_llm.srt.gguf.header import (
    ALIGNMENT_KEY,
    ARCHITECTURE_KEY,
    DEFAULT_ALIGNMENT,
    GGUFError,
    TensorEntry,
    read_header,
    shown,
)

if TYPE_CHECKING:
    import torch

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_MOST_LETTERS = 60  # of an architecture


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor in the bits of its file.

    ``shape``: in torch's order, rows first (the file has it the other way round). ``stored``: the shape with the bytes
    of a row in place of its last dimension. ``content``: a private memory map of the file. ``first``: byte in it.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    content: mmap.mmap
    first: int

    @property
    def nbytes(self) -> int:
        return prod(self.stored)

    @property
    def data(self) -> "torch.Tensor":
        """The bytes, uint8, of the shape ``stored``: a view of the memory map, which lasts as long as its views."""
        import torch  # which reading the metadata alone does without

        return torch.frombuffer(self.content, dtype=torch.uint8, count=self.nbytes, offset=self.first).view(self.stored)


@dataclass(frozen=True)
class GGUFFile:
    """All that a GGUF says. ``paths``: the parts in order; ``metadata``: the first part's; ``tensors``: of all parts.

    Values of metadata are int, float, bool, str, or lists of these. Scalars of float32 are the shortest decimals that
    give the same float32, such as 1e-05.
    """

    paths: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    @classmethod
    def open(cls, path: str | Path, with_vocabulary: bool = True) -> Self:
        """Read a file; of a split one, all parts, whichever is given.

        Args:
            with_vocabulary: False: for weights alone; see ``read_header``.

        Raises:
            GGUFError: the file is none, is truncated or damaged, or lacks parts; the message names the key or the
                tensor.
            OSError: it cannot be read.
        """
        paths = parts_of(Path(path))
        metadata: Mapping[str, Any] = {}
        tensors: dict[str, GGUFTensor] = {}
        for number, part in enumerate(paths):
            said, found = _read_part(part, with_vocabulary)
            if len(paths) > 1:
                _check_part(part, said, number, len(paths))
            metadata = metadata or said
            if twice := tensors.keys() & found.keys():
                raise GGUFError(f"{part}: tensor {min(twice)!r} is in another part too")
            tensors |= found
        _check_whole(paths, metadata, tensors)
        return cls(paths, metadata, tensors)

    @property
    def architecture(self) -> str:
        """Return ``general.architecture``, such as ``llama``."""
        return str(self.metadata[ARCHITECTURE_KEY])


def parts_of(path: Path) -> tuple[Path, ...]:
    """Return the parts of a split file (``NAME-00001-of-00003.gguf``), any of them given; else the file itself.

    Raises:
        GGUFError: parts are missing; the message names them.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return (path,)
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count:
        raise GGUFError(f"{path}: there is no part {number} of {count}")
    names = [f"{match['stem']}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)]
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        named = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise GGUFError(
            f"{len(missing)} of the {count} parts of {path.parent / match['stem']} are missing: {named}. "
            "Put all of them into one folder, under their own names"
        )
    return tuple(path.with_name(name) for name in names)


def _check_part(path: Path, metadata: Mapping[str, Any], number: int, count: int) -> None:
    for key, expected in (("split.no", number), ("split.count", count)):
        if metadata.get(key) != expected:
            raise GGUFError(
                f"{path}: `{key}` is {shown(metadata.get(key))}, but its name says {expected}; was it renamed?"
            )


def _check_whole(paths: tuple[Path, ...], metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> None:
    count = metadata.get("split.count", 1)
    if len(paths) == 1 and count not in (0, 1):
        raise GGUFError(
            f"{paths[0]} is one of {shown(count)} parts (`split.count`), but is not named as one: give the parts their "
            "own names again, NAME-00001-of-0000N.gguf and so on"
        )
    expected = metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise GGUFError(
            f"{paths[0]}: `split.tensors.count` is {shown(expected)}, but the parts have {len(tensors)} tensors"
        )
    architecture = metadata.get(ARCHITECTURE_KEY)
    if not isinstance(architecture, str) or not 0 < len(architecture) <= _MOST_LETTERS:
        raise GGUFError(f"{paths[0]}: `{ARCHITECTURE_KEY}` must name an architecture, not {shown(architecture)}")


def _read_part(path: Path, with_vocabulary: bool) -> tuple[Mapping[str, Any], dict[str, GGUFTensor]]:
    content = _map(path)
    header = read_header(content, str(path), with_vocabulary)
    alignment = header.metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise GGUFError(f"{path}: `{ALIGNMENT_KEY}` must be a power of two from 8 on, not {shown(alignment)}")
    start = -(-header.end // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    places: list[tuple[int, int, str]] = []  # (first byte, end, name)
    for entry in header.tensors:
        if entry.name in tensors:
            raise GGUFError(f"{path}: tensor {entry.name!r} is there twice")
        try:
            tensors[entry.name] = tensor = _tensor(entry, content, start, alignment)
        except GGUFError as error:
            raise GGUFError(f"{path}: tensor {entry.name!r}: {error}") from None
        places.append((entry.offset, entry.offset + tensor.nbytes, entry.name))
    places.sort()
    for (_, end, name), (first, _, next_name) in pairwise(places):
        if first < end:
            raise GGUFError(f"{path}: tensors {name!r} and {next_name!r} overlap")
    return header.metadata, tensors


def _map(path: Path) -> mmap.mmap:
    """Map a file privately: torch wants memory that it may write to; what is written stays in this process."""
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError as error:  # of size 0, or no regular file
            raise GGUFError(f"{path} is empty or no regular file; it cannot be a GGUF") from error


def _tensor(entry: TensorEntry, content: mmap.mmap, start: int, alignment: int) -> GGUFTensor:
    try:
        kind = GGMLQuantizationType(entry.type)
        values, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise GGUFError(f"is of type {entry.type}, which is unknown; a newer version of `gguf` may know it") from None
    shape = tuple(reversed(entry.dimensions))
    if not 1 <= len(shape) <= _MOST_DIMENSIONS or min(shape) < 1:
        raise GGUFError(f"has the dimensions {list(shape)}; expected are 1 to {_MOST_DIMENSIONS}, all above 0")
    if shape[-1] % values:
        raise GGUFError(f"has rows of {shape[-1]} values, which is no multiple of {kind.name}'s {values}")
    if entry.offset % alignment:
        raise GGUFError(f"begins at {entry.offset}, which is no multiple of `{ALIGNMENT_KEY}`, {alignment}")
    stored = (*shape[:-1], shape[-1] // values * size)
    first = start + entry.offset
    end = first + prod(stored)
    if end > len(content):
        raise GGUFError(
            f"ends at byte {end}, but the file has {len(content)}: it is truncated, or not yet fully downloaded. "
            "Download it again"
        )
    return GGUFTensor(entry.name, kind, shape, stored, content, first)
