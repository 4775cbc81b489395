"""What Triton's attention kernels read besides the queries: the cache, how scores are made, and a step's rows."""

from dataclasses import dataclass

import torch

from rtp_llm.srt.kernels.paged import PagedRows

LEVELS = 2  # of prefixes within prefixes that are read once; deeper ones are read by each row


@dataclass(frozen=True, slots=True)
class PagedCache:
    """A layer's cache: see ``reference.paged_attention``."""

    keys: torch.Tensor
    values: torch.Tensor
    page_table: torch.Tensor
    page_size: int
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @property
    def most_tokens(self) -> int:
        return self.page_table.shape[1] * self.page_size


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores are made of products: see ``reference.attention``."""

    scaling: float
    window: int | None = None
    logit_cap: float = 0.0
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    chunk: int | None = None


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows of one token: [B] integers on the device."""

    table_rows: torch.Tensor
    starts: torch.Tensor  # the token's position
    tokens: torch.Tensor  # its place among the step's


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Keys and values of a step's tokens, and where they go: see ``reference.write_kv``."""

    k: torch.Tensor
    v: torch.Tensor | None
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Prefixes that decoding rows share, on the device, all int32; see ``prefix_kernel``.

    The shapes depend on the number of rows and of entries alone.
    """

    entries: torch.Tensor  # [N, 5]
    members: torch.Tensor  # [LEVELS * B]
    own_starts: torch.Tensor  # [B]: where the keys begin that a row reads by itself


@dataclass(frozen=True, slots=True)
class ExtendRows:
    """Rows of any number of tokens: [B] integers on the device."""

    table_rows: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    tokens: torch.Tensor  # the place of the first among the step's
    counts_cpu: tuple[int, ...]

    def blocks(self, tokens_of_block: int) -> torch.Tensor:
        """[N, 2] int32 on the host: the row and the first token of each block, the longest rows' last ones first."""
        firsts = (range(0, count, tokens_of_block) for count in self.counts_cpu)
        found = [(row, first) for row, of_row in enumerate(firsts) for first in of_row]
        found.sort(key=lambda block: -block[1])
        return torch.tensor(found, dtype=torch.int32).view(-1, 2)


def shared_levels(rows: PagedRows) -> tuple[list[list[int]], list[int], list[int]]:
    """Entries, members and own starts of ``SharedRows``, of a host's rows. Deeper levels than LEVELS are left out."""
    own_starts, depth = [0] * len(rows.starts), [0] * len(rows.starts)
    entries: list[list[int]] = []
    members: list[int] = []
    for end, first, count in rows.shared.tolist():
        several = rows.members[first : first + count].tolist()
        level = depth[several[0]]
        if level >= LEVELS:
            continue
        entries.append([own_starts[several[0]], end, len(members), count, level])
        members += several
        for row in several:
            own_starts[row], depth[row] = end, level + 1
    return entries, members, own_starts
