"""Poolings of a tower's rows: what is made of windows of a grid of patches, of which windows, and in which order.

Both sides' rows are compared by their directions, so that a factor or a norm without weights may follow.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product, takewhile

import torch
import torch.nn.functional as F

from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.trace import OUTPUT, Place

NUM_SOURCES = 4  # earlier tensors that may be pooled
NUM_COLUMNS = 16  # by which a pooling is looked for, before all are compared
MAX_RATIO = 1024  # rows of which one is made
Function = Callable[[torch.Tensor, "Pooling"], torch.Tensor]  # of [images, columns, height, width]


@dataclass(frozen=True)
class Pooling:
    """``grid``: rows and columns of patches; ``windows``: how many in each direction; ``widening``: patches by which a
    window is larger than the distance between two; ``by_columns``: the order of results."""

    function: str
    grid: tuple[int, int]
    windows: tuple[int, int]
    widening: int = 0
    by_columns: bool = False

    @property
    def strides(self) -> tuple[int, int]:
        return self.grid[0] // self.windows[0], self.grid[1] // self.windows[1]

    @property
    def is_even(self) -> bool:
        """Whether windows of one size fill the grid."""
        return all(size % num == 0 for size, num in zip(self.grid, self.windows, strict=True))

    def __str__(self) -> str:
        size = " x ".join(str(stride + self.widening) for stride in self.strides)
        apart = f", {' x '.join(map(str, self.strides))} apart," if self.widening else ""
        parts = (
            f"windows of {size}{apart}"
            if self.is_even or self.widening
            else f"{' x '.join(map(str, self.windows))} parts"
        )
        order = ", column by column" if self.by_columns else ""
        over = "of" if self.function.endswith("patch") else "over"
        return f"{self.function} {over} {parts} in a grid of {' x '.join(map(str, self.grid))}{order}"

    def made_of(self, images: torch.Tensor) -> torch.Tensor | None:
        """Pool [images, patches, columns] to [images, windows, columns]; None: this cannot be."""
        grids = images.transpose(1, 2).unflatten(2, self.grid)
        try:
            made = FUNCTIONS[self.function](grids, self)
        except RuntimeError:  # torch's functions have limits of their own
            return None
        if made.shape[2:] != self.windows:
            return None
        return (made.transpose(2, 3) if self.by_columns else made).flatten(2).transpose(1, 2)


def explain_pooling(evidence: Evidence, place: Place) -> str | None:
    """Return how ours pools what the reference pools otherwise, to as many rows or to others; None: either is no
    pooling, or they are the same."""
    ours, theirs = evidence.pair(place)
    for source in _sources(evidence, place)[:NUM_SOURCES]:
        rows = evidence.theirs.tensors[source]
        for num_images in _numbers_of_images(evidence, len(rows), len(theirs)):
            images = rows.unflatten(0, (num_images, -1))
            tried = list(_poolings(images.shape[1], len(theirs) // num_images))
            right = _found(evidence, images, theirs, tried)
            if right is None:
                continue
            if len(ours) != len(theirs):
                tried = list(_poolings(images.shape[1], len(ours) // num_images))
            mine = _found(evidence, images, ours, sorted(tried, key=lambda other: _changes(other, right)))
            return None if mine is None else _text(source, (ours, mine), (theirs, right))
    return None


def _sources(evidence: Evidence, place: Place) -> list[Place]:
    """Return places before this one with more rows, as wide, outputs first and the nearest first."""
    tensors = evidence.theirs.tensors
    before = list(takewhile(place.__ne__, tensors))
    (num, width), modules = tensors[place].shape, evidence.theirs.parts
    more = range(num + 1, MAX_RATIO * num + 1) if width > 1 else range(0)  # a row of one number has no direction
    fitting = [p for p in reversed(before) if tensors[p].shape[1] == width and len(tensors[p]) in more]
    return sorted((p for p in fitting if modules.is_tower(p.module)), key=lambda p: p.part != OUTPUT)


def _numbers_of_images(evidence: Evidence, num_rows: int, num_pooled: int) -> list[int]:
    """Return into how many images of one size rows may be divided, by the segments of the tower's attention."""
    calls = evidence.theirs.vision_calls.values()
    known = [len(call.lengths) for call in calls if sum(call.lengths) == num_rows and len(set(call.lengths)) == 1]
    return [num for num in dict.fromkeys([*known, 1]) if num_pooled % num == 0]


def _poolings(num_patches: int, num_pooled: int) -> Iterator[Pooling]:
    """Yield what may make so many rows of so many patches: squares first, poolings to which no window is even last."""
    grids, windows = (
        sorted(_sides(num), key=lambda sides: abs(sides[0] - sides[1])) for num in (num_patches, num_pooled)
    )
    kinds = [Pooling("", grid, into) for grid in grids for into in windows if grid[0] >= into[0] and grid[1] >= into[1]]
    for by_columns, kind, function in product((False, True), (kind for kind in kinds if kind.is_even), EVEN):
        yield replace(kind, function=function, by_columns=by_columns)
    for kind, function, widening in product(kinds, ("the mean", "the maximum"), (-1, 1, 2, 3)):
        yield replace(kind, function=function, widening=widening)
    for by_columns, kind, function in product((False, True), (kind for kind in kinds if not kind.is_even), UNEVEN):
        yield replace(kind, function=function, by_columns=by_columns)


def _sides(num: int) -> list[tuple[int, int]]:
    return [(side, num // side) for side in range(1, num + 1) if num % side == 0]


def _found(evidence: Evidence, images: torch.Tensor, target: torch.Tensor, tried: list[Pooling]) -> Pooling | None:
    few = images[:, :, :NUM_COLUMNS]
    for pooling in tried:
        made = pooling.made_of(few)
        if made is None or not _alike(evidence, made.flatten(0, 1), target[:, :NUM_COLUMNS]):
            continue
        whole = pooling.made_of(images)
        if whole is not None and _alike(evidence, whole.flatten(0, 1), target):
            return pooling
    return None


def _alike(evidence: Evidence, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether rows have the same directions."""
    return evidence.same(F.normalize(one, dim=1), F.normalize(other, dim=1))


def _changes(pooling: Pooling, right: Pooling) -> int:
    names = ("function", "grid", "windows", "widening", "by_columns")
    return sum(getattr(pooling, name) != getattr(right, name) for name in names)


def _text(source: Place, ours: tuple[torch.Tensor, Pooling], theirs: tuple[torch.Tensor, Pooling]) -> str | None:
    (own, mine), (other, right) = ours, theirs
    if replace(mine, by_columns=right.by_columns) != right:
        return f"it is {mine}, of {source}; the reference's is {right}"
    if mine != right:
        return None  # the same in another order, which is told of any rows
    if mine.function != "the mean" or not mine.is_even or mine.widening:
        return None
    size = mine.strides[0] * mine.strides[1]
    factor = float(own.norm() / other.norm().clamp(min=1e-30))
    sums = {float(size): ("the sum", "the mean"), 1 / size: ("the mean", "the sum")}
    names = next((names for value, names in sums.items() if abs(factor / value - 1) < 1e-3), None)
    if names is None:
        return None
    summed, averaged = (replace(mine, function=name) for name in names)
    return f"it is {summed}, of {source}; the reference's is {averaged}"


def _average(grids: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    return F.avg_pool2d(grids, _kernel(pooling), pooling.strides, _padding(pooling))


def _maximum(grids: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    return F.max_pool2d(grids, _kernel(pooling), pooling.strides, _padding(pooling))


def _kernel(pooling: Pooling) -> list[int]:
    return [stride + pooling.widening for stride in pooling.strides]


def _padding(pooling: Pooling) -> int:
    """Return the zeros on each side of the grid with which there are so many windows; 0: with none there are."""
    padding = (pooling.widening + 1) // 2
    sizes = zip(pooling.grid, _kernel(pooling), pooling.strides, pooling.windows, strict=True)
    is_padded = all((size + 2 * padding - kernel) // stride + 1 == num for size, kernel, stride, num in sizes)
    return padding if is_padded else 0


def _of_whole_windows(grids: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    return F.avg_pool2d(grids, pooling.strides)


def _of_smaller_windows_too(grids: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    sizes = [-(-size // num) for size, num in zip(pooling.grid, pooling.windows, strict=True)]
    return F.avg_pool2d(grids, sizes, ceil_mode=True)


def _first(grids: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    down, right = pooling.strides
    return grids[:, :, ::down, ::right]


def _last(grids: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    down, right = pooling.strides
    return grids[:, :, down - 1 :: down, right - 1 :: right]


def _interpolated(mode: str, align_corners: bool | None = None) -> Function:
    return lambda grids, pooling: F.interpolate(grids, pooling.windows, mode=mode, align_corners=align_corners)


_INTERPOLATIONS: dict[str, Function] = {
    "a bilinear interpolation": _interpolated("bilinear", False),
    "a bilinear interpolation with aligned corners": _interpolated("bilinear", True),
    "a bicubic interpolation": _interpolated("bicubic", False),
}
EVEN: dict[str, Function] = {
    "the mean": _average,
    "the maximum": _maximum,
    "the minimum": lambda grids, pooling: -_maximum(-grids, pooling),
    "the root of the mean square": lambda grids, pooling: _average(grids.square(), pooling).sqrt(),
    "the first patch": _first,
    "the last patch": _last,
    **_INTERPOLATIONS,
}
UNEVEN: dict[str, Function] = {
    "the mean, without the rest of a row": _of_whole_windows,
    "the mean, the rest of a row in smaller windows": _of_smaller_windows_too,
    "the mean of adaptive windows": lambda grids, pooling: F.adaptive_avg_pool2d(grids, pooling.windows),
    "the maximum of adaptive windows": lambda grids, pooling: F.adaptive_max_pool2d(grids, pooling.windows),
    "the nearest patch": _interpolated("nearest"),
    **_INTERPOLATIONS,
}
FUNCTIONS = EVEN | UNEVEN
