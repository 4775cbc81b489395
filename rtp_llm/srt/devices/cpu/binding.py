"""Calls of compiled kernels: C functions of pointers and numbers, bound once."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rtp_llm.srt.devices.cpu import build

POINTER, INT64, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
BOOL = ctypes.c_bool

Note = Callable[[str, Callable[..., Any], tuple[Any, ...], Any], None]  # called with name, function, arguments, result
_noting = threading.local()


class Kernel:
    """A function of a compiled library."""

    __slots__ = ("_function", "_name")

    def __init__(self, name: str, function: Any) -> None:
        self._name, self._function = name, function

    def __call__(self, *args: Any) -> Any:
        result = self._function(*args)
        if (note := getattr(_noting, "note", None)) is not None:
            note(self._name, getattr(self._function, "untimed", self._function), args, result)
        return result


def bind(library: str, function: str, *types: Any, result: Any = None) -> Kernel:
    """Bind a function of ``LIBRARY.cpp`` with arguments of these types; pointers are passed as plain integers.

    Each binding has a function object of its own: types of one do not change another.
    """
    loaded = build.load(library)
    bound: Any = loaded[function]
    bound.argtypes, bound.restype = types, result
    in_lists = getattr(loaded, f"{function}_replayed", None)  # REPLAYED in its source
    bound.in_lists = None if in_lists is None else ctypes.cast(in_lists, POINTER).value
    return Kernel(f"{library}.{function}", bound)


def library_for(name: str, dtype: torch.dtype) -> str:
    """Return the name of the kernel file for a dtype where each has its own: bfloat16's, and one with a suffix."""
    return name + {torch.bfloat16: "", torch.float32: "_f32", torch.float16: "_f16"}[dtype]


@contextmanager
def noted_calls(note: Note | None) -> Iterator[None]:
    """Call ``note`` for every call of a kernel by this thread within the context; None: note none."""
    before = getattr(_noting, "note", None)
    _noting.note = note
    try:
        yield
    finally:
        _noting.note = before


def are_noted() -> bool:
    """Whether this thread's calls are noted now."""
    return getattr(_noting, "note", None) is not None


def address(tensor: torch.Tensor | None) -> int | None:
    """Return the address of the tensor's first element; None (a null pointer) for None."""
    return None if tensor is None else tensor.data_ptr()
