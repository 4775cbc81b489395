"""The port for prefix caches, which keep computed pages and find them by their tokens. Host only, no torch."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rtp_llm.srt.cache.spec import CacheGroup, whole_pages


@dataclass(slots=True)
class Match:
    """The longest cached prefix that every cache group can resume from.

    ``pages[g]`` covers tokens ``[0, num_tokens)``; 0 stands where a window group no longer has the page (nothing that
    is still to be computed can see it).
    """

    num_tokens: int
    pages: list[list[int]]
    node: Any = None  # private to the implementation
    found_len: int = 0  # tokens that the cache has, though a request cannot resume from all of them


@dataclass(slots=True)
class Lock:
    """A request's hold on the cached prefix ``[0, num_tokens)``: none of it that the request may read is evicted."""

    num_tokens: int
    node: Any = None  # private to the implementation; the same while the same prefix is held
    held_from: list[int] = field(default_factory=list)  # per group: tokens before this are no longer held


@dataclass(slots=True)
class Exchange:
    """Pages that replace a request's duplicates at ``[start, start + len(page_ids))`` of a group's page table."""

    group: int
    start: int
    page_ids: list[int]


@dataclass(slots=True)
class Insertion:
    lock: Lock
    exchanges: list[Exchange] = field(default_factory=list)
    duplicates: list[list[int]] = field(default_factory=list)  # per group: the request's own pages that it must free


@dataclass(frozen=True, slots=True)
class SharedByLocks:
    """A prefix of ``num_tokens`` tokens that exactly the locks at ``places`` hold, of all those passed in."""

    num_tokens: int
    places: list[int]


class PrefixCache(ABC):
    """Maps token ids, within a namespace, to pages of every cache group.

    Invariants:
    - Prefixes are cached in units of ``unit`` tokens, which are whole pages of every group.
    - A page is owned by the cache or by one request, never by both. Tokens ``[0, lock.num_tokens)`` of a request are in
      the cache's pages; all later ones are in its own.
    - Locked pages are never evicted: in full groups the whole prefix, in window groups the part within reach.
    - ``match`` changes neither capacity nor structure; locks alone move pages between evictable and held.
    - ``insert`` takes over the request's pages, except those that are cached already: it returns them as duplicates.

    Of a model with recurrent states the cache holds *checkpoints* too: slots with the states after some prefix. Then a
    match ends at one, and ``keeps_states`` is True.
    """

    keeps_states = False

    def __init__(self, groups: Sequence[CacheGroup]) -> None:
        self.unit = whole_pages(groups)

    @abstractmethod
    def match(self, namespace: Hashable, ids: Sequence[int], limit: int) -> Match:
        """Return the longest usable cached prefix of ``ids[:limit]``."""

    @abstractmethod
    def lock(self, match: Match) -> Lock:
        """Lock a match. Nothing may be evicted or inserted between ``match`` and ``lock``."""

    @abstractmethod
    def advance(self, lock: Lock, num_tokens: int) -> None:
        """Unlock window pages that are out of reach: the request will compute nothing before ``num_tokens`` again."""

    @abstractmethod
    def unlock(self, lock: Lock) -> None: ...

    @abstractmethod
    def insert(self, namespace: Hashable, ids: Sequence[int], pages: list[list[int]], lock: Lock) -> Insertion:
        """Enter a request's computed tokens and move its lock to their end.

        Args:
            ids: the computed tokens; an incomplete last unit stays the request's.
            pages: per group, the request's page table (0 where a window page was freed already, in whole units).
            lock: the request's lock; the returned one replaces it.
        """

    def common_len(self, ids: Sequence[int], other_ids: Sequence[int], limit: int) -> int:
        """Number of leading tokens, of ``limit``, that the cache would hold once for two sequences."""
        common = common_length(ids, 0, other_ids, 0, limit)
        return common - common % self.unit

    def state_of(self, lock: Lock) -> int:
        """Return the slot of the states after a locked prefix; 0: the prefix is empty, or there are none."""
        return 0

    def keep_state(self, lock: Lock, position: int, slot: int) -> bool:
        """Own a slot with the states after the first ``position`` tokens, whole units, of a locked prefix.

        False: it stays the caller's, because there is no cache or it has the same states already.
        """
        return False

    def take_state(self, lock: Lock) -> int:
        """Give up the slot of the states after a locked prefix, and return it.

        Raises:
            RuntimeError: there are none.
        """
        raise RuntimeError("the prefix cache keeps no states")

    def evict_state(self) -> bool:
        """Free the slot that was least recently used, except pinned ones; False if there is none."""
        return False

    @abstractmethod
    def shared_prefixes(self, locks: Sequence[Lock]) -> list[SharedByLocks]:
        """Prefixes that two or more locks hold in the same pages: the longest for each set of locks; shorter ones
        first."""

    @abstractmethod
    def evict(self, group: int, num_pages: int) -> None:
        """Free at least ``num_pages`` of a group, or all evictable ones; least recently used first."""

    @abstractmethod
    def evictable_pages(self, group: int) -> int: ...

    @abstractmethod
    def num_pages(self, group: int) -> int:
        """Pages of a group that the cache owns. For tests."""

    @abstractmethod
    def reset(self) -> None:
        """Free everything.

        Raises:
            RuntimeError: a request holds a lock.
        """

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError if an invariant does not hold. For tests."""


class NoPrefixCache(PrefixCache):
    """Caches nothing: requests own all their pages (``--disable-radix-cache``)."""

    def __init__(self, groups: Sequence[CacheGroup]) -> None:
        super().__init__(groups)
        self._num_groups = len(groups)

    def match(self, namespace: Hashable, ids: Sequence[int], limit: int) -> Match:
        return Match(0, [[] for _ in range(self._num_groups)])

    def lock(self, match: Match) -> Lock:
        return Lock(0)

    def advance(self, lock: Lock, num_tokens: int) -> None:
        return None

    def unlock(self, lock: Lock) -> None:
        return None

    def insert(self, namespace: Hashable, ids: Sequence[int], pages: list[list[int]], lock: Lock) -> Insertion:
        return Insertion(lock, [], [[] for _ in range(self._num_groups)])

    def common_len(self, ids: Sequence[int], other_ids: Sequence[int], limit: int) -> int:
        return 0

    def shared_prefixes(self, locks: Sequence[Lock]) -> list[SharedByLocks]:
        return []

    def evict(self, group: int, num_pages: int) -> None:
        return None

    def evictable_pages(self, group: int) -> int:
        return 0

    def num_pages(self, group: int) -> int:
        return 0

    def reset(self) -> None:
        return None

    def check_integrity(self) -> None:
        return None


def common_length(a: Sequence[int], a_start: int, b: Sequence[int], b_start: int, limit: int) -> int:
    """Number of equal leading items, of ``limit``, from ``a[a_start]`` and ``b[b_start]`` on."""
    if a[a_start : a_start + limit] == b[b_start : b_start + limit]:
        return limit
    low, high = 0, limit  # the first `low` items are equal, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        if a[a_start + low : a_start + middle] == b[b_start + low : b_start + middle]:
            low = middle
        else:
            high = middle
    return low
