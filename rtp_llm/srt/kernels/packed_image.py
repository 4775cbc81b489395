"""Packed weights as an image, bytes that can be kept in a file, and as JSON that says what lies where in it.

Classes are found by name among those that are loaded: nothing is imported, or called, that an image names.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rtp_llm.srt.kernels.packed import Packed

ALIGNMENT = 64  # of tensors in an image
_PLAIN = (bool, int, float, str, type(None))


class NoImageError(ValueError):
    """Something cannot be part of an image; the message names it."""


class ImageWriter:
    """Describes packed weights on the host, one after the other. A tensor that comes twice is kept once."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._places: dict[tuple[int, torch.dtype, torch.Size], int] = {}
        self._numbers: dict[tuple[int, torch.dtype, torch.Size], int] = {}
        self.num_bytes = 0

    def described(self, value: Any) -> Any:
        """Describe a packed weight, or a part of one.

        Raises:
            NoImageError: a part is not a contiguous tensor, a packed weight, a plain value or a sequence.
        """
        if isinstance(value, Packed):
            contents = {name: self.described(part) for name, part in value.contents().items()}
            return {"packed": _name(type(value)), "contents": contents}
        if isinstance(value, torch.Tensor):
            return {"tensor": self._number(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": _dtype_name(value)}
        if isinstance(value, tuple):
            return {"tuple": [self.described(part) for part in value]}
        if isinstance(value, list):
            return [self.described(part) for part in value]
        if type(value) in _PLAIN:
            return value
        raise NoImageError(f"a part of a packed weight is of {type(value)}")

    def _number(self, tensor: torch.Tensor) -> int:
        if type(tensor) is not torch.Tensor or not tensor.is_contiguous():
            raise NoImageError(
                f"a packed weight has a {type(tensor).__name__} {list(tensor.shape)} of strides {tensor.stride()}"
            )
        key = tensor.data_ptr(), tensor.dtype, tensor.shape
        if key not in self._numbers:
            self._numbers[key] = len(self._tensors)
            self._places[key] = self.num_bytes
            self._tensors.append(tensor)
            self.num_bytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return self._numbers[key]

    def tensors(self) -> list[torch.Tensor]:
        return list(self._tensors)

    def places(self) -> list[Any]:
        """Describe where which tensor lies."""
        return [[_dtype_name(dtype), list(shape), place] for (_, dtype, shape), place in self._places.items()]

    def buffers(self) -> Iterator[memoryview]:
        """The bytes of the image, in order."""
        for tensor in self._tensors:
            yield bytes_of(tensor)
            yield memoryview(bytes(-tensor.nbytes % ALIGNMENT))


class ImageReader:
    """Makes packed weights of an image, without copying.

    Args:
        image: [bytes] uint8.
        places: as the writer described them.
    """

    def __init__(self, image: torch.Tensor, places: Sequence[Any]) -> None:
        self._classes = {_name(cls): cls for cls in _subclasses(Packed)}
        self._tensors = [_view(image, getattr(torch, dtype), shape, place) for dtype, shape, place in places]

    def made(self, described: Any) -> Any:
        """Return what a description is of.

        Raises:
            NoImageError: it names a class that is not loaded.
        """
        if isinstance(described, list):
            return [self.made(part) for part in described]
        if not isinstance(described, dict):
            return described
        if "tensor" in described:
            return self._tensors[described["tensor"]]
        if "dtype" in described:
            return getattr(torch, described["dtype"])
        if "tuple" in described:
            return tuple(self.made(part) for part in described["tuple"])
        name = described["packed"]
        if name not in self._classes:
            raise NoImageError(f"there is no packed weight of {name}")
        return self._classes[name].of_contents({name: self.made(part) for name, part in described["contents"].items()})


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the host, to read or to write."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _view(image: torch.Tensor, dtype: torch.dtype, shape: Sequence[int], place: int) -> torch.Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return image[place : place + size].view(dtype).view(shape)


def _subclasses(cls: Any) -> Iterator[type[Packed]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
