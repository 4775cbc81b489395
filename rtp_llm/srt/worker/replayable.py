"""What a recorded step demands of a model: its work depends on shapes alone, never on numbers.

A recorder runs the model once under these guards. What would read a number of the device into Python, or a list that
only the host has for this step, raises NotReplayable, which says what it was.
"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.models.model_source import is_model_file

HOST_LISTS = ("seq_lens_cpu", "extend_prefix_lens_cpu", "extend_seq_lens_cpu", "prompt_lens_cpu", "shared_prefixes")
READINGS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__complex__")
}
CONSTANTS = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.frombuffer}
PLACES = {  # written where a mask is true: a device counts the places first, and the host waits for it
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


GUARDS = ("__torch_function__", "__torch_dispatch__")  # of whatever watches a recording


class NotReplayable(Exception):
    """Steps of this model, or with these parts of the engine, cannot be recorded."""


def depends_on_values(what: str) -> NotReplayable:
    """Return the error of a step whose work depends on values: what is read, and the line that reads it."""
    return NotReplayable(f"{what} ({_line()})")


def _line() -> str:
    """Return the innermost line of the engine's code that is now running, and of a model file behind it, if any."""
    ours = ""
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        module, text = str(frame.f_globals.get("__name__")), f"{frame.f_code.co_filename}, line {line}"
        if is_model_file(module):
            return f"{ours}, called by {text}" if ours else text
        guards = module == __name__ or frame.f_code.co_name in GUARDS
        if not ours and module.startswith("rtp_llm.srt.") and not guards:
            ours = text
    return ours


class Unknown:
    """Placeholder for a host list, which a recorded model must not read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *args: Any) -> NoReturn:
        raise depends_on_values(f"a host list, {self._name}, is read")

    __getitem__ = __iter__ = __len__ = __bool__ = __eq__ = __contains__ = _refuse  # type: ignore[assignment]

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()


def hide(batch: ForwardBatch, names: tuple[str, ...] = HOST_LISTS) -> None:
    """Replace lists of the host, which differ from step to step, by placeholders."""
    for name in names:
        setattr(batch, name, Unknown(name))


class NoReading(TorchFunctionMode):
    """Refuses reads of a tensor that are no operation, and keeps tensors made of Python's numbers."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READINGS:
            raise depends_on_values(f"{getattr(func, '__name__', func)} reads a tensor")
        result = func(*args, **(kwargs or {}))
        if func in CONSTANTS:
            self._kept.append(result)
        return result


class NoCounting(TorchDispatchMode):
    """Refuses operations for which the host would wait on a device: reads of a number, and places of a mask."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: otherwise torch imports its compiler, which takes a second, only to disable it here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_reading(func, args)
        if func in PLACES and _masks(args[1]):
            raise depends_on_values(f"places are counted, in {func} with a mask")
        return func(*args, **(kwargs or {}))


def refuse_reading(func: Any, args: Any) -> None:
    """Raise NotReplayable if the operation reads a value into Python, or makes a shape that depends on values."""
    if torch.Tag.data_dependent_output in func.tags:
        raise depends_on_values(f"a number is read, by {func}")
    if torch.Tag.dynamic_output_shape in func.tags and (func is not torch.ops.aten.index.Tensor or _masks(args[1:])):
        raise depends_on_values(f"a shape depends on numbers, in {func}")


@contextmanager
def guarded() -> Iterator[None]:
    """Refuse what a recorded step must not do."""
    with NoReading([]), NoCounting():
        yield


def _masks(args: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)]


def fields_of_step(batch: ForwardBatch) -> list[tuple[str, torch.Tensor]]:
    """Return the batch's tensors by their names, but for those in lists."""
    values = [(field.name, getattr(batch, field.name)) for field in fields(batch)]
    return [(name, value) for name, value in values if isinstance(value, torch.Tensor)]


def batch_tensors(batch: ForwardBatch) -> list[torch.Tensor]:
    """Return all tensors of this step; page tables and cache have the same addresses in every step."""
    waves = [tensor for wave in batch.state_waves for tensor in (wave.load, wave.store, wave.cu_seqlens)]
    return [*(tensor for _, tensor in fields_of_step(batch)), *batch.out_cache_locs, *waves]
