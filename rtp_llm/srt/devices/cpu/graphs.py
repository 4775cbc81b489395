"""The step recorder for CPUs: a decode step is recorded once for each number of rows, then replayed; likewise a small
step of prompts, or of an encoder, such as a single query, for its numbers of tokens and rows.

The Python of a step's layers (views, checks, allocations, some ten calls per layer) is the same in every step, and
takes longer than the kernels of a small batch. A recording runs the model normally and notes the calls of kernels and
torch operations with their addresses; a replay makes only these calls, like a CUDA graph on a GPU, those of kernels
from C (call_list.py).

The conditions are those of CUDA graphs: a model's work must depend only on shapes, not on values. A model that reads
tensors or a batch's host lists while a kind of step is recorded runs such steps without recordings.
"""

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.devices.cpu import encoder_sizes, prompt_sizes
from rtp_llm.srt.devices.cpu.binding import noted_calls
from rtp_llm.srt.devices.cpu.call_list import Call, listed
from rtp_llm.srt.devices.cpu.memory import Reused, give_back_results
from rtp_llm.srt.forward_batch import ForwardBatch, ForwardMode
from rtp_llm.srt.kernels.whole import taken_whole
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput
from rtp_llm.srt.model_traits import ReplaysForward
from rtp_llm.srt.worker.replayable import (
    NoReading,
    NotReplayable,
    batch_tensors,
    fields_of_step,
    hide,
    refuse_reading,
)
from rtp_llm.srt.worker.step_recorder import Forward, StepRecorder

logger = logging.getLogger(__name__)

MAX_ROWS = 256  # in larger batches, Python takes a small part of a step
MAX_ENCODED_TOKENS = 1024  # likewise, of an encoder's whole inputs
MAX_PROMPT_TOKENS = 512  # likewise, of steps with prompts
MAX_PROMPT_ROWS = 4  # of such steps, dummies' included: with more, hardly one is like another
MAX_GRAPHS = 256  # a tenth of a megabyte each; batches have many sizes as requests come and go
# A kind of batch is recorded when it occurs for this time. A recording costs as much as two to four replays save: so
# rare kinds cost little, and frequent ones lose little.
RECORD_AT = 4


class CpuGraphs(StepRecorder):
    """Runs the batches that it ``takes``: the first few of a kind normally, then one recorded, all others replayed.

    A kind is a number of rows, of prompts also of tokens, of an encoder also of the longest row's. Decoding rows are
    not padded.
    """

    pads_prompts = True

    def __init__(self, forward: Forward, attn_backend: AttentionBackend, step_modules: Sequence[Any]) -> None:
        super().__init__(forward, attn_backend, step_modules)
        self._graphs: OrderedDict[Any, CpuGraph | int] = OrderedDict()  # an int: how often that kind has occurred
        self._memory = Reused()  # shared by all graphs: one runs at a time, and its output is valid until the next
        unknown = [type(m).__name__ for m in step_modules if not isinstance(m, ReplaysForward)]
        self._works = {"decode": not unknown, "prompt": not unknown, "encoder": not unknown}
        if unknown:
            logger.info("steps are not replayed: %s has no step_tensors()", unknown[0])

    def with_dummies(self, batch: ForwardBatch) -> ForwardBatch:
        if batch.forward_mode == ForwardMode.DECODE or not self.takes(batch):
            return batch
        if _encodes(batch):
            return encoder_sizes.with_dummies(batch)
        if self.dummy_row is None or batch.batch_size == MAX_PROMPT_ROWS:
            return batch
        return prompt_sizes.with_dummies(batch, self.dummy_row)

    def takes(self, batch: ForwardBatch) -> bool:
        kind = _kind(batch)
        if not self._works[kind] or batch.batch_size > MAX_ROWS:
            return False
        if kind == "encoder":
            return batch.num_tokens <= MAX_ENCODED_TOKENS
        if batch.prompt_logprobs or batch.visible_ends is not None:
            return False
        if kind == "prompt":
            is_small = batch.num_tokens <= MAX_PROMPT_TOKENS and batch.batch_size <= MAX_PROMPT_ROWS
            return is_small and batch.mm_inputs is None and batch.state_pool is None
        if len(batch.sample_rows) != batch.batch_size:
            return False
        # A prompt's last token may be a placeholder of media.
        starts = zip(batch.extend_prefix_lens_cpu, batch.prompt_lens_cpu, strict=True)
        return batch.mm_inputs is None or all(start >= prompt_len for start, prompt_len in starts)

    def run(self, batch: ForwardBatch) -> LogitsProcessorOutput:
        tensors = [*batch_tensors(batch), *self._planned()]
        key = batch.forward_mode, *((tensor.dtype, tensor.shape) for tensor in tensors)
        graph = self._graphs.pop(key, 0)
        if isinstance(graph, int):
            if graph + 1 < RECORD_AT:
                self._keep(key, graph + 1)
                return self._forward(batch)
            pool = batch.state_pool
            states = [pool.kept(wave.store) for wave in batch.state_waves] if pool is not None else []
            try:
                graph = self._record(batch)
            except Exception as error:  # a model's own error occurs again when it runs normally
                steps = "steps with prompts" if _kind(batch) == "prompt" else "steps"
                if isinstance(error, NotReplayable):
                    logger.info("%s are not replayed: %s", steps, error)
                else:
                    logger.warning("%s are not replayed: recording one failed", steps, exc_info=True)
                for put_back in states:  # layers before the one that failed have gone on by a token
                    put_back()
                return self._give_up(batch)
            self._keep(key, graph)
            return graph.output()
        self._keep(key, graph)
        return graph.replay(tensors)

    def _keep(self, key: Any, graph: "CpuGraph | int") -> None:
        """Store a graph as the most recently used; if there are too many, drop the least recently used."""
        self._graphs[key] = graph
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)

    def _give_up(self, batch: ForwardBatch) -> LogitsProcessorOutput:
        """Run the model, from now on for all steps of this kind."""
        self._works[_kind(batch)] = False
        for module in self._step_modules:
            module.prepare_for_forward(batch)
        self._attn_backend.plan(batch)
        return self._forward(batch)

    def _planned(self) -> list[torch.Tensor]:
        """Return the tensors that modules and back end made for the batch."""
        own = [tensor for module in self._step_modules for tensor in module.step_tensors()]
        return [*own, *self._attn_backend.step_tensors()]

    def _record(self, batch: ForwardBatch) -> "CpuGraph":
        give_back_results()  # those of this kind's steps, which use a graph's memory from now on
        batch = dataclasses.replace(batch, mm_inputs=None)
        for field, tensor in fields_of_step(batch):
            setattr(batch, field, tensor.clone())
        batch.out_cache_locs = [tensor.clone() for tensor in batch.out_cache_locs]
        batch.state_waves = [wave.copy() for wave in batch.state_waves]
        for module in self._step_modules:
            module.prepare_for_forward(batch)
        self._attn_backend.plan(batch)
        inputs = [*batch_tensors(batch), *self._planned()]
        hide(batch)
        recording = Recording(self._memory, self.as_recorded)
        with ExitStack() as stack:
            stack.enter_context(noted_calls(recording.note))
            stack.enter_context(taken_whole(recording.take))
            stack.enter_context(NoReading(recording.kept))
            stack.enter_context(recording)
            output = self._forward(batch)
        return CpuGraph(recording.calls, inputs, output.mapped(self._memory.lent), recording.kept)


class CpuGraph:
    """The calls of a step, with the addresses of its recording."""

    def __init__(
        self, calls: list[Call], inputs: list[torch.Tensor], output: LogitsProcessorOutput, kept: list[torch.Tensor]
    ) -> None:
        """``inputs``: tensors of the step that the calls read; ``kept``: other tensors whose addresses they use."""
        self._calls, self._inputs, self._output, self._kept = listed(calls), inputs, output, kept

    def output(self) -> LogitsProcessorOutput:
        """Return the output of the step that was run last, as an object of its own: it may be changed."""
        return copy(self._output)

    def replay(self, tensors: Sequence[torch.Tensor]) -> LogitsProcessorOutput:
        """Run the step's calls. ``tensors``: this step's, in the order of the inputs."""
        for own, tensor in zip(self._inputs, tensors, strict=True):
            if own.data_ptr() != tensor.data_ptr():
                own.copy_(tensor)
        for function, args, result in self._calls:
            if function(*args) != result:
                raise RuntimeError(f"a kernel of a replayed step returned another result than {result!r} ({function})")
        return self.output()


ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


class Recording(TorchDispatchMode):
    """Records the operations of torch that compute, and (by ``note``) calls of kernels."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: otherwise torch imports its compiler, which takes a second, only to disable it here."""
        return False

    def __init__(self, memory: Reused, as_recorded: Any = None) -> None:
        super().__init__()
        self._as_recorded = as_recorded
        self.calls: list[Call] = []
        self.kept: list[torch.Tensor] = []
        self._memory = memory

    def note(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
        """Record a call for replays."""
        if self._as_recorded is not None:
            function = self._as_recorded(name, function)
        self.calls.append((function, args, result))

    def take(self, function: Callable[..., torch.Tensor], args: tuple[Any, ...]) -> torch.Tensor:
        """Make a call that is recorded as a whole, and return its result."""
        with noted_calls(None), torch._C.DisableTorchFunction(), _disable_current_modes():
            result = function(*args)
            own = self._memory.like(result).copy_(result)
        self.note(function.__name__, _run_whole, self._lent((function, args, own)), None)
        return own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse_reading(func, args)
        result = func(*args, **kwargs)
        if func in ALLOCATIONS:
            return self._memory.like(result)
        if any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments):
            self.note(_name(func), _run, self._lent((func, args, kwargs)), None)
            return result
        inputs = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if all(_storage(x) in inputs for x in outputs):  # views
            if func is torch.ops.aten.lift_fresh.default:  # a constant
                self.kept += outputs
            return result
        own = tree_map(lambda x: self._memory.like(x).copy_(x) if isinstance(x, torch.Tensor) else x, result)
        self.note(_name(func), _run_into, self._lent((func, args, kwargs, own)), None)
        return own

    def _lent(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Let the memory of tensors be reused for later ones, although a call has them: kernels have addresses only."""
        return tree_map(lambda x: self._memory.lent(x) if isinstance(x, torch.Tensor) else x, arguments)


def _kind(batch: ForwardBatch) -> str:
    """Return "decode", "prompt" (some row computes several tokens), or "encoder"."""
    if batch.forward_mode == ForwardMode.DECODE:
        return "decode"
    return "encoder" if _encodes(batch) else "prompt"


def _encodes(batch: ForwardBatch) -> bool:
    """Whether the model keeps neither keys and values nor states: it is an encoder, and rows are whole inputs."""
    return not batch.kv_pool.groups and batch.state_pool is None and batch.mm_inputs is None


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _name(func: Any) -> str:
    return f"torch.{func.overloadpacket.__name__}"


def _run(func: Any, args: Any, kwargs: Any) -> None:
    func(*args, **kwargs)


def _run_whole(function: Callable[..., torch.Tensor], args: tuple[Any, ...], own: torch.Tensor) -> None:
    own.copy_(function(*args))


def _run_into(func: Any, args: Any, kwargs: Any, own: Any) -> None:
    for to, value in zip(tree_leaves(own), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(to, torch.Tensor):
            to.copy_(value)
