"""What ranks have of a tensor, put together: whether it is what one rank computes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from rtp_llm.tools.verify.locate import relative_error

SAME, SIDE_BY_SIDE, SUMMANDS, BY_COLUMNS = "the same", "side by side", "summands", "by columns"
MAX_COMPARED = 2**31  # products of a search for columns


class Joining(NamedTuple):
    """How the ranks' tensors make up the whole; ``how`` is empty where they do not.

    Args:
        error: of the nearest way.
        columns: which column of the whole each of a rank's is, of each rank: where it is BY_COLUMNS.
    """

    how: str
    error: float
    columns: tuple[tuple[int, ...], ...] = ()

    @property
    def is_in_order(self) -> bool:
        """Return whether parts lie as layers of the box split them: blocks, of each of which the first rank has the
        beginning, or all."""
        rises = all(list(own) == sorted(own) for own in self.columns)
        pairs = zip(self.columns, self.columns[1:], strict=False)
        return rises and all(all(a <= b for a, b in zip(one, two, strict=True)) for one, two in pairs)


def joined(parts: Sequence[torch.Tensor], whole: torch.Tensor, tolerance: float) -> Joining:
    """Find how the ranks' tensors [rows, own features] make up [rows, features]: each has all of it, or a part of the
    features, in order or not, or a summand."""
    if any(len(part) != len(whole) for part in parts):
        return Joining("", float("inf"))
    trials: list[Joining] = []
    if all(part.shape == whole.shape for part in parts):
        trials.append(Joining(SAME, max(relative_error(part, whole) for part in parts)))
        trials.append(Joining(SUMMANDS, relative_error(torch.stack([*parts]).sum(0), whole)))
    if sum(part.shape[1] for part in parts) == whole.shape[1]:
        trials.append(Joining(SIDE_BY_SIDE, relative_error(torch.cat([*parts], dim=1), whole)))
    best = min(trials, key=lambda trial: trial.error, default=Joining("", float("inf")))
    if best.error <= tolerance:
        return best
    columns = [columns_of(part, whole, tolerance) for part in parts]
    if all(column is not None for column in columns):
        found = tuple(tuple(column) for column in columns if column is not None)
        if _covers({i for own in found for i in own}, whole, tolerance):
            return Joining(BY_COLUMNS, 0.0, found)
    return Joining("", best.error)


def columns_of(part: torch.Tensor, whole: torch.Tensor, tolerance: float) -> list[int] | None:
    """Return which column of the whole each column of a part is; None: one of them is none, or there are too many to
    compare."""
    if part.shape[1] * whole.numel() > MAX_COMPARED or not bool(part.isfinite().all() and whole.isfinite().all()):
        return None
    distances = torch.cdist(part.t(), whole.t(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.min(dim=1)
    if bool((nearest.values > tolerance * whole.norm(dim=0).mean()).any()):
        return None
    return nearest.indices.tolist()


def _covers(columns: set[int], whole: torch.Tensor, tolerance: float) -> bool:
    """Return whether these are all columns, but for such as are equal to some of them."""
    others = [i for i in range(whole.shape[1]) if i not in columns]
    return not others or columns_of(whole[:, others], whole[:, sorted(columns)], tolerance) is not None
