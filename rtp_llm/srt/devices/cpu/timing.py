"""Time every call of a compiled kernel, for a profile.

Wrappers bind a kernel's C function once, so the binding is replaced: kernels bound within ``timed_kernels`` are timed
for good, others never, and without it there is no overhead.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rtp_llm.srt.devices.cpu import build
from rtp_llm.srt.utils.stopwatch import Stopwatch


@contextmanager
def timed_kernels(watch: Stopwatch) -> Iterator[None]:
    """Time the kernels that are bound within. A part is named by the calling part and ``library.function``."""
    load = build.load

    @functools.wraps(load)
    def timed_load(name: str, for_isa: str | None = None) -> Any:
        return TimedLibrary(name, load(name, for_isa), watch)

    build.load = timed_load  # type: ignore[assignment]
    try:
        yield
    finally:
        build.load = load


class TimedLibrary:
    """Replaces a ``ctypes.CDLL``."""

    def __init__(self, name: str, library: ctypes.CDLL, watch: Stopwatch) -> None:
        self._name, self._library, self._watch = name, library, watch

    def __getattr__(self, function: str) -> "TimedFunction":
        if function.endswith("_replayed"):
            raise AttributeError(f"{function}: timed kernels are called one by one")
        return TimedFunction(f"{self._name}.{function}", getattr(self._library, function), self._watch)

    def __getitem__(self, function: str) -> "TimedFunction":
        return getattr(self, function)


class TimedFunction:
    """Replaces a function of a ``ctypes.CDLL``."""

    def __init__(self, name: str, function: Any, watch: Stopwatch) -> None:
        self._name, self._function, self._watch = (name,), function, watch

    def __call__(self, *args: Any) -> Any:
        with self._watch.part((*self._watch.name, *self._name)):
            return self._function(*args)

    @property
    def untimed(self) -> Any:
        return self._function

    @property
    def argtypes(self) -> Any:
        return self._function.argtypes

    @argtypes.setter
    def argtypes(self, types: Any) -> None:
        self._function.argtypes = types

    @property
    def restype(self) -> Any:
        return self._function.restype

    @restype.setter
    def restype(self, kind: Any) -> None:
        self._function.restype = kind
