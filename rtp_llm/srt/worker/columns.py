"""A step's work as arrays: a few numpy calls describe a step of hundreds of rows, and one copy moves it."""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from rtp_llm.srt.forward_batch import ForwardMode
from rtp_llm.srt.plan import PageWrite, RowWork

Array = TypeVar("Array", np.ndarray, torch.Tensor)


class StepColumns(NamedTuple, Generic[Array]):
    """Columns of int64, on the host (numpy) or on the device (torch): [B] rows, [T] tokens, [S] sampled rows."""

    rows: Array  # [B]
    starts: Array  # [B] position of the first token that is computed
    counts: Array  # [B] number of tokens that are computed
    ends: Array  # [B] starts + counts
    offsets: Array  # [B] where a row's tokens begin in [T]
    token_rows: Array  # [T]
    positions: Array  # [T]
    sample_rows: Array  # [S] the last token of each row that draws, as an index into [T]


def step_columns(work: Sequence[RowWork]) -> StepColumns[np.ndarray]:
    rows = np.array([w.row for w in work], dtype=np.int64)
    starts = np.array([w.start for w in work], dtype=np.int64)
    counts = np.array([w.num_tokens for w in work], dtype=np.int64)
    samples = np.array([w.sample for w in work], dtype=bool)
    through = np.cumsum(counts)
    offsets = through - counts
    num_tokens = int(through[-1]) if len(work) else 0
    token_rows, positions = rows, starts
    if num_tokens > len(work):  # else each row computes one token
        token_rows = np.repeat(rows, counts)
        positions = np.arange(num_tokens) + np.repeat(starts - offsets, counts)
    return StepColumns(rows, starts, counts, starts + counts, offsets, token_rows, positions, (through - 1)[samples])


def mode_of(counts: list[int]) -> ForwardMode:
    if not counts:
        return ForwardMode.IDLE
    single = [count == 1 for count in counts]
    if all(single):
        return ForwardMode.DECODE
    return ForwardMode.MIXED if any(single) else ForwardMode.EXTEND


def page_entries(writes: list[PageWrite]) -> tuple[list[int], list[int], list[int]]:
    """Return rows, places and page ids of the writes; of several writes to an entry, the last."""
    entries = {(write.row, write.start + i): page for write in writes for i, page in enumerate(write.page_ids)}
    return [row for row, _ in entries], [place for _, place in entries], list(entries.values())
