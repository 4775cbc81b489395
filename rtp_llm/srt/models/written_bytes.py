"""A record of which bytes of a model's parameters were written while its weights were loaded.

A name that was loaded does not tell that a parameter is whole: a loader may write half of it. So every write that torch
makes is recorded, by its place in memory, whatever the dtype, and whoever writes: a layer's loader, or a model's own
``load_weights``. Nothing is read or compared: it costs some ten microseconds for each operation of torch, of any size.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rtp_llm.srt.kernels.block_tensor import BlockTensor

Runs = np.ndarray  # [n, 2] int64: first byte, and the byte after the last, in a storage
MOST_RUNS = 1 << 16  # that are kept before they are merged

# Operations that set all of their first argument, whatever it held. Others, such as ``mul_``, keep what was there.
_SETS_ALL = frozenset(
    f"aten::{name}_"
    for name in ("copy", "fill", "zero", "uniform", "normal", "random", "_foreach_copy", "_foreach_zero")
)


class WrittenBytes(TorchDispatchMode):
    """Records, within its context and thread, what is written to the given parameters and buffers.

    Writes by other means than torch, and by other threads, are not seen.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: otherwise torch imports its compiler, which takes a second, only to disable it here."""
        return False

    def __init__(self, targets: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._written: dict[int, Coverage] = {}  # by the address of a storage
        self._targets: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}  # id -> the target, its storage's address
        for target in targets:
            address = _address(target)
            if target.numel():
                self._targets[id(target)] = weakref.ref(target), address
                self._written.setdefault(address, Coverage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._note(func, args, kwargs)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func._schema.name
        if name in _SETS_ALL:
            self._add(args[0])
        elif name in _SETS_SOME and (coverage := self._written.get(_address(args[0]))) is not None:
            coverage.add(_some_runs(args[0], _SETS_SOME[name](args, kwargs)))
        for argument in func._schema.arguments:
            if argument.kwarg_only and argument.alias_info is not None and argument.alias_info.is_write:  # out=
                self._add(kwargs.get(argument.name))

    def _add(self, written: Any) -> None:
        for tensor in written if isinstance(written, (list, tuple)) else [written]:
            tensor = tensor.blocks if isinstance(tensor, BlockTensor) else tensor
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                coverage = self._written.get(_address(tensor))
                if coverage is not None:
                    coverage.add(runs_of(tensor))

    def missing(self, target: torch.Tensor) -> Runs:
        """Return the target's bytes that were not written, relative to its first.

        None are missing of a target that was made, or got other memory, after the record began: it was made of
        something.
        """
        reference, address = self._targets.get(id(target), (None, 0))
        if reference is None or reference() is not target or _address(target) != address:
            return np.empty((0, 2), dtype=np.int64)
        first = target.storage_offset() * target.element_size()
        return self._written[address].missing(runs_of(target)) - first

    def described(self, target: torch.Tensor) -> str | None:
        """Describe what is missing of a target; None: nothing.

        Such as ``60 of 120 values were not written, all of them within [:, 6:12]``.
        """
        missing = self.missing(target)
        if not len(missing):
            return None
        number = int((missing[:, 1] - missing[:, 0]).sum()) // target.element_size()
        where = ""
        if target.is_contiguous() and number < target.numel():
            where = f", all of them within {_box(missing // target.element_size(), target.shape)}"
        return f"{number} of {target.numel()} values were not written{where}"


class Coverage:
    """A set of bytes of a storage, as runs."""

    def __init__(self) -> None:
        self._parts: list[Runs] = []
        self._num_runs = 0
        self._most_runs = MOST_RUNS

    def add(self, runs: Runs) -> None:
        self._parts.append(runs)
        self._num_runs += len(runs)
        if self._num_runs > self._most_runs:
            merged = self._merged()
            self._parts, self._num_runs = [merged], len(merged)
            self._most_runs = max(MOST_RUNS, 2 * len(merged))

    def _merged(self) -> Runs:
        runs = np.concatenate(self._parts) if self._parts else np.empty((0, 2), dtype=np.int64)
        runs = runs[np.argsort(runs[:, 0], kind="stable")]
        if not len(runs):
            return runs
        ends = np.maximum.accumulate(runs[:, 1])
        begins_new = np.concatenate(([True], runs[1:, 0] > ends[:-1]))
        firsts = np.flatnonzero(begins_new)
        lasts = np.concatenate((firsts[1:] - 1, [len(runs) - 1]))
        return np.stack((runs[firsts, 0], ends[lasts]), axis=1)

    def missing(self, wanted: Runs) -> Runs:
        """Return the runs of ``wanted``, which are sorted and apart, that are not in the set."""
        merged = self._merged()
        starts = np.concatenate(([np.iinfo(np.int64).min], merged[:, 1]))  # the gaps between the runs
        ends = np.concatenate((merged[:, 0], [np.iinfo(np.int64).max]))
        left = []
        for start, end in wanted.tolist():
            low, high = np.searchsorted(ends, start, side="right"), np.searchsorted(starts, end, side="left")
            gaps = np.stack((starts[low:high].clip(min=start), ends[low:high].clip(max=end)), axis=1)
            left.append(gaps[gaps[:, 0] < gaps[:, 1]])
        return np.concatenate(left) if left else np.empty((0, 2), dtype=np.int64)


def runs_of(tensor: torch.Tensor) -> Runs:
    """Return the bytes of a tensor, or of a view, in its storage, sorted."""
    size = tensor.element_size()
    if tensor.is_contiguous():
        start = tensor.storage_offset() * size
        return np.array([[start, start + tensor.nbytes]], dtype=np.int64)
    dims = sorted(
        (stride * size, number) for number, stride in zip(tensor.shape, tensor.stride(), strict=True) if number > 1
    )
    run = size
    outer: list[tuple[int, int]] = []
    for stride, number in dims:
        if stride == run and not outer:
            run *= number
        elif stride:  # else all are the same
            outer.append((stride, number))
    starts = np.array([tensor.storage_offset() * size], dtype=np.int64)
    for stride, number in outer:
        starts = (np.arange(number, dtype=np.int64)[:, None] * stride + starts).reshape(-1)
    starts.sort()
    return np.stack((starts, starts + run), axis=1)


def _some_runs(tensor: torch.Tensor, is_written: torch.Tensor) -> Runs:
    """Return the bytes of the values of a tensor for which ``is_written``, of its shape, is True."""
    size = tensor.element_size()
    strides = torch.tensor(tensor.stride(), dtype=torch.int64)
    places: torch.Tensor = is_written.nonzero().cpu() @ strides
    starts = (places.numpy() + tensor.storage_offset()) * size
    return np.stack((starts, starts + size), axis=1)


def _marked(mark: Callable[[torch.Tensor, Any], Any]) -> Callable[[Any, Any], torch.Tensor]:
    def is_written(args: Any, kwargs: Any) -> torch.Tensor:
        marks = torch.zeros(args[0].shape, dtype=torch.bool, device=args[0].device)
        mark(marks, args)
        return marks

    return is_written


def _mark_indices(marks: torch.Tensor, args: Any) -> None:
    accumulates = len(args) > 3 and args[3]
    if not accumulates:
        torch.ops.aten.index_put_.default(marks, args[1], marks.new_ones(()))


# Operations that set the part of their first argument that the others choose.
_SETS_SOME: dict[str, Callable[[Any, Any], torch.Tensor]] = {
    "aten::index_put_": _marked(_mark_indices),
    "aten::index_copy_": _marked(lambda marks, args: marks.index_fill_(args[1], args[2], True)),
    "aten::index_fill_": _marked(lambda marks, args: marks.index_fill_(args[1], args[2], True)),
    "aten::scatter_": _marked(lambda marks, args: marks.scatter_(args[1], args[2], True)),
    "aten::masked_fill_": _marked(lambda marks, args: marks.masked_fill_(args[1], True)),
}


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _box(runs: Runs, shape: Iterable[int]) -> str:
    """Return the smallest box, as slices, that holds runs of a contiguous tensor's values."""
    sizes = list(shape)
    firsts, lasts = runs[:, 0], runs[:, 1] - 1
    slices = []
    for dim, size in enumerate(sizes):
        inner = int(np.prod(sizes[dim + 1 :], dtype=np.int64))
        first, last = firsts // inner, lasts // inner
        if (first // size != last // size).any():  # some run goes round
            slices.append(":")
            continue
        low, high = int((first % size).min()), int((last % size).max()) + 1
        slices.append(":" if (low, high) == (0, size) else f"{low}:{high}")
    return f"[{', '.join(slices)}]"
