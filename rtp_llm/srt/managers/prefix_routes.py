"""Which core a request goes to: the one that holds its prefix, else the one with the fewest requests."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from rtp_llm.srt.request_spec import RequestSpec

BLOCK_TOKENS = 32  # of a hash
# A core gets a request for its prefix as long as it has at most MOST_TIMES as many requests as the least loaded one,
# and MORE.
MOST_TIMES, MORE = 2, 8


def block_hashes(ids: Sequence[int], spec: RequestSpec) -> list[bytes]:
    """Return a hash for each whole block of a sequence, of all tokens up to its end and of what else the cache of cores
    goes by. Equal hashes mean equal prefixes, so that those of several sequences are a tree."""
    keys = ids if spec.media is None else [*spec.media.cache_keys, *ids[len(spec.media.cache_keys) :]]
    last = hashlib.blake2b(spec.cache_salt.encode(), digest_size=16).digest()
    hashes = []
    for start in range(0, len(keys) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = array("q", keys[start : start + BLOCK_TOKENS]).tobytes()
        last = hashlib.blake2b(last + block, digest_size=16).digest()
        hashes.append(last)
    return hashes


class PrefixRoutes:
    """What each core holds, as far as requests that went there tell, and how many requests it has. Not thread-safe.

    A core drops what was used least recently when its cache is full; so do these records, which are bounded by the same
    number of tokens. They may be wrong about what a core still holds: then its prefix is computed again.

    Args:
        num_tokens: that the cache of each core has room for.
    """

    def __init__(self, num_tokens: Sequence[int]) -> None:
        self._most_blocks = [max(1, count // BLOCK_TOKENS) for count in num_tokens]
        self._held: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in num_tokens]  # least recently used first
        self.num_requests = [0] * len(num_tokens)

    def matched_tokens(self, core: int, hashes: Sequence[bytes]) -> int:
        held = self._held[core]
        count = next((place for place, block in enumerate(hashes) if block not in held), len(hashes))
        return count * BLOCK_TOKENS

    def choose(self, hashes: Sequence[bytes], cores: Sequence[int]) -> int:
        """Return the best of these cores, of which there is at least one, for a request."""
        least = min(self.num_requests[core] for core in cores)
        most = least * MOST_TIMES + MORE
        matched = {core: self.matched_tokens(core, hashes) for core in cores}
        near = [core for core in cores if matched[core] and self.num_requests[core] <= most]
        if near:
            return max(near, key=lambda core: (matched[core], -self.num_requests[core]))
        return min(cores, key=lambda core: self.num_requests[core])

    def note(self, core: int, hashes: Sequence[bytes]) -> None:
        """Note that a core computes, or has used, these blocks."""
        held = self._held[core]
        for block in reversed(hashes):  # the beginning is the newest: ends are dropped before
            held[block] = None
            held.move_to_end(block)
        while len(held) > self._most_blocks[core]:
            held.popitem(last=False)

    def forget(self, core: int) -> None:
        """Note that a core holds nothing: it was restarted, or its cache was emptied."""
        self._held[core].clear()
