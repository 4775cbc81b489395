"""Cached prefixes that attention reads once for several running requests. Host only, no torch."""

from collections.abc import Sequence
from typing import Any

from rtp_llm.srt.cache.prefix_cache import PrefixCache, SharedByLocks
from rtp_llm.srt.plan import SharedPrefix
from rtp_llm.srt.scheduler.request import Request

# With fewer tokens, merging the results of prefix and rest costs more than reading once saves. Measured with 2 to 32
# rows of 16 query heads by 8 key heads of 128: the costs meet between 100 and 280 tokens.
MIN_PREFIX_TOKENS = 256


class PrefixSharing:
    """Finds the prefixes that several decoding requests hold in the prefix cache.

    Locks change when requests come, go, or enter a chunk into the cache, not with each token: while rows and locks
    are the same, the result of the step before is returned.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._rows: list[int] = []
        self._nodes: list[Any] = []
        self._found: list[SharedPrefix] = []

    def of(self, requests: Sequence[Request]) -> list[SharedPrefix]:
        """Prefixes shared by requests that compute one token each; shorter ones come before longer ones."""
        rows, nodes = [request.row for request in requests], [request.lock.node for request in requests]
        if rows != self._rows or nodes != self._nodes:
            shared = self._cache.shared_prefixes([request.lock for request in requests])
            self._rows, self._nodes, self._found = rows, nodes, worth_reading_once(rows, shared, MIN_PREFIX_TOKENS)
        return self._found


def worth_reading_once(rows: Sequence[int], shared: Sequence[SharedByLocks], min_tokens: int) -> list[SharedPrefix]:
    """Return the prefixes that add ``min_tokens`` to shorter ones already chosen. ``shared`` names places in ``rows``.

    Prefixes may nest: 32 rows may share 1,000 tokens, and two of them 200 more. A prefix that adds too little still
    counts as part of a longer one.
    """
    found: list[SharedPrefix] = []
    covered: dict[int, int] = {}
    for prefix in shared:
        if prefix.num_tokens - covered.get(prefix.places[0], 0) < min_tokens:
            continue
        found.append(SharedPrefix(prefix.num_tokens, [rows[place] for place in prefix.places]))
        covered.update(dict.fromkeys(prefix.places, prefix.num_tokens))
    return found


def saved_tokens(prefixes: Sequence[SharedPrefix]) -> int:
    """Tokens whose keys and values rows need not read because another row does, summed over rows."""
    saved = 0
    covered: dict[int, int] = {}
    for prefix in prefixes:
        saved += (prefix.num_tokens - covered.get(prefix.rows[0], 0)) * (len(prefix.rows) - 1)
        covered.update(dict.fromkeys(prefix.rows, prefix.num_tokens))
    return saved
