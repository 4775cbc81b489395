"""The part of a paged cache that each row of a step reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


def first_visible(position: int, window: int | None, chunk: int | None = None) -> int:
    """Return the position of the first key that a query at ``position`` sees: the first of its window, which counts
    its own token, or of its chunk; 0 without either."""
    if chunk is not None:
        return position // chunk * chunk
    return 0 if window is None else max(0, position - window + 1)


def _none() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Rows of a batch, all int32. Row b computes ``counts[b]`` tokens of its sequence from position ``starts[b]`` on.

    Shared prefixes may be read once for several rows of one token each; results are the same without them. Each entry
    ``(end, first, count)`` is for rows ``members[first : first + count]``: their sequences have the same pages up to
    position ``end``. An entry begins where the previous one for the same rows ends (at first, at 0).
    """

    table_rows: torch.Tensor  # [B] rows of the page table
    starts: torch.Tensor  # [B]
    counts: torch.Tensor  # [B]
    shared: torch.Tensor = field(default_factory=_none)  # [N, 3]
    members: torch.Tensor = field(default_factory=_none)  # [M]

    @classmethod
    def of(
        cls,
        table_rows: torch.Tensor | Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        shared: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> "PagedRows":
        """``shared``: (end, members) of each shared prefix, shorter ones before the longer ones that contain them."""
        rows = [torch.as_tensor(values, dtype=torch.int32) for values in (table_rows, starts, counts)]
        entries: list[tuple[int, int, int]] = []
        members: list[int] = []
        for end, several in shared:
            entries.append((end, len(members), len(several)))
            members.extend(several)
        if not shared:
            return cls(rows[0], rows[1], rows[2])
        prefixes = torch.tensor(entries, dtype=torch.int32), torch.tensor(members, dtype=torch.int32)
        return cls(rows[0], rows[1], rows[2], *prefixes)
