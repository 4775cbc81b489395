"""What would make the host wait for a GPU, found on the device of ``fake_cuda.py``, whose memory is the host's."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from fake_cuda import FakeCuda
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rtp_llm.srt.worker.replayable import CONSTANTS, READINGS, NotReplayable, refuse_reading

COPIES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}


class Waits:
    """Collects waits with the lines of the engine that cause them.

    Tensors of the host are those made of Python's numbers or numpy's, and copies that an event says to be there.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._host: dict[int, torch.Tensor] = {}  # by storage; kept, so that no other has the same address

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at what this thread does within the context."""

        def noted(method: Any) -> Any:
            return lambda provider, tensor: self.on_host(method(provider, tensor))

        with ExitStack() as stack:
            for name in ("start_copy", "pinned"):
                stack.enter_context(mock.patch.object(FakeCuda, name, noted(getattr(FakeCuda, name))))
            stack.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda: self.note("all is waited for")))
            stack.enter_context(_Calls(self))
            stack.enter_context(_Operations(self))
            yield

    def note(self, what: str) -> None:
        self.found.append(f"{what} ({_line()})")

    def on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self._host[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def is_on_host(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self._host


class _Calls(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, waits = kwargs or {}, self._waits
        if func in READINGS and not waits.is_on_host(args[0]):
            waits.note(f"{func.__name__} reads a tensor")
        if func in COPIES and _names_device(func, args, kwargs) and not kwargs.get("non_blocking"):
            waits.note(f"{func.__name__} copies a tensor")
        if func in COPIES and kwargs.get("non_blocking") and not waits.is_on_host(args[0]):
            waits.note(f"{func.__name__} copies memory that is not pinned")
        if func in CONSTANTS and kwargs.get("device") is not None:
            waits.note(f"{func.__name__} copies numbers to the device")
        result = func(*args, **kwargs)
        return waits.on_host(result) if func in CONSTANTS else result


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._waits.is_on_host(args[0] if args else None):
            try:
                refuse_reading(func, args)
            except NotReplayable as wait:
                self._waits.note(str(wait).split(" (")[0])
        return func(*args, **(kwargs or {}))


def _line() -> str:
    """Return the innermost line of the engine that is now running; none: it is a test's."""
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        module = str(frame.f_globals.get("__name__"))
        if module.startswith("rtp_llm.") and module != refuse_reading.__module__:
            return f"{frame.f_code.co_filename}, line {line}"
    return "a test"


def _names_device(func: Any, args: Any, kwargs: Any) -> bool:
    named = (*args[1:], *kwargs.values())
    return func is not torch.Tensor.to or any(isinstance(value, str | torch.device) for value in named)
