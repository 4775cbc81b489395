"""Causes of different attention outputs in a vision tower, found by computing attention again with the reference's
queries, keys and values; learned positions that are not added; modules on the other side of a pooling."""

from collections.abc import Iterator, Mapping
from itertools import product, takewhile

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.tools.verify.evidence import Evidence, Finding
from rtp_llm.tools.verify.locate import relative_error
from rtp_llm.tools.verify.order_causes import matching_rows, order_text
from rtp_llm.tools.verify.pooling_causes import explain_pooling
from rtp_llm.tools.verify.trace import INPUT, KEYS, QUERIES, VALUES, Place, Trace

Trial = tuple[float, tuple[int, ...], str]  # (scaling, patches of each segment, how queries and keys are turned)
AS_IT_IS = "as the reference"


class VisionTrials:
    """Trials of attention. ``attended``: our output [patches, heads * head_dim], which is not the reference's."""

    def __init__(self, name: str, ours: Trace, theirs: Trace, attended: torch.Tensor) -> None:
        self._call, self._own_call, self._attended = theirs.vision_calls[name], ours.vision_calls[name], attended
        queries, keys, values = (theirs.tensors[Place(name, part)] for part in (QUERIES, KEYS, VALUES))
        num_heads = self._call.num_heads
        head_dim = queries.shape[-1] // num_heads
        self._states = [queries.unflatten(-1, (num_heads, head_dim))]
        for shared in (keys, values):  # by several query heads
            heads = shared.unflatten(-1, (-1, head_dim))
            self._states.append(heads.repeat_interleave(num_heads // heads.shape[1], dim=1))
        self._turned = {AS_IT_IS: self._states[:2]} | dict(self._turnings())

    def explain(self, theirs: torch.Tensor, tolerance: float) -> str | None:
        """Return the cause; None: no trial reproduces ours, or none the reference's output ``theirs``."""
        right = (self._call.scaling, self._call.lengths, AS_IT_IS)
        if relative_error(self._attend(right), theirs) > tolerance:
            return None
        own, head_dim = self._own_call, self._states[0].shape[-1]
        scalings = dict.fromkeys([right[0], own.scaling, 1.0, head_dim**-0.5, 1 / head_dim])
        segments = dict.fromkeys([right[1], own.lengths, (sum(right[1]),)])
        trials: list[Trial] = [
            trial
            for trial in product(scalings, segments, self._turned)
            if trial != right and sum(trial[1]) == len(self._attended)
        ]
        trials.sort(key=lambda trial: sum(mine != yours for mine, yours in zip(trial, right, strict=True)))
        for trial in trials:
            if relative_error(self._attend(trial), self._attended) <= tolerance:
                return "; ".join(_changes(trial, right))
        return None

    def _turnings(self) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Yield other rotations of queries and keys, after undoing the reference's."""
        if self._call.cos_sin is None:
            return
        cos, sin = (table[:, None] for table in self._call.cos_sin.chunk(2, dim=-1))
        if _is_by_quarters(cos, sin):
            yield from self._turnings_by_quarters(cos, sin)
            return
        plain = [_turn(x, cos, -sin) for x in self._states[:2]]
        yield "ours not at all", plain
        yield "ours the other way round", [_turn(x, cos, -sin) for x in plain]
        yield "ours by neighbours, not by halves", [_turn_neighbours(x, cos, sin) for x in plain]
        swapped = [_rows_and_columns_exchanged(table) for table in (cos, sin)]
        yield "ours with rows and columns exchanged", [_turn(x, *swapped) for x in plain]
        if self._own_call.cos_sin is not None and self._own_call.cos_sin.shape == self._call.cos_sin.shape:
            own = [table[:, None] for table in self._own_call.cos_sin.chunk(2, dim=-1)]
            yield f"ours by {self._angles()}", [_turn(x, *own) for x in plain]

    def _turnings_by_quarters(self, cos: torch.Tensor, sin: torch.Tensor) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Yield the same where one half of a head turns by the row, the other by the column."""
        plain = [_turn_halves(x, cos, -sin) for x in self._states[:2]]
        yield "ours not at all", plain
        yield "ours the other way round", [_turn_halves(x, cos, -sin) for x in plain]
        swapped = [table.roll(table.shape[-1] // 2, -1) for table in (cos, sin)]
        yield "ours with rows and columns exchanged", [_turn_halves(x, *swapped) for x in plain]
        yield "ours by halves of a head, not by quarters", [_turn(x, cos, sin) for x in plain]

    def _angles(self) -> str:
        """Say what our angles are to the reference's: the same ones in another order, or others."""
        assert self._own_call.cos_sin is not None and self._call.cos_sin is not None
        order = matching_rows(_told_apart(self._own_call.cos_sin), _told_apart(self._call.cos_sin), 1e-3)
        if order is None:
            return "other angles"
        return f"the reference's angles in another order of patches: {order_text(order)}"

    def _attend(self, trial: Trial) -> torch.Tensor:
        scaling, lengths, turning = trial
        q, k = self._turned[turning]
        pieces = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, self._states[2])), strict=True)
        attended = [F.scaled_dot_product_attention(*piece, scale=scaling) for piece in pieces]  # type: ignore[misc]
        return torch.cat(attended, dim=1).transpose(0, 1).flatten(1)


def _rows_and_columns_exchanged(table: torch.Tensor) -> torch.Tensor:
    """Exchange rows and columns in cosines or sines [patches, 1, head_dim], whose halves each turn first by the row."""
    return torch.cat([half.roll(half.shape[-1] // 2, -1) for half in table.chunk(2, dim=-1)], dim=-1)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + half) of [patches, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _turn_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + quarter) within each half of [patches, heads, head_dim]."""
    parts = zip(*(tensor.chunk(2, dim=-1) for tensor in (x, cos, sin)), strict=True)
    return torch.cat([_turn(*part) for part in parts], dim=-1)


def _is_by_quarters(cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Return whether the two quarters of each half have the same angles, and the halves have not."""

    def repeats(table: torch.Tensor) -> bool:
        first, second = table.chunk(2, dim=-1)
        return torch.equal(first, second)

    halves = [half for table in (cos, sin) for half in table.chunk(2, dim=-1)]
    return cos.shape[-1] % 4 == 0 and all(map(repeats, halves)) and not all(map(repeats, (cos, sin)))


def _told_apart(rows: torch.Tensor) -> torch.Tensor:
    """Append a column to rows of which some are equal, as those of several images: how many such came before."""
    _, kinds = rows.mul(1e4).round().unique(dim=0, return_inverse=True)
    before = (kinds[:, None] == kinds).tril(-1).sum(1, keepdim=True)
    return torch.cat([rows, before.to(rows.dtype)], dim=1)


def _turn_neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (2i, 2i + 1)."""
    half = x.shape[-1] // 2
    even, odd, cos, sin = x[..., ::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _changes(ours: Trial, theirs: Trial) -> Iterator[str]:
    if ours[0] != theirs[0]:
        yield f"attention scaling: ours {ours[0]:.6g}, the reference's {theirs[0]:.6g}"
    if ours[1] != theirs[1]:
        yield f"segments that see themselves only: ours {_segments(ours[1])}, the reference's {_segments(theirs[1])}"
    if ours[2] != theirs[2]:
        yield f"queries and keys are turned by their patches' rows and columns: {ours[2]}"


def _segments(lengths: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, lengths[:4])) + (", ..." if len(lengths) > 4 else "")
    return f"{len(lengths)} of {shown} patches"


def explain_rows_of_tower(evidence: Evidence, place: Place, error: float) -> Finding | None:
    """Explain rows of a tower: a table that is not added, or what is pooled otherwise, earlier or later; None: the
    place is of no tower, or nothing of these is found."""
    if not evidence.ours.parts.is_tower(place.module):
        return None
    missing = explain_missing(*evidence.pair(place), place.module, evidence.their_modules, evidence.tolerance)
    if missing:
        return Finding(place.module, place.part, error, [missing])
    moved = explain_turn(evidence.ours, evidence.theirs, place, evidence.tolerance)
    if moved:
        return Finding(moved[0], INPUT, error, [moved[1]])
    pooled = explain_pooling(evidence, place)
    return Finding(place.module, place.part, error, [pooled]) if pooled else None


def explain_missing(
    ours: torch.Tensor, theirs: torch.Tensor, name: str, modules: Mapping[str, nn.Module], tolerance: float
) -> str | None:
    """Return which table of the tower's parameters, equal for each image, ours lacks or adds twice; None: none.

    Args:
        name: of ``modules``, the one whose parameters, and its parents' except the whole model's, are tried.
    """
    parts = name.split(".")
    places = [".".join(parts[:length]) for length in range(len(parts), 1, -1)]
    for place in places:
        for parameter_name, parameter in modules[place].named_parameters() if place in modules else ():
            rows = parameter.detach().float().cpu().reshape(-1, parameter.shape[-1])
            if rows.shape[1] != ours.shape[1] or not len(rows) or len(ours) % len(rows):
                continue
            table = rows.repeat(len(ours) // len(rows), 1)
            for text, result in (("not added", theirs - table), ("added twice", theirs + table)):
                if relative_error(ours, result) <= tolerance and relative_error(ours, theirs) > tolerance:
                    return f"{place}.{parameter_name} is {text}"
    return None


def explain_turn(ours: Trace, theirs: Trace, place: Place, tolerance: float) -> tuple[str, str] | None:
    """Return a module that is given another number of rows than the reference's, up to ``place``, and what it is
    given: it stands on the other side of what makes many rows few, such as a pooling or a merge of patches."""
    earlier = set(takewhile(place.__ne__, ours.tensors)) | set(takewhile(place.__ne__, theirs.tensors))
    for p in (p for p in ours.tensors if p in earlier):
        tensor, right = ours.tensors[p], theirs.tensors.get(p)
        if right is not None and p.part == INPUT and len(tensor) != len(right) and ours.parts.is_tower(p.module):
            origin = _same_of(tensor, theirs, tolerance)
            if origin is not None:
                what = f"it is given what the reference has as {origin}"
            elif (origin := _same_of(right, ours, tolerance)) is not None:
                what = f"the reference's is given what ours has as {origin}"
            else:
                continue
            side = "before" if len(tensor) > len(right) else "after"
            rows = f"{len(tensor)} rows, the reference's {len(right)}"
            return p.module, f"it comes {side} a pooling or merge of rows, in the reference it does not: {rows}; {what}"
    return None


def _same_of(tensor: torch.Tensor, trace: Trace, tolerance: float) -> Place | None:
    """Return the last place of a trace with this tensor."""
    fitting = (p for p, other in reversed(trace.tensors.items()) if other.shape == tensor.shape)
    return next((p for p in fitting if relative_error(tensor, trace.tensors[p]) <= tolerance), None)
