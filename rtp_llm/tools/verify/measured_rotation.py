"""A rotation of queries or keys, measured from what goes in and what comes out: for code of the model file's own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rtp_llm.tools.verify.locate import relative_error
from rtp_llm.tools.verify.number_names import value_name

MIN_TOKENS = 4  # from which an angle that grows with the position is told apart from chance
MAX_TOKENS = 64
SHIFTS = (0, 1, -1)  # of positions
SHOWN = 4  # frequencies


@dataclass(frozen=True, eq=False)
class MeasuredRotation:
    """
    Args:
        size: rotated components of a head.
        is_last: whether they are the last ones, not the first.
        takes_halves, gives_halves: whether pairs are (i, i + half), not (2i, 2i + 1), before and after the turn.
        frequencies: [size / 2] radians for each position, negative in the other direction.
        factor: of the pairs' lengths.
        shift: of the positions.
    """

    size: int
    is_last: bool
    takes_halves: bool
    gives_halves: bool
    frequencies: torch.Tensor
    factor: float
    shift: int

    def differences(self, theirs: "MeasuredRotation", config: Any, head_dim: int) -> list[str]:
        """Return how this one, ours, is another rotation than the reference's; empty: it is not."""
        texts = []
        if (self.size, self.is_last) != (theirs.size, theirs.is_last):
            texts.append(f"rotated components of a head: ours the {self._components()}, the reference's the "
                         f"{theirs._components()}")  # fmt: skip
        if self.takes_halves != theirs.takes_halves:
            mine, yours = (_pairs(rotation.takes_halves) for rotation in (self, theirs))
            texts.append(f"rotary layout: ours pairs {mine}, the reference {yours}")
        if self.gives_halves != self.takes_halves:
            given, taken = _pairs(self.gives_halves), _pairs(self.takes_halves)
            texts.append(f"turned pairs are put back as {given}, though they were taken as {taken}")
        if abs(self.factor / theirs.factor - 1) > 1e-3:
            mine, yours = (value_name(rotation.factor, config) for rotation in (self, theirs))
            texts.append(f"factor of what is rotated: ours {mine}, the reference's {yours}")
        if self.shift != theirs.shift:
            texts.append(f"positions are off by {self.shift - theirs.shift:+d}")
        return [*texts, *_other_frequencies(self.frequencies, theirs.frequencies, config, head_dim)]

    def __str__(self) -> str:
        base = _base(self.frequencies)
        turns = f"base {base:.6g}" if base else f"frequencies {_few(self.frequencies)}"
        return f"{turns}, the {self._components()} components of a head, pairs {_pairs(self.takes_halves)}"

    def _components(self) -> str:
        return f"{'last' if self.is_last else 'first'} {self.size}"


def measured_difference(
    before: torch.Tensor,
    pair: tuple[torch.Tensor, torch.Tensor],
    head_dim: int,
    positions: torch.Tensor,
    tolerance: float,
    config: Any,
) -> tuple[MeasuredRotation | None, list[str]]:
    """Return the reference's rotation, and how ours is another one; of no rotation, None and nothing.

    Args:
        before: what both rotate.
        pair: ours and the reference's.
    """
    mine, yours = (measure(before, after, head_dim, positions, tolerance) for after in pair)
    if mine is None or yours is None:
        return yours, []
    texts = mine.differences(yours, config, head_dim)
    if mine.size != yours.size:  # pairs of one that hardly turn may be taken for components that are not rotated
        least = max(mine.size, yours.size)
        again = [measure(before, after, head_dim, positions, tolerance, least) for after in pair]
        others = (again[0] or mine).differences(again[1] or yours, config, head_dim)
        return yours, min(texts, others, key=len)
    return yours, texts


def measure(
    before: torch.Tensor,
    after: torch.Tensor,
    head_dim: int,
    positions: torch.Tensor,
    tolerance: float,
    least: int = 2,
) -> MeasuredRotation | None:
    """Return the rotation that makes one tensor, [tokens, heads * head_dim], of another; None: it is none, or nothing
    is rotated.

    Args:
        positions: [tokens], each one more than the one before.
        least: components that are rotated at least.
    """
    if before.shape != after.shape or len(before) < MIN_TOKENS or bool((positions.diff() != 1).any()):
        return None
    x, y = (tensor[-MAX_TOKENS:].unflatten(1, (-1, head_dim)) for tensor in (before, after))
    positions = positions[-MAX_TOKENS:].double()
    change, size = (y - x).flatten(0, 1).norm(dim=0), x.flatten(0, 1).norm(dim=0)
    changed = (change > tolerance * size).nonzero()[:, 0].tolist()
    if not changed:
        return None
    for num, is_last in _parts(changed[0], changed[-1], head_dim, least):
        part = slice(head_dim - num, head_dim) if is_last else slice(0, num)
        for layouts in ((True, True), (False, False), (True, False), (False, True)):
            found = _turn(x[..., part], y[..., part], layouts, positions, tolerance)
            if found is not None:
                frequencies, factor, shift = found
                return MeasuredRotation(num, is_last, *layouts, frequencies, factor, shift)
    return None


def _parts(first: int, last: int, head_dim: int, least: int) -> Iterator[tuple[int, bool]]:
    """Yield sizes of a head's first or last part that contain what is changed, and whether it is the last; the smallest
    first. A pair that hardly turns may look unchanged."""
    for num in range(least, head_dim + 1, 2):
        if last < num:
            yield num, False
        if head_dim - num <= first and num < head_dim:
            yield num, True


def _turn(
    x: torch.Tensor, y: torch.Tensor, layouts: tuple[bool, bool], positions: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, float, int] | None:
    """Return (frequencies, factor, shift of positions) of pairs of [tokens, heads, size]; None: they are not turned."""
    taken, given = (_complex(part, halves) for part, halves in zip((x, y), layouts, strict=True))
    ratio = (given * taken.conj()).sum(1) / taken.abs().square().sum(1).clamp(min=1e-30)
    if _error(ratio[:, None] * taken, given) > tolerance:
        return None
    factor = float(ratio.abs().mean())
    frequencies = _slopes(ratio)
    for shift in SHIFTS:
        turns = factor * torch.exp(1j * (positions + shift)[:, None] * frequencies)
        if _error(turns[:, None] * taken, given) <= tolerance:
            return frequencies.float(), factor, shift
    return None


def _complex(part: torch.Tensor, halves: bool) -> torch.Tensor:
    """[..., size] -> [..., size / 2] complex, of pairs."""
    a, b = part.double().chunk(2, dim=-1) if halves else part.double().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.complex(a, b)


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return relative_error(*(torch.view_as_real(z).flatten(1).float() for z in (ours, theirs)))


def _slopes(ratio: torch.Tensor) -> torch.Tensor:
    """Return by what angle [tokens, pairs] of complex numbers turn from one token to the next."""
    steps = torch.arange(len(ratio), dtype=torch.float64)[:, None]
    slopes = (ratio[1:] * ratio[:-1].conj()).sum(0).angle()
    rest = ratio * torch.exp(-1j * steps * slopes)
    angles = (rest * rest.mean(0, keepdim=True).conj()).angle()
    centred = steps - steps.mean()
    return slopes + (centred * angles).sum(0) / centred.square().sum()


def _other_frequencies(ours: torch.Tensor, theirs: torch.Tensor, config: Any, head_dim: int) -> Iterator[str]:
    mine, yours = _base(ours), _base(theirs)
    if len(ours) == len(theirs):
        if torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5):
            return
        if torch.allclose(ours, -theirs, rtol=1e-3, atol=1e-5):
            yield "ours turns in the other direction: another sign of the sine"
            return
        if torch.allclose(ours.sort().values, theirs.sort().values, rtol=1e-3, atol=1e-5):
            yield f"frequencies of the pairs lie in another order: ours {_few(ours)}, the reference's {_few(theirs)}"
            return
        factor = float((ours * theirs).sum() / theirs.square().sum())
        if torch.allclose(ours, factor * theirs, rtol=1e-3, atol=1e-5):
            yield f"frequencies, or positions, are the reference's times {value_name(factor, config)}"
            return
    if mine is None or yours is None:
        yield f"frequencies of the pairs: ours {_few(ours)}, the reference's {_few(theirs)}"
    elif abs(mine / yours - 1) > 1e-2:
        divisor = _divisor(ours, theirs, yours, config, head_dim)
        yield f"rotary base: ours {mine:.6g}, the reference's {yours:.6g}{divisor}"


def _divisor(ours: torch.Tensor, theirs: torch.Tensor, base: float, config: Any, head_dim: int) -> str:
    """Say if ours are the reference's base to exponents -2 i / another number; empty: they are not."""
    size = 2 * len(theirs)
    divisor = -2 * float(torch.tensor(base).log() / ours[1].log())
    names = {2 * size: f"twice the {size} rotated components", size // 2: f"half of the {size} rotated components"}
    names |= {getattr(config, "hidden_size", 0): "hidden_size", head_dim: "the size of a head"}
    named = next((f"{number} ({name})" for number, name in names.items() if abs(divisor - number) < 1e-2 * number), "")
    if not named or abs(divisor - size) < 1e-2 * size:
        return ""
    return f"; or its base, with exponents divided by {named}, which the reference divides by {size}"


def _base(frequencies: torch.Tensor) -> float | None:
    """Return b of frequencies ``b ** (-i / n)``, i = 0 .. n - 1; None: they are others."""
    num = len(frequencies)
    if num < 2 or abs(float(frequencies[0]) - 1) > 1e-3 or not 0 < float(frequencies[1]) < 1:
        return None
    powers = frequencies[1] ** torch.arange(num)
    if not torch.allclose(frequencies, powers, rtol=2e-2, atol=1e-5):
        return None
    return float(frequencies[1].double() ** -num)


def _few(frequencies: torch.Tensor) -> str:
    more = ", ..." if len(frequencies) > SHOWN else ""
    return ", ".join(f"{value:.4g}" for value in frequencies[:SHOWN].tolist()) + more


def _pairs(halves: bool) -> str:
    return "halves (is_neox_style=True)" if halves else "neighbours (is_neox_style=False)"
