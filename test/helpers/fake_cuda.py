"""A device like a GPU on the CPU: graphs that really record and repeat, copies that arrive late, and no waiting.

``torch.cuda``'s graphs, streams and events are replaced while ``fake_cuda()`` is open, so that the engine's code for
GPUs runs as it is. What a GPU does, and a CPU would not, is done here as well: recording computes nothing, what one
graph computed is lost when another of its pool runs, a copy to the host is there only when its event says so, and
whatever would wait for the device is refused while a graph is recorded.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partialmethod
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from rtp_llm.srt.attention.torch import DecodeBucket, StepLayout, TorchAttention
from rtp_llm.srt.device.provider import Kernel
from rtp_llm.srt.device.registry import ATTENTION_BACKENDS, DEVICES
from rtp_llm.srt.devices.cuda.provider import CudaProvider
from rtp_llm.srt.forward_batch import AttentionSpec, ForwardBatch
from rtp_llm.srt.kernels.packed import PackedExperts
from rtp_llm.srt.kv_pool import slots_of

ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run on the CPU
NEVER_WRITTEN = -(1 << 40)  # an index that none has


class Device:
    """What the device has done, for tests."""

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.on_the_way: list[tuple[torch.Tensor, torch.Tensor]] = []  # copies to the host: target, values
        self.last_of_pool: dict[int, FakeGraph] = {}
        self.num_recorded = 0
        self.num_launched = 0

    def refuse_while_recording(self) -> None:
        if self.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")


DEVICE = Device()
RANK = ExitStack()  # open in the process of a rank


class Recording(TorchDispatchMode):
    """Notes operations with the tensors that they read and wrote."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: dict[int, torch.Tensor] = {}  # by storage
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # what was written to

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            DEVICE.refuse_while_recording()
        if func.namespace == "c10d":  # whose operations write to their tensors, and do not say so
            for tensor in tree_leaves((args, kwargs)):
                self._keep(tensor)
            self.calls.append((_exchange, (func, args), kwargs, None))
            return func(*args, **kwargs)
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written or "out" in kwargs:
            for tensor in tree_leaves((written, kwargs.get("out"))):
                self._keep(tensor)
            result = func(*args, **kwargs)
            self.calls.append((func, args, kwargs, None))
            return result
        result = func(*args, **kwargs)
        sources = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        new = [x for x in outputs if _storage(x) not in sources]
        self.made |= {_storage(x): x for x in new}
        if new and func not in ALLOCATIONS:
            self.calls.append((func, args, kwargs, result))
        return result

    def _keep(self, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and _storage(tensor) not in self.made:
            storage = tensor.untyped_storage()
            if _storage(tensor) not in self.before:
                self.before[_storage(tensor)] = storage, storage.clone()

    def undo(self) -> None:
        """Leave everything as if nothing had been computed."""
        for storage, values in self.before.values():
            storage.copy_(values)
        self.before = {}
        self.spoil()

    def spoil(self) -> None:
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(NEVER_WRITTEN if tensor.dtype == torch.int64 else -(1 << 30))


def _exchange(func: Any, args: Any, **kwargs: Any) -> None:
    *_, work = func(*args, **kwargs)
    work.wait()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class FakeGraph:
    """``torch.cuda.CUDAGraph``."""

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local" and DEVICE.recording is None
        self._pool = pool
        self._recording = DEVICE.recording = Recording()
        self._recording.__enter__()

    def capture_end(self) -> None:
        DEVICE.recording = None
        self._recording.__exit__(None, None, None)  # not in inference mode, whose end would bring it back
        with torch.inference_mode():
            self._recording.undo()
        DEVICE.num_recorded += 1

    @torch.inference_mode()
    def replay(self) -> None:
        DEVICE.num_launched += 1
        other = DEVICE.last_of_pool.get(self._pool)
        if other is not None and other is not self:
            other._recording.spoil()
        DEVICE.last_of_pool[self._pool] = self
        for func, args, kwargs, results in self._recording.calls:
            values = func(*args, **kwargs)
            if results is not None:
                for target, value in zip(tree_leaves(results), tree_leaves(values), strict=True):
                    if isinstance(target, torch.Tensor):
                        target.copy_(value)


class FakeStream:
    def wait_stream(self, other: "FakeStream") -> None:
        DEVICE.refuse_while_recording()


class FakeEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def elapsed_time(self, end: "FakeEvent") -> float:
        """In milliseconds."""
        return 1e3 * (end._at - self._at)

    def record(self) -> None:
        DEVICE.refuse_while_recording()
        self._at = time.perf_counter()
        self._copies, DEVICE.on_the_way = DEVICE.on_the_way, []

    @torch.inference_mode()
    def synchronize(self) -> None:
        DEVICE.refuse_while_recording()
        for target, values in self._copies:
            target.copy_(values)


@contextmanager
def fake_cuda() -> Iterator[Device]:
    """Replace what the engine uses of ``torch.cuda``; give a device that has done nothing yet."""
    replaced = {
        "CUDAGraph": FakeGraph,
        "Stream": FakeStream,
        "Event": FakeEvent,
        "stream": lambda stream: nullcontext(),
        "current_stream": FakeStream,
        "graph_pool_handle": lambda: id(object()),
        "synchronize": DEVICE.refuse_while_recording,
        "empty_cache": DEVICE.refuse_while_recording,
        "mem_get_info": lambda: (8 << 30, 16 << 30),
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **replaced))
        if INTERPRETS:
            executor = import_module("triton.runtime.interpreter").GridExecutor
            stack.enter_context(mock.patch.object(executor, "__call__", partialmethod(_launch, executor.__call__)))
        DEVICE.__init__()  # type: ignore[misc]
        yield DEVICE


def _launch(executor: Any, run: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run a kernel in Triton's interpreter, and note it in a recording."""
    recording = DEVICE.recording
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        if recording is not None:  # with its mode open, it would note the copies that it keeps
            for tensor in tree_leaves((args, kwargs)):
                recording._keep(tensor)
            recording.calls.append((run, (executor, *args), kwargs, None))
        run(executor, *args, **kwargs)


def recorded_and_launched(worker: object) -> tuple[int, int]:
    """Return a rank's numbers of graphs; for ``executor.rpc("apply", ...)``."""
    return DEVICE.num_recorded, DEVICE.num_launched


class FakeCuda(CudaProvider):
    """The engine's own provider for GPUs, on the CPU."""

    torch_device = "cpu"
    process_group = "gloo"
    activities = {"CPU": ProfilerActivity.CPU}

    def prepare_rank(self, rank: int, world_size: int) -> torch.device:
        """In the process of a rank, until it ends."""
        RANK.enter_context(fake_cuda())
        return torch.device("cpu")

    def problem(self) -> str | None:
        return None

    def find(self, name: str, dtype: torch.dtype) -> Kernel | None:
        return super().find(name, dtype) if INTERPRETS else None

    def pack_experts(self, weight: torch.Tensor) -> PackedExperts | None:
        return super().pack_experts(weight) if INTERPRETS else None

    def pinned(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    def start_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        DEVICE.refuse_while_recording()
        target = torch.full(tensor.shape, -1, dtype=torch.int64).to(tensor.dtype)
        DEVICE.on_the_way.append((target, tensor.clone()))
        return target

    def attention_backend(self, dtype: torch.dtype) -> str:
        """Return the one of GPUs, if it can be recorded and its kernels can be interpreted."""
        own = super().attention_backend(dtype)
        return own if INTERPRETS and ATTENTION_BACKENDS.load(own).replays else "padded"


class PaddedAttention(TorchAttention):
    """Decodes over the whole of each row's page table, masked by lengths that only the device knows."""

    replays = True

    def step_tensors(self) -> list[torch.Tensor]:
        return []

    def _layout(self, batch: ForwardBatch, group: int, layer: AttentionSpec) -> StepLayout:
        if not batch.forward_mode.is_decode():
            return super()._layout(batch, group, layer)
        table, page_size = batch.page_tables[group], batch.kv_pool.groups[group].page_size
        keys = torch.arange(table.shape[1] * page_size)[None, :]
        ends = batch.seq_lens[:, None]
        first = torch.zeros_like(ends)
        if layer.window is not None:
            first = (ends - layer.window).clamp(min=0)
        if layer.chunk is not None:
            first = (ends - 1) // layer.chunk * layer.chunk
        visible = (keys >= first) & (keys < ends)
        slots = slots_of(table, batch.req_pool_indices[:, None].expand_as(visible), keys.expand_as(visible), page_size)
        bucket = DecodeBucket(torch.arange(len(ends)), torch.where(visible, slots, 0), visible[:, None, None, :])
        return StepLayout([bucket], [])


@contextmanager
def registered() -> Iterator[None]:
    """Make ``--device fake_cuda`` a choice, and its attention back end; forget both after it."""
    names = {DEVICES: ("fake_cuda", "FakeCuda"), ATTENTION_BACKENDS: ("padded", "PaddedAttention")}
    for registry, (name, kind) in names.items():
        registry.register(name, f"fake_cuda:{kind}")
    try:
        yield
    finally:
        for registry, (name, _) in names.items():
            del registry.added[name]
