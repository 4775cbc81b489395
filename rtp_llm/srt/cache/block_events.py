"""What a prefix cache tells of the blocks that it holds, for routers and other caches. Host only, no torch.

A block is ``block_size`` tokens. Its hash stands for all tokens up to its end: it is chained, SHA-256 over the hash
before it and the block's ids, and so equal in every process and on every machine.
"""

import hashlib
import struct
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from rtp_llm.srt.cache.spec import CacheGroup, whole_pages
from rtp_llm.srt.cache.tree_node import TreeNode

MIN_BLOCK_SIZE = 16  # tokens; a hash for each page of one token would be much to compute and to send
MAX_TOKEN_ID = (1 << 31) - 1  # what readers can be expected to hold an id in


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Blocks that a cache group holds from now on, each the continuation of the one before.

    ``parent`` is the hash of the block before the first; None: the first begins the sequence. ``extra_keys``, one for
    each block, is what the hashes depend on beside the tokens.
    """

    hashes: list[int]
    parent: int | None
    token_ids: list[int]
    block_size: int
    group: int
    extra_keys: list[tuple[str, ...] | None] | None = None


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Blocks that a cache group no longer holds."""

    hashes: list[int]
    group: int


@dataclass(frozen=True, slots=True)
class BlocksCleared:
    """No group holds any block."""


CacheEvent = BlocksStored | BlocksRemoved | BlocksCleared


class CacheWatch:
    """Follows the nodes of a radix tree. This one does nothing: nobody wants to know."""

    def __init__(self) -> None:
        self.namespaces: dict[TreeNode, Hashable] = {}  # by root; kept by the tree

    def began(self, root: TreeNode) -> None:
        """A namespace has got its root."""

    def added(self, node: TreeNode) -> None:
        """A node has been added, with its tokens; its pages are told of by ``stored``."""

    def split(self, upper: TreeNode, lower: TreeNode) -> None:
        """The first tokens of ``lower`` are in ``upper`` now, its new parent."""

    def stored(self, node: TreeNode, group: int) -> None:
        """A node has pages in a group."""

    def removed(self, node: TreeNode, group: int) -> None:
        """A node has lost its pages in a group."""

    def cleared(self) -> None:
        """The tree is empty."""

    def take(self) -> list[CacheEvent]:
        """Return the events since the last call."""
        return []


class BlockWatch(CacheWatch):
    """Makes the events. Used by the core's thread alone.

    A block belongs to the node that its last token lies in, and its digest is kept there.
    """

    def __init__(self, groups: Sequence[CacheGroup]) -> None:
        super().__init__()
        unit = whole_pages(groups)
        self.block_size = unit * -(-MIN_BLOCK_SIZE // unit)
        self._events: list[CacheEvent] = []

    def began(self, root: TreeNode) -> None:
        root.digests = [root_digest(self.block_size, _extra_keys(self.namespaces[root]))]

    def added(self, node: TreeNode) -> None:
        ids, _ = self._block_ids(node)
        digest, digests = self._digest_before(node), []
        for start in range(0, len(ids), self.block_size):
            digest = chained(digest, ids[start : start + self.block_size])
            digests.append(digest)
        node.digests = digests

    def split(self, upper: TreeNode, lower: TreeNode) -> None:
        count = upper.end // self.block_size - upper.start // self.block_size
        upper.digests, lower.digests = lower.digests[:count], lower.digests[count:]

    def stored(self, node: TreeNode, group: int) -> None:
        if not node.digests:
            return
        ids, start = self._block_ids(node)
        self._events.append(
            BlocksStored(
                [number(digest) for digest in node.digests],
                number(self._digest_before(node)) if start else None,
                [token_id & MAX_TOKEN_ID for token_id in ids],
                self.block_size,
                group,
                self._extra_keys_of(node, start),
            )
        )

    def removed(self, node: TreeNode, group: int) -> None:
        if node.digests:
            self._events.append(BlocksRemoved([number(digest) for digest in node.digests], group))

    def cleared(self) -> None:
        self._events = [BlocksCleared()]  # what happened before is of no interest any more

    def take(self) -> list[CacheEvent]:
        events, self._events = self._events, []
        return events

    def _block_ids(self, node: TreeNode) -> tuple[list[int], int]:
        """Return the ids of the blocks that end in a node, and where in the sequence they begin."""
        start = node.start - node.start % self.block_size
        parts, parent = [node.ids], node.parent
        while parent is not None and parent.end > start:
            parts.append(parent.ids[max(0, start - parent.start) :])
            parent = parent.parent
        ids = [token_id for part in reversed(parts) for token_id in part]
        return ids[: len(ids) - len(ids) % self.block_size], start

    def _digest_before(self, node: TreeNode) -> bytes:
        """Return the digest of the last block that ends before a node: of its nearest ancestor that has one."""
        parent = node.parent
        while parent is not None and not parent.digests:
            parent = parent.parent
        if parent is None:
            raise RuntimeError("a tree's root has no digest: the tree was not watched from its beginning")
        return parent.digests[-1]

    def _extra_keys_of(self, node: TreeNode, start: int) -> list[tuple[str, ...] | None] | None:
        """Only a sequence's first block is told its namespace's keys: all later hashes depend on its own."""
        if start:
            return None
        root = node
        while root.parent is not None:
            root = root.parent
        keys = _extra_keys(self.namespaces[root])
        return [keys, *[None] * (len(node.digests) - 1)] if keys else None


def root_digest(block_size: int, extra_keys: Sequence[str] = ()) -> bytes:
    """Return what the first block's digest is chained to."""
    return hashlib.sha256("\0".join(["rtp-llm", str(block_size), *extra_keys]).encode()).digest()


def chained(before: bytes, ids: Sequence[int]) -> bytes:
    """Return the digest of a block after the one with digest ``before``."""
    return hashlib.sha256(before + struct.pack(f"<{len(ids)}q", *ids)).digest()


def number(digest: bytes) -> int:
    """Return the 64 bits of a digest that are published."""
    return int.from_bytes(digest[-8:], "big")


def _extra_keys(namespace: Hashable) -> tuple[str, ...]:
    """Return a namespace's parts that are not neutral, as text: of ``(cache_salt, key_class)``."""
    if not isinstance(namespace, tuple) or len(namespace) != 2:
        raise TypeError(f"a namespace of the prefix cache must be a cache salt and a key class, got {namespace!r}")
    salt, key_class = namespace
    return ((str(salt),) if salt else ()) + ((f"length-class:{key_class}",) if key_class else ())
