"""The recurrent states of a worker's rows: which slots a step's pieces read and write."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from rtp_llm.srt.device.provider import DeviceProvider
from rtp_llm.srt.forward_batch import StateWave
from rtp_llm.srt.plan import Admission, RowWork, StateAccess
from rtp_llm.srt.state_pool import StatePool


class Piece(NamedTuple):
    """Consecutive tokens of a row that recurrent layers compute in one call."""

    begin: int  # its tokens are [begin, end) of the batch's
    end: int
    load: int  # the slot of the states before it
    store: int  # the slot that the states after it go to


class RowStates:
    """Knows each row's own slot, and makes a step's waves of it."""

    def __init__(self, pool: StatePool, num_rows: int, provider: DeviceProvider) -> None:
        self.pool = pool
        self._provider = provider
        self._slots = np.full(num_rows, pool.dummy_slot, dtype=np.int64)
        self._slots_on_device = torch.from_numpy(self._slots.copy()).to(provider.torch_device)

    def admit(self, admissions: Sequence[Admission]) -> None:
        for admission in admissions:
            if not 0 < admission.state_slot <= self.pool.num_slots:
                raise ValueError(
                    f"row {admission.row} was given state slot {admission.state_slot}, but slots are 1 to "
                    f"{self.pool.num_slots}: a plan for a model with states gives each row a slot of its own"
                )
            self._slots[admission.row] = admission.state_slot
        if admissions:
            rows, slots = [each.row for each in admissions], [each.state_slot for each in admissions]
            columns = self._provider.to_device_together([np.array(rows), np.array(slots)])
            self._slots_on_device[columns[0]] = columns[1]

    def wave_on_device(self, rows: torch.Tensor) -> StateWave:
        """Return the wave of a step in which each of these rows [B] computes a token, from its own states."""
        slots, counts = self._slots_on_device[rows], range(len(rows) + 1)
        return StateWave(slots, slots, torch.arange(len(counts), device=slots.device), list(counts))

    def waves(self, work: Sequence[RowWork], accesses: Sequence[StateAccess], num_dummies: int) -> list[StateWave]:
        """Return the waves of a step of these rows and, after them, dummies of one token each."""
        dummies = [self.pool.dummy_slot] * num_dummies
        own = self._slots[[w.row for w in work]]
        if not any(access.saves for access in accesses):
            load = own
            if accesses:
                access_of = {access.row: access.load for access in accesses}
                load = np.array([access_of.get(w.row, slot) for w, slot in zip(work, own, strict=True)], dtype=np.int64)
            counts = [*(w.num_tokens for w in work), *[1] * num_dummies]
            return [self._wave(np.append(load, dummies), np.append(own, dummies), counts)]
        rows = pieces_of(work, own.tolist(), accesses)
        num_tokens = sum(w.num_tokens for w in work)
        rows += [[Piece(num_tokens + i, num_tokens + i + 1, slot, slot)] for i, slot in enumerate(dummies)]
        num_waves = max(map(len, rows))
        return [self._wave_of([row[n] for row in rows if len(row) > n], num_waves > 1) for n in range(num_waves)]

    def _wave_of(self, pieces: Sequence[Piece], is_part: bool) -> StateWave:
        tokens = np.concatenate([np.arange(piece.begin, piece.end) for piece in pieces]) if is_part else None
        load, store = ([piece.load for piece in pieces], [piece.store for piece in pieces])
        return self._wave(np.array(load), np.array(store), [piece.end - piece.begin for piece in pieces], tokens)

    def _wave(
        self, load: np.ndarray, store: np.ndarray, counts: Sequence[int], tokens: np.ndarray | None = None
    ) -> StateWave:
        ends = np.cumsum([0, *counts], dtype=np.int64)
        columns = [load.astype(np.int64), store.astype(np.int64), ends, *([] if tokens is None else [tokens])]
        on_device = self._provider.to_device_together(columns)
        return StateWave(
            load=on_device[0],
            store=on_device[1],
            cu_seqlens=on_device[2],
            cu_seqlens_cpu=ends.tolist(),
            tokens=None if tokens is None else on_device[3],
            first_token=None if tokens is None or tokens[-1] - tokens[0] + 1 > len(tokens) else int(tokens[0]),
        )

    def keep_last(self, work: Sequence[RowWork], accesses: Sequence[StateAccess]) -> None:
        """Copy the states after rows' last tokens to where they are to be saved. Call it after the forward pass."""
        ends = {w.row: w.start + w.num_tokens for w in work}
        kept = [
            (int(self._slots[access.row]), slot)
            for access in accesses
            for position, slot in access.saves
            if position == ends[access.row]
        ]
        self.pool.copy([source for source, _ in kept], [target for _, target in kept])


def pieces_of(work: Sequence[RowWork], slots: Sequence[int], accesses: Sequence[StateAccess]) -> list[list[Piece]]:
    """Return the pieces of each row, which end where its states are saved, and at its last token.

    Args:
        slots: each row's own slot.
    """
    access_of = {access.row: access for access in accesses}
    rows = []
    begin = 0
    for w, own in zip(work, slots, strict=True):
        access = access_of.get(w.row)
        load, end = (own if access is None else access.load), begin + w.num_tokens
        pieces: list[Piece] = []
        for position, slot in () if access is None else access.saves:
            cut = begin + position - w.start
            if cut < end:
                pieces.append(Piece(pieces[-1].end if pieces else begin, cut, load, slot))
                load = slot
        pieces.append(Piece(pieces[-1].end if pieces else begin, end, load, own))
        rows.append(pieces)
        begin = end
    return rows
