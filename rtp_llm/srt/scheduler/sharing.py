"""Which cached prefixes attention reads once for several running requests. Host only, no torch."""

from collections.abc import Sequence

from rtp_llm.srt.cache.radix_cache import TreeNode
from rtp_llm.srt.plan import SharedPrefix
from rtp_llm.srt.scheduler.request import Request

# Fewer tokens are not worth a part of their own, which is to be merged with the rest. Measured with 2 to 32 rows of 16
# query heads by 8 key heads of 128: the costs meet between 100 and 280 tokens.
MIN_PREFIX_TOKENS = 256


class PrefixSharing:
    """Finds the prefixes that decoding requests hold together, as nodes of the radix tree.

    What requests hold changes as they come, go, or enter a chunk into the tree, not from token to token: so long as
    nothing has changed, the answer of the step before is given again. A node may be split meanwhile; that moves no
    page.
    """

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._nodes: list[TreeNode | None] = []
        self._found: list[SharedPrefix] = []

    def of(self, requests: Sequence[Request]) -> list[SharedPrefix]:
        """For requests that compute one token each. Prefixes come before what goes on from them."""
        rows, nodes = [request.row for request in requests], [request.lock.node for request in requests]
        if rows != self._rows or nodes != self._nodes:
            self._rows, self._nodes, self._found = rows, nodes, shared_prefixes(rows, nodes, MIN_PREFIX_TOKENS)
        return self._found


def shared_prefixes(rows: Sequence[int], nodes: Sequence[TreeNode | None], min_tokens: int) -> list[SharedPrefix]:
    """The prefixes to read once, given the node that each row's own tokens follow on (None: it holds none).

    Prefixes may nest: 32 rows may share 1,000 tokens, and two of them 200 more. From the root down, a stretch of nodes
    that the same rows hold becomes a prefix if it adds ``min_tokens``, or else part of what is found below it.
    """
    rows_of: dict[TreeNode, list[int]] = {}
    for row, node in zip(rows, nodes, strict=True):
        for step in node.path() if node is not None else ():
            rows_of.setdefault(step, []).append(row)
    shared = sorted((node for node, held_by in rows_of.items() if len(held_by) > 1), key=lambda node: node.end)
    # Above a node that as many rows hold, a stretch goes on.
    goes_on = {
        parent for node in shared if (parent := node.parent) in rows_of and len(rows_of[parent]) == len(rows_of[node])
    }
    found: list[SharedPrefix] = []
    covered: dict[int, int] = {}
    for node in shared:
        held_by = rows_of[node]
        if node in goes_on or node.end - covered.get(held_by[0], 0) < min_tokens:
            continue
        found.append(SharedPrefix(node.end, held_by))
        covered.update(dict.fromkeys(held_by, node.end))
    return found


def saved_tokens(prefixes: Sequence[SharedPrefix]) -> int:
    """How many tokens' keys and values are not read, of those that rows would read one by one."""
    saved = 0
    covered: dict[int, int] = {}
    for prefix in prefixes:
        saved += (prefix.num_tokens - covered.get(prefix.rows[0], 0)) * (len(prefix.rows) - 1)
        covered.update(dict.fromkeys(prefix.rows, prefix.num_tokens))
    return saved
