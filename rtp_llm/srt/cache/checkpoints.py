"""Slots for recurrent states: those of requests, and checkpoints that nodes of the radix tree hold. Host only."""

from collections import OrderedDict

from rtp_llm.srt.cache.allocator import PageAllocator
from rtp_llm.srt.cache.tree_node import TreeNode


class Checkpoints:
    """Every slot is free, a request's, or one node's: a checkpoint.

    A checkpoint is used when it is written and when a request resumes from it; the least recently used goes first.
    """

    def __init__(self, num_slots: int) -> None:
        self.slots = PageAllocator(num_slots)
        self._nodes: OrderedDict[int, TreeNode] = OrderedDict()  # by slot; the least recently used first
        self._pinned: set[int] = set()

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def num_slots(self) -> int:
        return self.slots.num_pages

    @property
    def num_with_requests(self) -> int:
        return self.slots.num_used - len(self._nodes)

    def attach(self, node: TreeNode, slot: int) -> None:
        """Make a request's slot the checkpoint of a node that has none."""
        node.checkpoint = slot
        self._nodes[slot] = node

    def detach(self, node: TreeNode) -> int:
        """Take a node's checkpoint away; its slot, which is returned, is the caller's."""
        slot, node.checkpoint = node.checkpoint, 0
        del self._nodes[slot]
        self._pinned.discard(slot)
        return slot

    def drop(self, node: TreeNode) -> None:
        """Free a node's checkpoint, if it has one."""
        if node.checkpoint:
            self.slots.free([self.detach(node)])

    def touch(self, node: TreeNode) -> None:
        if node.checkpoint:
            self._nodes.move_to_end(node.checkpoint)

    def pin(self, slot: int) -> None:
        """Keep a checkpoint until ``unpin_all``: the step being planned reads it."""
        self._pinned.add(slot)

    def is_pinned(self, slot: int) -> bool:
        return slot in self._pinned

    def unpin_all(self) -> None:
        self._pinned.clear()

    def oldest(self) -> TreeNode | None:
        """Return the node with the least recently used checkpoint that is not pinned; None if there is none."""
        return next((node for slot, node in self._nodes.items() if slot not in self._pinned), None)

    def check_integrity(self, nodes: list[TreeNode]) -> None:
        """Check that ``nodes``, all of the tree, hold what is noted here. For tests."""
        held = {node.checkpoint: node for node in nodes if node.checkpoint}
        assert held == dict(self._nodes), "a checkpoint is held by another node than noted, or by none"
        assert set(held) <= self.slots.used_pages(), "a node holds a free slot"
