"""Recorded calls of kernels, made from C without Python between them (replay.cpp).

A call from Python takes one to two microseconds, in which the other threads of the pool may fall asleep.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from rtp_llm.srt.devices.cpu.binding import INT64, POINTER, Kernel, bind

Call = tuple[Callable[..., Any], tuple[Any, ...], Any]  # a function, its arguments, and its expected result
SLOT = 8  # bytes of an argument
REFERENCE: Any = type(ctypes.byref(ctypes.c_int()))  # by which a kernel takes its arguments in one structure


class CallOfList(ctypes.Structure):
    """``Call`` of replay.cpp."""

    _fields_ = (("function", ctypes.c_void_p), ("slots", ctypes.c_void_p), ("result", ctypes.c_int64))


class CallList:
    """Calls of kernels whose libraries have a function for lists; called without arguments, it makes them in turn."""

    def __init__(self, calls: Sequence[Call]) -> None:
        functions: list[Any] = [function for function, _, _ in calls]
        self._names = [function.__name__ for function in functions]
        self._kept = [args for _, args, _ in calls]  # structures among them
        packed = [slots(function.argtypes, args) for function, (_, args, _) in zip(functions, calls, strict=True)]
        self._slots = ctypes.create_string_buffer(b"".join(packed))
        at, entries = ctypes.addressof(self._slots), []
        for function, (_, _, result), values in zip(functions, calls, packed, strict=True):
            entries.append(CallOfList(function.in_lists, at, int(result or 0)))
            at += len(values)
        self._entries = (CallOfList * len(entries))(*entries)

    def __call__(self) -> None:
        """Make the calls.

        Raises:
            RuntimeError: a kernel returned another result than when it was recorded; later calls were not made.
        """
        done = _run_calls()(ctypes.addressof(self._entries), len(self._entries))
        if done < len(self._entries):
            raise RuntimeError(
                f"the kernel {self._names[done]} of a replayed step returned another result than "
                f"{self._entries[done].result}, which it returned when the step was recorded"
            )


@functools.cache
def _run_calls() -> Kernel:
    return bind("replay", "run_calls", POINTER, INT64, result=INT64)


def slots(types: Sequence[Any], args: Sequence[Any]) -> bytes:
    """Return a call's arguments as replay.h reads them."""
    return b"".join(bytes(kind(_number(arg))).ljust(SLOT, b"\0") for kind, arg in zip(types, args, strict=True))


def _number(arg: Any) -> Any:
    """Return a reference to a structure as its address."""
    return ctypes.addressof(arg._obj) if isinstance(arg, REFERENCE) else arg


def listed(calls: Sequence[Call]) -> list[Call]:
    """Return the calls with each run of those that a list can make as one call of a list."""
    result: list[Call] = []
    for together, group in groupby(calls, key=_fits):
        run = list(group)
        result += [(CallList(run), (), None)] if together else run
    return result


def _fits(call: Call) -> bool:
    function, args, _ = call
    if getattr(function, "in_lists", None) is None or not hasattr(function, "argtypes"):
        return False  # no kernel, or one that a profile has wrapped, to time it alone
    return all(arg is None or isinstance(arg, (int, float, REFERENCE)) for arg in args)
