"""The data of items as bytes: for their digest, and for workers in other processes."""

import json
import mmap
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch

from rtp_llm.srt.multimodal.media_error import MediaError


def absorb(content: Any, value: Any) -> None:
    """Add a value to a hash, with its kind and length, so that different values never hash the same bytes."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        content.update(f"tensor {tensor.dtype} {tuple(tensor.shape)}:".encode())
        content.update(_bytes_of(tensor))
    elif isinstance(value, Mapping):
        content.update(f"map {len(value)}:".encode())
        for key in sorted(value):
            absorb(content, str(key))
            absorb(content, value[key])
    elif isinstance(value, (list, tuple)):
        content.update(f"list {len(value)}:".encode())
        for item in value:
            absorb(content, item)
    elif isinstance(value, (str, int, float, bool, bytes, type(None))):
        data = value if isinstance(value, bytes) else repr(value).encode()
        content.update(f"{type(value).__name__} {len(data)}:".encode())
        content.update(data)
    else:
        raise MediaError(f"media data may hold tensors, numbers, strings, bytes, lists and dicts, not {_kind(value)}")


_STRUCTURE = "structure"  # name of everything but the tensors in encoded media, as JSON
_TENSOR_KEY, _BYTES_KEY = "$tensor", "$bytes"


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def pack(value: Any) -> bytes:
    """Encode numbers, strings, bytes, lists, dicts and tensors as the bytes of a safetensors file."""
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_take_apart(value, tensors)).encode()
    tensors[_STRUCTURE] = torch.frombuffer(bytearray(structure), dtype=torch.uint8)
    return safetensors.torch.save(tensors)


def _take_apart(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR_KEY: [name, str(value.dtype).removeprefix("torch.")]}
    if isinstance(value, bytes):
        name = str(len(tensors))
        tensors[name] = (
            torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0, dtype=torch.uint8)
        )
        return {_BYTES_KEY: name}
    if isinstance(value, Mapping):
        return {str(key): _take_apart(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_apart(item, tensors) for item in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    raise MediaError(f"media data may hold tensors, numbers, strings, bytes, lists and dicts, not {_kind(value)}")


class Packed:
    """The bytes of ``pack``, read piece by piece."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self._data = memoryview(data)
        self._begin = 8 + int.from_bytes(self._data[:8], "little")
        self._header = json.loads(bytes(self._data[8 : self._begin]))
        self.structure = json.loads(bytes(self._piece(_STRUCTURE)))

    def _piece(self, name: str) -> memoryview:
        begin, end = self._header[name]["data_offsets"]
        return self._data[self._begin + begin : self._begin + end]

    def value(self, structure: Any) -> Any:
        """Return the value of a part of the structure, with its tensors."""
        if isinstance(structure, list):
            return [self.value(item) for item in structure]
        if not isinstance(structure, dict):
            return structure
        if structure.keys() == {_TENSOR_KEY}:
            return self._tensor(*structure[_TENSOR_KEY])
        if structure.keys() == {_BYTES_KEY}:
            return bytes(self._piece(structure[_BYTES_KEY]))
        return {key: self.value(item) for key, item in structure.items()}

    def _tensor(self, name: str, dtype: str) -> torch.Tensor:
        piece, shape = self._piece(name), self._header[name]["shape"]
        if not piece.nbytes:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        # An encoder may write to its input, while others read the same bytes.
        memory = bytearray(piece) if piece.readonly else piece
        return torch.frombuffer(memory, dtype=getattr(torch, dtype)).view(shape)


def _kind(value: Any) -> str:
    return type(value).__name__
