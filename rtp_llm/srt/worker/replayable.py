"""What a recorded step demands of a model: its work depends on shapes alone, never on numbers.

A recorder runs the model once under these guards. What would read a number of the device into Python, or a list that
only the host has for this step, raises NotReplayable, which says what it was.
"""

from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rtp_llm.srt.forward_batch import ForwardBatch

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


class NotReplayable(Exception):
    """The model's work depends on values."""


class Unknown:
    """Placeholder for a host list, which a recorded model must not read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *args: Any) -> NoReturn:
        raise NotReplayable(f"the model reads {self._name}")

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
            raise NotReplayable(f"the model reads a tensor ({getattr(func, '__name__', func)})")
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
            raise NotReplayable(f"places are counted ({func} with a mask)")
        return func(*args, **(kwargs or {}))


def refuse_reading(func: Any, args: Any) -> None:
    """Raise NotReplayable if the operation reads a value into Python, or makes a shape that depends on values."""
    if torch.Tag.data_dependent_output in func.tags:
        raise NotReplayable(f"the model reads a number ({func})")
    if torch.Tag.dynamic_output_shape in func.tags and (func is not torch.ops.aten.index.Tensor or _masks(args)):
        raise NotReplayable(f"a shape depends on numbers ({func})")


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
