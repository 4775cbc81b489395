"""Calling compiled kernels: C functions of pointers and 64-bit integers, bound once."""

import ctypes
from collections.abc import Callable

import torch

from rtp_llm.srt.kernels.cpu import build

POINTER, INT64, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


def bind(library: str, function: str, *types: type, result: type | None = None) -> Callable[..., int]:
    """The function of ``LIBRARY.cpp``, whose arguments are of these types; pointers are given as plain integers."""
    bound = getattr(build.load(library), function)
    bound.argtypes, bound.restype = types, result
    return bound


def address(tensor: torch.Tensor | None) -> int | None:
    """Where the tensor's first element is; None (a null pointer) for None."""
    return None if tensor is None else tensor.data_ptr()
