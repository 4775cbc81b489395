"""Decode steps recorded whole, from rows to drawn tokens, for devices that record graphs.

A step that only continues its rows by a token each is a function of two numbers per row: which row, and at which
position. Both lie on the device, with every row's last token, its pages and what it draws by. So a step recorded for a
number of rows serves any rows: the host copies the two numbers, unless the rows are those of the step before, whose
positions the device has counted on, and launches one recording.

Steps are recorded for the sizes of a ladder. Fewer rows than the next size are filled up with dummies: they compute in
a page and a state slot that no request owns, and what they draw goes to a row that no request has.
"""

import gc
import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.device.graphs import GraphCapture, Work
from rtp_llm.srt.device.provider import DeviceProvider
from rtp_llm.srt.distributed.parallel_state import get_tp_group
from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.model_traits import ReplaysForward
from rtp_llm.srt.plan import SharedPrefix, TokenMasks
from rtp_llm.srt.utils.console_bar import show_bar
from rtp_llm.srt.worker.recorded_draws import DrawGraphs, RecordedDraws
from rtp_llm.srt.worker.replayable import NotReplayable, batch_tensors, guarded
from rtp_llm.srt.worker.sampling_tables import SamplingTables
from rtp_llm.srt.worker.step_recorder import Forward

logger = logging.getLogger(__name__)

DEFAULT_LARGEST = 256  # rows; in larger batches, launching layers takes a small part of a step
RECORDING_TIME_S = 20.0  # beyond that of the first size


def sizes_up_to(num_rows: int, largest: int | None = None, given: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the numbers of rows that steps are recorded for, ascending: 1, 2, 4, 8, then every 8 up to a limit.

    Args:
        num_rows: no batch is larger.
        largest: a lower limit; None: DEFAULT_LARGEST, unless sizes are given.
        given: sizes to take instead; one above the limit becomes the limit.
    """
    limit = min(num_rows, largest or (num_rows if given else DEFAULT_LARGEST))
    return tuple(sorted({min(size, limit) for size in given or (1, 2, 4, *range(8, limit + 8, 8))}))


def coarse_first(sizes: Sequence[int]) -> list[int]:
    """Return the largest size, then the largest of at most half as many, and so on; then the others, the largest first.

    Wherever one ends, no batch of what is recorded has more than about as many dummies as rows.
    """
    coarse = [max(sizes)]
    while smaller := [size for size in sizes if 2 * size <= coarse[-1]]:
        coarse.append(max(smaller))
    return [*coarse, *sorted(set(sizes) - set(coarse), reverse=True)]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """What a step consists of that continues rows by a token each, as the runner has it.

    Args:
        make_batch: (rows [B], positions [B]) -> the batch in which each row computes its last token, at its position;
            everything in it is computed on the device.
        step_modules: the model's modules with ``prepare_for_forward``.
        last_tokens: [rows] int64, each row's last drawn token.
        dummy_row: the row of dummies, whose page and state slot no request owns.
        shares_prefixes: steps may have prefixes that several of their rows share.
    """

    make_batch: Callable[[torch.Tensor, torch.Tensor], ForwardBatch]
    forward: Forward
    attn_backend: AttentionBackend
    step_modules: Sequence[Any]
    last_tokens: torch.Tensor
    dummy_row: int
    shares_prefixes: bool = False


@dataclass(frozen=True, slots=True)
class HostRows:
    """A step's rows: their numbers, the position of the token that each computes, and the length of its prompt.

    ``shared_prefixes`` have rows of the batch, as in ForwardBatch.
    """

    rows: np.ndarray  # [B] int64
    positions: np.ndarray  # [B] int64
    prompt_lens: np.ndarray  # [B] int64
    shared_prefixes: list[SharedPrefix] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepGraph:
    """The recordings of one size, with shared prefixes or without.

    ``planned``: where the step reads what is computed before it; ``kept``: other tensors that it reads or writes.
    """

    step: Work
    draws: DrawGraphs
    planned: list[torch.Tensor]
    kept: list[torch.Tensor]


class StepPart(Protocol):
    """What is computed once a step, before the model's layers."""

    def prepare(self, batch: ForwardBatch, /) -> None: ...

    def tensors(self) -> list[torch.Tensor]: ...


class _ModulePart:
    def __init__(self, module: Any) -> None:
        if not isinstance(module, ReplaysForward):
            raise NotReplayable(f"{type(module).__name__} has no step_tensors()")
        self.prepare, self.tensors = module.prepare_for_forward, module.step_tensors


class _PlanPart:
    def __init__(self, backend: AttentionBackend) -> None:
        self.prepare, self.tensors = backend.plan, backend.step_tensors


class StepGraphs:
    """Records decode steps and repeats them.

    Attributes:
        sizes: numbers of rows that steps are recorded for, ascending; none before ``record``, or if it was refused.
        logits: [largest size, vocab_size] float32; tokens: [largest size] int64, drawn ones; bad: [largest size] bool,
            rows whose logits are not finite. A step's are valid until the next.
        refusal: why no step is recorded; None: some are.
    """

    def __init__(
        self, step: DecodeStep, tables: SamplingTables, provider: DeviceProvider, sizes: Sequence[int], vocab_size: int
    ) -> None:
        self._step, self._provider = step, provider
        self._wanted = tuple(sizes)
        self.sizes: tuple[int, ...] = ()
        self.refusal: str | None = "nothing was recorded yet"
        largest, device = max(sizes), provider.torch_device
        self._there = _dummies(largest, step.dummy_row)  # what will be in _place once all launched steps are done
        self._place = torch.from_numpy(self._there.copy()).to(device)  # [2, largest size]: rows, positions
        self._views = {size: (self._place[0, :size], self._place[1, :size]) for size in sizes}
        self.logits = torch.zeros(largest, vocab_size, dtype=torch.float32, device=device)
        self.tokens = torch.zeros(largest, dtype=torch.int64, device=device)
        self.bad = torch.zeros(largest, dtype=torch.bool, device=device)
        self._draws = RecordedDraws(self.logits, self.tokens, step.last_tokens, tables, provider)
        self._argmax = provider.pick("argmax", torch.float32)
        self._plan = _PlanPart(step.attn_backend)
        self._inside: list[StepPart] = []  # recorded with the step
        self._before: list[StepPart] = []  # computed before it, since they need lists of the host
        self._graphs: dict[tuple[int, bool], StepGraph] = {}  # by size, and whether prefixes are shared
        self._size = largest  # of the last step

    # At the start

    @torch.inference_mode()
    def record(self) -> None:
        """Record steps of all sizes, the largest first: others find their memory in its.

        RECORDING_TIME_S after the first is done, which may have to wait for compilers, no further size is begun.
        """
        start = time.monotonic()
        free_bytes, _ = self._provider.memory_bytes()
        with _no_collection():
            try:
                capture = self._provider.graph_capture()
                self._sort_parts(max(self._wanted))
                self._record_all(capture)
            except Exception as error:  # a model's own error occurs again when it runs normally
                self._refuse(error)
                return
        logger.info(
            "recorded decode steps of %d sizes, %d to %d rows, in %.1f s and %.2f GiB",
            len(self.sizes),
            self.sizes[0],
            self.sizes[-1],
            time.monotonic() - start,
            (free_bytes - self._provider.memory_bytes()[0]) / 2**30,
        )
        if left := sorted(set(self._wanted) - set(self.sizes)):
            logger.warning(
                "batches of %s rows are filled up to the next recorded size: recording more would have taken longer "
                "than %.0f s; --cuda-graph-bs names the sizes to record",
                ", ".join(map(str, left)),
                RECORDING_TIME_S,
            )

    def _record_all(self, capture: GraphCapture) -> None:
        kinds, end = self._kinds(), math.inf
        for done, (size, shares) in enumerate(kinds, 1):
            self._record(capture, size, shares)
            end = min(end, time.monotonic() + RECORDING_TIME_S)
            goes_on = get_tp_group().all_agree(time.monotonic() < end)
            show_bar("Recording decode steps", done if goes_on else len(kinds), len(kinds))
            if not goes_on:
                return

    def _kinds(self) -> list[tuple[int, bool]]:
        """Return what is recorded, in order: all sizes, and then those of steps that share prefixes."""
        shares = self._step.shares_prefixes and self._plan in self._inside
        sizes = coarse_first(self._wanted)
        return [(size, False) for size in sizes] + [(size, True) for size in sizes if shares and size > 1]

    def _sort_parts(self, size: int) -> None:
        """Find which of a step's parts need lists of the host, and so cannot be recorded.

        Raises:
            NotReplayable: a part does not list the tensors that it makes.
        """
        parts: list[StepPart] = [_ModulePart(module) for module in self._step.step_modules]
        for part in (*parts, self._plan):
            try:
                with guarded():
                    part.prepare(self._step.make_batch(*self._views[size]))
            except NotReplayable:
                self._before.append(part)
            else:
                self._inside.append(part)

    def _record(self, capture: GraphCapture, size: int, shares: bool) -> None:
        rows, starts = _dummies(size, self._step.dummy_row)
        before, inside = self._parts(shares)
        prefixes = [SharedPrefix(0, list(range(size)))] * shares
        planned = self._prepare(size, before, HostRows(rows, starts, starts, prefixes))
        step = partial(self._run_step, size, inside)
        with guarded():
            capture.warm_up(step)
        recorded = capture.record(step)
        if shares:
            draws = self._graphs[size, False].draws
        else:
            draws = self._draws.record(capture, *self._views[size])
            self.sizes, self.refusal = tuple(sorted((*self.sizes, size))), None
        self._graphs[size, shares] = StepGraph(recorded, draws, planned, _tensors(inside))

    def _parts(self, shares: bool) -> tuple[list[StepPart], list[StepPart]]:
        """Return what is computed before a step, and what is recorded with it. The host knows shared prefixes."""
        if not shares:
            return self._before, self._inside
        return [*self._before, self._plan], [part for part in self._inside if part is not self._plan]

    def _refuse(self, error: Exception) -> None:
        self.sizes, self.refusal = (), str(error)
        self._graphs.clear()
        if isinstance(error, NotReplayable):
            logger.info("decode steps are not recorded: %s", error)
        else:
            logger.warning("decode steps are not recorded: recording one failed", exc_info=error)

    # What is recorded

    def _run_step(self, size: int, inside: Sequence[StepPart]) -> None:
        rows, positions = self._views[size]
        batch = self._step.make_batch(rows, positions)
        for part in inside:
            part.prepare(batch)
        logits = self._step.forward(batch).next_token_logits
        tokens, bad = self._argmax(logits)
        self.logits[:size] = logits
        self.bad[:size] = bad
        self._draws.finish(rows, tokens)
        positions += rows != self._step.dummy_row

    # In every step

    def takes(self, num_rows: int) -> bool:
        """Whether a step of so many rows is recorded, with dummies or without."""
        return bool(self.sizes) and 0 < num_rows <= self.sizes[-1]

    @torch.inference_mode()
    def run(self, host: HostRows) -> None:
        """Launch the step of these rows: ``tokens`` are each row's best one. ``takes`` must be true of their number."""
        num_rows = len(host.rows)
        self._size = size = self.sizes[bisect_left(self.sizes, num_rows)]
        place = _dummies(self._place.shape[1], self._step.dummy_row)
        place[0, :num_rows], place[1, :num_rows] = host.rows, host.positions
        if not np.array_equal(place[:, :size], self._there[:, :size]):
            self._provider.copy_to_device(self._place, place)
            self._there = place
        shares = bool(host.shared_prefixes) and (size, True) in self._graphs
        graph, before = self._graphs[size, shares], self._parts(shares)[0]
        for recorded, tensor in zip(graph.planned, self._prepare(size, before, host), strict=True):
            if recorded.data_ptr() != tensor.data_ptr():
                recorded.copy_(tensor)
        graph.step()
        self._there[1, :num_rows] += 1

    def draw(self, draws: bool, adjusts: bool, counts: bool, masks: TokenMasks | None, lines: Sequence[int]) -> None:
        """Launch what follows the step, all that is asked for; ``tokens`` are replaced. See ``RecordedDraws.run``."""
        self._draws.run(self._graphs[self._size, False].draws, draws, adjusts, counts, masks, lines)

    def _prepare(self, size: int, parts: Sequence[StepPart], host: HostRows) -> list[torch.Tensor]:
        """Compute parts that need lists of the host; return all tensors that they made, or may have kept."""
        if not parts:
            return []
        num_dummies = size - len(host.rows)
        starts = [*host.positions.tolist(), *[0] * num_dummies]
        batch = replace(
            self._step.make_batch(*self._views[size]),
            num_dummies=num_dummies,
            extend_prefix_lens_cpu=starts,
            seq_lens_cpu=[start + 1 for start in starts],
            prompt_lens_cpu=[*host.prompt_lens.tolist(), *[0] * num_dummies],
            shared_prefixes=host.shared_prefixes,
        )
        for part in parts:
            part.prepare(batch)
        return [*batch_tensors(batch), *_tensors(parts)]


def _tensors(parts: Sequence[StepPart]) -> list[torch.Tensor]:
    return [tensor for part in parts for tensor in part.tensors()]


def _dummies(size: int, dummy_row: int) -> np.ndarray:
    """[2, size] int64: rows and positions of dummies."""
    place = np.zeros((2, size), dtype=np.int64)
    place[0] = dummy_row
    return place


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector from running amid a recording: it takes long, and may free what a device is using."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
