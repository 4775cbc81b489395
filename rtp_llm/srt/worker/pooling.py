"""The pooled outputs of a worker's rows: which hidden states each needs, over the chunks of its prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from rtp_llm.srt.device.provider import DeviceProvider
from rtp_llm.srt.layers.pooler import Pooler
from rtp_llm.srt.plan import Admission, RowWork
from rtp_llm.srt.pooling import PooledOutput, PoolingSpec

Key = tuple[str, int | None, bool | None, bool]  # what is asked for: task, dimensions, normalize, a comparison

NOT_FINITE = "the model's output is not finite for this request"


@dataclass(slots=True)
class PooledRow:
    """A row whose request asks for a pooled output."""

    spec: PoolingSpec
    prompt_len: int
    positions: npt.NDArray[np.int64]  # of the tokens whose hidden states are read
    kept: list[torch.Tensor] = field(default_factory=list)  # those of earlier chunks, [n, size] each

    @property
    def key(self) -> Key:
        return self.spec.task, self.spec.dimensions, self.spec.normalize, self.spec.against is not None


@dataclass(frozen=True, slots=True)
class Part:
    """The share of one row in a step's hidden states."""

    index: int  # in ``plan.work``
    row: PooledRow
    count: int
    is_last: bool  # the prompt ends in this step


@dataclass(frozen=True, slots=True)
class PooledLines:
    """The outputs of requests that ask for the same: ``lines`` [N, width] float32, ``counts[i]`` of them for the work
    with index ``indices[i]``; with ``per_token`` False each has one."""

    lines: torch.Tensor
    indices: list[int]
    counts: list[int]
    per_token: bool

    def outputs(self, lines: torch.Tensor) -> list[tuple[int, PooledOutput | None]]:
        """Return (index in ``plan.work``, output), of a copy of ``lines`` on the host; None for numbers that are not
        finite."""
        array = lines.numpy().astype("<f4", copy=False)
        finite = np.isfinite(array)
        is_finite = None if finite.all() else finite.all(axis=1)
        found: list[tuple[int, PooledOutput | None]] = []
        start = 0
        for index, count in zip(self.indices, self.counts, strict=True):
            end, shape = start + count, [count, array.shape[1]] if self.per_token else [array.shape[1]]
            is_good = is_finite is None or is_finite[start:end].all()
            found.append((index, PooledOutput(array[start:end].tobytes(), shape) if is_good else None))
            start = end
        return found


class RowPooling:
    """Collects hidden states of rows, and calls the model's poolers."""

    def __init__(self, poolers: Mapping[str, Pooler], provider: DeviceProvider) -> None:
        self._poolers = poolers
        self._provider = provider
        self._rows: dict[int, PooledRow] = {}
        self._parts: list[Part] = []  # of the step whose tokens were named last

    def admit(self, admission: Admission, ids: npt.NDArray[np.int64]) -> None:
        spec = admission.spec.pooling
        if spec is not None:
            positions = self._poolers[spec.task].positions(ids[spec.skip :]) + spec.skip
            self._rows[admission.row] = PooledRow(spec, len(ids), positions)

    def release(self, row: int) -> None:
        self._rows.pop(row, None)

    def tokens(self, work: Sequence[RowWork], offsets: Sequence[int]) -> torch.Tensor | None:
        """Return ForwardBatch.pooled_tokens of a step. ``offsets``: where each row's tokens begin in the batch."""
        self._parts = []
        if not self._rows:
            return None
        tokens = []
        for index, (w, offset) in enumerate(zip(work, offsets, strict=True)):
            row = self._rows.get(w.row)
            if row is None:
                continue
            end = w.start + w.num_tokens
            if w.start == 0 and end >= row.prompt_len:  # the whole input
                tokens.append(row.positions + offset)
                self._parts.append(Part(index, row, len(row.positions), True))
                continue
            first, last = np.searchsorted(row.positions, (w.start, end))
            tokens.append(row.positions[first:last] + (offset - w.start))
            self._parts.append(Part(index, row, int(last - first), end >= row.prompt_len))
        return self._provider.to_device_together([np.concatenate(tokens)])[0] if tokens else None

    def token_types(self, work: Sequence[RowWork], offsets: Sequence[int], num_tokens: int) -> torch.Tensor | None:
        """Return ForwardBatch.token_types of a step; None if no row has a second text."""
        types = np.zeros(num_tokens, dtype=np.int64)
        has_pairs = False
        for w, offset in zip(work, offsets, strict=True) if self._rows else ():
            row = self._rows.get(w.row)
            if row is not None and row.spec.pair_start is not None:
                has_pairs = True
                types[offset + max(0, row.spec.pair_start - w.start) : offset + w.num_tokens] = 1
        return self._provider.to_device_together([types])[0] if has_pairs else None

    @torch.inference_mode()
    def lines(self, states: torch.Tensor | None) -> list[PooledLines]:
        """Return the outputs of the rows whose prompts end in the step.

        Args:
            states: [P, size], the hidden states of ``tokens``; None: there are none.
        """
        if states is None:
            return []
        keys = {part.row.key for part in self._parts}
        if len(keys) == 1 and all(part.is_last and not part.row.kept for part in self._parts):
            return [self._make(keys.pop(), self._parts, states)]
        groups: dict[Key, list[tuple[Part, torch.Tensor]]] = {}
        for part, piece in zip(self._parts, states.split([part.count for part in self._parts]), strict=True):
            if part.is_last:
                groups.setdefault(part.row.key, []).append((part, piece))
            else:
                part.row.kept.append(piece.clone())
        made = []
        for key, group in groups.items():
            pieces = [piece for part, last in group for piece in (*part.row.kept, last)]
            made.append(self._make(key, [part for part, _ in group], torch.cat(pieces)))
        return made

    def _make(self, key: Key, parts: Sequence[Part], states: torch.Tensor) -> PooledLines:
        """Return the lines of rows that ask for the same. ``states``: [P, size], of all their tokens that are read."""
        task, dimensions, normalize, is_comparison = key
        pooler = self._poolers[task]
        counts = [len(part.row.positions) for part in parts]
        lines = pooler(states, self._provider.to_device(counts, torch.int64), dimensions, normalize)
        indices = [part.index for part in parts]
        if is_comparison:
            queries = [part.row.spec.against for part in parts]
            sums = [self._max_sim(query, piece) for query, piece in zip(queries, lines.split(counts), strict=True)]
            return PooledLines(torch.stack(sums)[:, None], indices, [1] * len(parts), False)
        return PooledLines(lines, indices, counts if pooler.per_token else [1] * len(parts), pooler.per_token)

    def _max_sim(self, query: PooledOutput | None, lines: torch.Tensor) -> torch.Tensor:
        """Return the sum over a query's vectors of the largest product with one of ``lines`` [tokens, width] (ColBERT:
        Khattab and Zaharia, 2020); 0 without lines."""
        assert query is not None
        if not len(lines):
            return lines.new_zeros(())
        vectors = np.frombuffer(query.data, dtype="<f4").reshape(query.shape).astype(np.float32)
        return (torch.from_numpy(vectors).to(lines.device) @ lines.T).amax(dim=1).sum()
