"""Nodes of the radix tree. Host only, no torch."""

from collections.abc import Hashable, Iterator, Sequence

from rtp_llm.srt.cache.prefix_cache import SharedByLocks


class TreeNode:
    """The tokens ``[start, end)`` of every sequence through it, and per group their pages, or None."""

    __slots__ = (
        "checkpoint", "children", "digests", "end", "holders", "ids", "last_access", "locks", "pages", "parent",
        "queued",
    )  # fmt: skip

    def __init__(self, parent: "TreeNode | None", ids: list[int], end: int, pages: list[list[int] | None]) -> None:
        self.parent = parent
        self.ids = ids
        self.end = end
        self.pages = pages
        self.children: dict[Hashable, TreeNode] = {}
        self.locks = [0] * len(pages)
        self.queued = [False] * len(pages)
        self.holders = 0  # locks that end here: they keep the node, even after they released all its pages
        self.last_access = 0
        self.checkpoint = 0  # the slot of the states after the last of its tokens; 0: none
        self.digests: Sequence[bytes] = ()  # of the blocks that end in it, while somebody watches (block_events.py)

    @property
    def start(self) -> int:
        return self.end - len(self.ids)

    @property
    def is_free_leaf(self) -> bool:
        return not self.children and not self.holders and not any(self.locks)

    def path(self) -> "Iterator[TreeNode]":
        """Yield the nodes from this one up to the root, the root excluded."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def descendants(self) -> "Iterator[TreeNode]":
        """Yield the nodes below this one."""
        stack = list(self.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


def shared_by(nodes: Sequence[TreeNode | None]) -> list[SharedByLocks]:
    """Return the prefixes that two or more of ``nodes`` lie below; see PrefixCache.shared_prefixes."""
    held_by: dict[TreeNode, list[int]] = {}
    for place, node in enumerate(nodes):
        while node is not None and node.parent is not None:  # path(), without a generator for each of many nodes
            held_by.setdefault(node, []).append(place)
            node = node.parent
    shared = sorted((node for node, places in held_by.items() if len(places) > 1), key=lambda node: node.end)
    # Above a node that as many lie below, a prefix goes on.
    goes_on = {
        parent for node in shared if (parent := node.parent) in held_by and len(held_by[parent]) == len(held_by[node])
    }
    return [SharedByLocks(node.end, held_by[node]) for node in shared if node not in goes_on]
