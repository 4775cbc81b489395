"""What draws read of rows, on the device, and what the host notes of it until the next step writes it there."""

from collections.abc import Sequence

import numpy as np

from rtp_llm.srt.device.provider import DeviceProvider
from rtp_llm.srt.plan import TokenMasks
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker.adjust_table import Adjustment, AdjustTable
from rtp_llm.srt.worker.draw_table import DrawTable


class SamplingTables:
    """What recorded steps draw by, and what changes their logits; with a line for the row of dummies.

    Attributes:
        draws, adjustments: the tables, in which ``fill`` writes the rows that have entered since.
    """

    def __init__(self, max_rows: int, vocab_size: int, provider: DeviceProvider) -> None:
        self.draws = DrawTable(max_rows + 1, vocab_size, provider)
        self.adjustments = AdjustTable(max_rows + 1, vocab_size, provider)
        self._adjusted: set[int] = set()
        self._drawn_by: dict[int, tuple[SamplingParams, int]] = {}  # not in the table yet
        self._changed_by: dict[int, Adjustment | None] = {}

    def enter(self, row: int, params: SamplingParams, seed: int, adjustment: Adjustment | None) -> None:
        self._drawn_by[row] = params, seed
        if adjustment is not None:
            self._adjusted.add(row)
            self._changed_by[row] = adjustment

    def leave(self, row: int) -> None:
        """Nothing changes the row's logits any more; harmless if nothing did."""
        if row in self._adjusted:
            self._adjusted.discard(row)
            self._changed_by[row] = None

    def adjusts(self, rows: Sequence[int]) -> bool:
        return not self._adjusted.isdisjoint(rows)

    def fill(self) -> None:
        """Write the rows that have entered or left since."""
        self.draws.write(self._drawn_by)
        self.adjustments.write(self._changed_by)
        self._drawn_by, self._changed_by = {}, {}


def masked_lines(rows: Sequence[int], masks: TokenMasks, vocab_size: int) -> list[int]:
    """Return the lines, among those of ``rows``, of the rows that are masked.

    Raises:
        ValueError: masks of another shape, or of rows that are not sampled in this step.
    """
    shape = (len(masks.rows), (vocab_size + 31) // 32)
    if masks.words.shape != shape or masks.words.dtype != np.int32:
        raise ValueError(f"masks must be int32 {list(shape)}, not {masks.words.dtype} {list(masks.words.shape)}")
    lines = {row: line for line, row in enumerate(rows)}
    if strange := sorted(set(masks.rows) - lines.keys()):
        raise ValueError(f"masks for rows {strange}, which are not sampled in this step")
    return [lines[row] for row in masks.rows]
