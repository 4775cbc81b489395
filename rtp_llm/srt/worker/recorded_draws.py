"""What follows a recorded decode step, recorded as well: masks, penalties, biases and bans, draws, counts of tokens.

Each is a recording of its own for each size, so that a step of greedy rows with plain logits launches none of them.
Recordings read which rows they are for, and what these want, from the device (``sampling_tables.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from rtp_llm.srt.device.graphs import GraphCapture, Work
from rtp_llm.srt.device.provider import DeviceProvider
from rtp_llm.srt.plan import TokenMasks
from rtp_llm.srt.worker.replayable import guarded
from rtp_llm.srt.worker.sampling_tables import SamplingTables

NO_MASK = -1


@dataclass(frozen=True, slots=True)
class DrawGraphs:
    """The recordings of one size.

    ``draw`` is from the step's own logits; ``adjust`` makes others of them, and takes the best token of each row;
    ``draw_adjusted`` draws from these; ``count`` notes the tokens.
    """

    draw: Work
    adjust: Work
    draw_adjusted: Work
    count: Work


class RecordedDraws:
    """Records and launches what follows steps.

    ``logits`` [largest size, vocab_size] and ``tokens`` [largest size] are those of the last step, ``last_tokens``
    [rows] of all rows.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        last_tokens: torch.Tensor,
        tables: SamplingTables,
        provider: DeviceProvider,
    ) -> None:
        self._logits, self._tokens, self._last_tokens = logits, tokens, last_tokens
        self._tables, self._provider = tables, provider
        self._argmax = provider.pick("argmax", torch.float32)
        (largest, vocab_size), device = logits.shape, logits.device
        self._adjusted = torch.zeros_like(logits)
        self._words = torch.zeros(largest, (vocab_size + 31) // 32, dtype=torch.int32, device=device)
        self._mask_lines_there = np.full(largest, NO_MASK)  # what will be in _mask_lines once all that is launched ran
        self._mask_lines = torch.from_numpy(self._mask_lines_there.copy()).to(device)

    def record(self, capture: GraphCapture, rows: torch.Tensor, positions: torch.Tensor) -> DrawGraphs:
        """Record what follows the steps of ``rows`` [size], whose drawn tokens have ``positions`` [size].

        Raises:
            NotReplayable, RuntimeError: it cannot be recorded.
        """

        def recorded(work: Work) -> Work:
            with guarded():
                capture.warm_up(work)
            return capture.record(work)

        return DrawGraphs(
            recorded(partial(self._draw, self._logits, rows, positions)),
            recorded(partial(self._adjust, rows, positions)),
            recorded(partial(self._draw, self._adjusted, rows, positions)),
            recorded(partial(self._count, rows)),
        )

    def _draw(self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """Draw the tokens of rows that are not greedy."""
        size, table = len(rows), self._tables.draws
        drawn = table.draw(logits[:size], rows, positions)
        self.finish(rows, torch.where(table.draws(rows), drawn, self._tokens[:size]))

    def _adjust(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        size = len(rows)
        adjusted = self._tables.adjustments.adjust(
            self._logits[:size], rows, positions, self._mask_lines[:size], self._words
        )
        self._adjusted[:size] = adjusted
        self.finish(rows, self._argmax(adjusted)[0])

    def _count(self, rows: torch.Tensor) -> None:
        self._tables.adjustments.count(rows, self._tokens[: len(rows)])

    def finish(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Make ``tokens`` those of the step and of its rows."""
        self._tokens[: len(rows)] = tokens
        self._last_tokens[rows] = tokens

    def run(
        self,
        graphs: DrawGraphs,
        draws: bool,
        adjusts: bool,
        counts: bool,
        masks: TokenMasks | None,
        lines: Sequence[int],
    ) -> None:
        """Launch what the last step's rows want.

        Args:
            draws: some are not greedy; adjusts: the logits of some are changed, which masks do, too; counts: the tokens
                of some are counted.
            lines: the places in the step of the rows of ``masks``.
        """
        if adjusts:
            self._copy_masks(masks, lines)
            graphs.adjust()
        if draws:
            (graphs.draw_adjusted if adjusts else graphs.draw)()
        if counts:
            graphs.count()

    def _copy_masks(self, masks: TokenMasks | None, lines: Sequence[int]) -> None:
        place = np.full_like(self._mask_lines_there, NO_MASK)
        if masks is not None:
            place[list(lines)] = np.arange(len(lines))
            self._provider.copy_to_device(self._words[: len(lines)], masks.words)
        if not np.array_equal(place, self._mask_lines_there):
            self._provider.copy_to_device(self._mask_lines, place)
            self._mask_lines_there = place
