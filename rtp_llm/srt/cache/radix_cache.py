"""A radix tree over cache keys that owns the pages of computed prefixes.

After RadixAttention (Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", 2024), extended
to several cache groups: a node may have lost its pages in a window group and still serve the others. And to recurrent
states: a node may hold a checkpoint, the states after its last token.
"""

import heapq
from collections.abc import Hashable, Sequence

from rtp_llm.srt.cache.allocator import PageAllocator
from rtp_llm.srt.cache.block_events import CacheWatch
from rtp_llm.srt.cache.checkpoints import Checkpoints
from rtp_llm.srt.cache.prefix_cache import Exchange, Insertion, Lock, Match, PrefixCache, SharedByLocks, common_length
from rtp_llm.srt.cache.spec import CacheGroup
from rtp_llm.srt.cache.tree_node import TreeNode, shared_by


class RadixCache(PrefixCache):
    """See PrefixCache for the invariants of all prefix caches; these are the tree's own.

    - Node boundaries are multiples of ``unit``.
    - In a full group every node has pages. In a window group a node has all of its pages or None (a tombstone).
    - A lock counts on every node from its end up to the root in full groups, and up to ``held_from`` in window groups;
      ``held_from`` is always a node boundary, so that splitting a node keeps every count right.
    - A node's pages in a group are evictable if no lock counts there. In full groups descendants go first, and a node
      goes as a whole; in window groups any node may lose its pages, and any its checkpoint. An unlocked leaf that no
      request can resume from is removed.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        allocators: Sequence[PageAllocator],
        checkpoints: Checkpoints | None = None,
        watch: CacheWatch | None = None,
    ) -> None:
        """``checkpoints``: of a model with recurrent states. ``watch``: is told what becomes of the nodes."""
        super().__init__(groups)
        self.keeps_states = checkpoints is not None
        self._checkpoints = Checkpoints(1) if checkpoints is None else checkpoints
        self._watch = watch or CacheWatch()
        self._page_sizes = [group.page_size for group in groups]
        self._groups = list(groups)
        self._allocators = list(allocators)
        # Tokens before a position that its query can see; None: all of them.
        self._reach = [None if group.window is None else group.window - 1 for group in groups]
        self._roots: dict[Hashable, TreeNode] = {}
        self._namespaces = self._watch.namespaces
        self._evictable = [0] * len(groups)
        self._queues: list[list[tuple[int, int, int, TreeNode]]] = [[] for _ in groups]
        self._clock = 0
        self._ticket = 0

    # Matching and locking

    def match(self, namespace: Hashable, ids: Sequence[int], limit: int) -> Match:
        best = Match(0, [[] for _ in self._groups], None)
        node = self._roots.get(namespace)
        if node is None:
            return best
        best.node = node
        limit -= limit % self.unit
        live_from = [0] * len(self._groups)  # per group: where the unbroken run of pages up to here begins
        path: list[tuple[TreeNode, int]] = []
        best_depth = position = 0
        while position < limit:
            child = node.children.get(self._key(ids, position))
            if child is None:
                break
            length = min(len(child.ids), limit - position)
            common = common_length(child.ids, 0, ids, position, length)
            common -= common % self.unit
            position += common
            path.append((child, common))
            for g, pages in enumerate(child.pages):
                if pages is None:
                    live_from[g] = position
            has_states = not self.keeps_states or (child.checkpoint and common == len(child.ids))
            if has_states and self._can_resume(position, live_from):
                best.num_tokens, best.node, best_depth = position, child, len(path)
            if common < len(child.ids):
                break
            node = child
        best.found_len = position
        for child, common in path[:best_depth]:
            for g, pages in enumerate(child.pages):
                count = common // self._page_sizes[g]
                best.pages[g].extend([0] * count if pages is None else pages[:count])
        return best

    def _can_resume(self, position: int, live_from: list[int]) -> bool:
        return all(
            live <= (0 if reach is None else max(0, position - reach))
            for live, reach in zip(live_from, self._reach, strict=True)
        )

    def lock(self, match: Match) -> Lock:
        if match.num_tokens == 0:
            return Lock(0, None, [0] * len(self._groups))
        node: TreeNode = match.node
        if node.end > match.num_tokens:
            node = self._split(node, match.num_tokens)
        self._touch(node)
        self._checkpoints.touch(node)
        return self._lock_node(node)

    def _lock_node(self, node: TreeNode) -> Lock:
        lock = Lock(node.end, node, [0] * len(self._groups))
        node.holders += 1
        for g, reach in enumerate(self._reach):
            if reach is not None:
                lock.held_from[g] = self._boundary(node, self._align(max(0, node.end - reach)))
            self._count_locks(lock, g, +1)
        return lock

    def _boundary(self, node: TreeNode, position: int) -> int:
        """Make ``position`` a node boundary on the path to ``node``."""
        for step in node.path():
            if step.start < position < step.end:
                self._split(step, position)
            if step.start <= position:
                break
        return position

    def _count_locks(self, lock: Lock, group: int, change: int, up_to: int | None = None) -> None:
        """Add ``change`` to the group's lock counts of the nodes in ``[held_from, up_to)``."""
        for node in lock.node.path():
            if node.end <= lock.held_from[group]:
                break
            if up_to is not None and node.end > up_to:
                continue
            was_locked = node.locks[group] > 0
            node.locks[group] += change
            is_locked = node.locks[group] > 0
            if was_locked != is_locked:
                pages = node.pages[group]
                self._evictable[group] += (-1 if is_locked else 1) * (0 if pages is None else len(pages))
                self._queue(node, group)

    def advance(self, lock: Lock, num_tokens: int) -> None:
        if lock.node is None:
            return
        for g, reach in enumerate(self._reach):
            if reach is None or lock.held_from[g] >= lock.num_tokens:
                continue
            keep_from = min(num_tokens - reach, lock.num_tokens)
            if keep_from <= lock.held_from[g]:
                continue
            passed = [n.end for n in lock.node.path() if lock.held_from[g] < n.end <= keep_from]
            if passed:
                self._count_locks(lock, g, -1, up_to=max(passed))
                lock.held_from[g] = max(passed)

    def unlock(self, lock: Lock) -> None:
        if lock.node is None:
            return
        for g in range(len(self._groups)):
            self._count_locks(lock, g, -1)
        lock.node.holders -= 1
        self._prune(lock.node)
        lock.node = None

    def shared_prefixes(self, locks: Sequence[Lock]) -> list[SharedByLocks]:
        return shared_by([lock.node for lock in locks])

    # Inserting

    def insert(self, namespace: Hashable, ids: Sequence[int], pages: list[list[int]], lock: Lock) -> Insertion:
        num_tokens = self._align(len(ids))
        result = Insertion(lock, [], [[] for _ in self._groups])
        if num_tokens <= lock.num_tokens:
            return result
        node: TreeNode = lock.node if lock.node is not None else self._root(namespace)
        position = lock.num_tokens
        while position < num_tokens:
            child = node.children.get(self._key(ids, position))
            if child is None:
                node = self._append(node, ids, pages, position, num_tokens)
                break
            length = min(len(child.ids), num_tokens - position)
            common = common_length(child.ids, 0, ids, position, length)
            common -= common % self.unit
            if common < len(child.ids):
                child = self._split(child, position + common)
            self._merge(child, pages, result)
            node, position = child, position + common
        self._touch(node)
        result.lock = self._lock_node(node)
        self.unlock(lock)
        return result

    def _append(self, node: TreeNode, ids: Sequence[int], pages: list[list[int]], start: int, end: int) -> TreeNode:
        """Add nodes for ``[start, end)``, cut where a window group's pages begin (those before are freed already)."""
        cuts = {end}
        for g in range(len(self._groups)):
            first_live = self._first_live(g, pages[g], start, end)
            if start < first_live < end:
                cuts.add(first_live)
        for cut in sorted(cuts):
            shares: list[list[int] | None] = []
            for group_pages, page_size in zip(pages, self._page_sizes, strict=True):
                share = group_pages[start // page_size : cut // page_size]
                shares.append(share if all(share) else None)
            node = self._add_child(node, list(ids[start:cut]), cut, shares)
            start = cut
        return node

    def _add_child(self, parent: TreeNode, ids: list[int], end: int, pages: list[list[int] | None]) -> TreeNode:
        node = TreeNode(parent, ids, end, pages)
        parent.children[self._key(ids, 0)] = node
        self._watch.added(node)
        for g, share in enumerate(pages):
            if share is not None:
                self._evictable[g] += len(share)
                self._watch.stored(node, g)
        return node

    def _merge(self, node: TreeNode, pages: list[list[int]], result: Insertion) -> None:
        """Merge a request's pages into a node of the same tokens: fill tombstones, return duplicates."""
        cuts = {
            self._first_live(g, pages[g], node.start, node.end)
            for g in range(len(self._groups))
            if node.pages[g] is None
        }
        segments = [self._split(node, cut) for cut in sorted(cuts) if node.start < cut < node.end]
        for segment in [*segments, node]:
            for g in range(len(self._groups)):
                self._merge_group(segment, g, pages[g], result)

    def _merge_group(self, node: TreeNode, g: int, group_pages: list[int], result: Insertion) -> None:
        first, last = node.start // self._page_sizes[g], node.end // self._page_sizes[g]
        own = [page for page in group_pages[first:last] if page]
        if not own:
            return
        held = node.pages[g]
        if held is not None:
            result.duplicates[g].extend(own)
            result.exchanges.append(Exchange(g, first, list(held)))
            return
        node.pages[g] = own
        self._watch.stored(node, g)
        if node.locks[g] == 0:
            self._evictable[g] += len(own)
        self._queue(node, g)

    def _first_live(self, g: int, group_pages: list[int], start: int, end: int) -> int:
        """Return the first token of ``[start, end)`` whose page the request still has; ``end`` if none."""
        page_size = self._page_sizes[g]
        for index in range(start // page_size, end // page_size):
            if group_pages[index]:
                return index * page_size
        return end

    # States

    def state_of(self, lock: Lock) -> int:
        return 0 if lock.node is None else lock.node.checkpoint

    def keep_state(self, lock: Lock, position: int, slot: int) -> bool:
        self._boundary(lock.node, position)
        node = next(node for node in lock.node.path() if node.end == position)
        if node.checkpoint:
            self._checkpoints.touch(node)
            return False
        self._checkpoints.attach(node, slot)
        return True

    def take_state(self, lock: Lock) -> int:
        if not self.state_of(lock):
            raise RuntimeError("the prefix cache has no states of a prefix that were to be taken from it")
        return self._checkpoints.detach(lock.node)

    def evict_state(self) -> bool:
        node = self._checkpoints.oldest()
        if node is None:
            return False
        self._checkpoints.drop(node)
        self._prune(node)
        return True

    # Evicting

    def evict(self, group: int, num_pages: int) -> None:
        allocator = self._allocators[group]
        target = allocator.num_free + num_pages
        queue = self._queues[group]
        while allocator.num_free < target and queue:
            access, _, _, node = heapq.heappop(queue)
            node.queued[group] = False
            if node.parent is None or not self._is_evictable(node, group):
                continue  # removed, or locked again: it is queued anew when unlocked
            if access != node.last_access:
                self._queue(node, group)
                continue
            if self._reach[group] is None:
                self._remove(node)
            else:
                self._drop_pages(node, group)
                self._prune(node)

    def _is_evictable(self, node: TreeNode, group: int) -> bool:
        if node.pages[group] is None or node.locks[group] or node.parent is None:
            return False
        return self._reach[group] is not None or not node.children

    def _queue(self, node: TreeNode, group: int) -> None:
        """Queue a node for eviction if it has become evictable and is not queued yet."""
        if not node.queued[group] and self._is_evictable(node, group):
            node.queued[group] = True
            self._ticket += 1
            # Of equal age, earlier tokens go first: a conversation continues from its end.
            heapq.heappush(self._queues[group], (node.last_access, node.end, self._ticket, node))

    def _drop_pages(self, node: TreeNode, group: int) -> None:
        pages = node.pages[group]
        if pages is not None:
            node.pages[group] = None
            self._watch.removed(node, group)
            self._evictable[group] -= len(pages)
            self._allocators[group].free(pages)

    def _remove(self, node: TreeNode) -> None:
        """Remove an unlocked leaf, and ancestors that no request can use without it."""
        while True:
            parent = node.parent
            assert parent is not None and node.is_free_leaf
            for g in range(len(self._groups)):
                self._drop_pages(node, g)
            self._checkpoints.drop(node)
            del parent.children[self._key(node.ids, 0)]
            node.parent = None
            if parent.parent is None:
                if not parent.children:
                    del self._roots[self._namespaces.pop(parent)]
                return
            for g in range(len(self._groups)):
                self._queue(parent, g)
            if not self._is_useless(parent):
                return
            node = parent

    def _prune(self, node: TreeNode) -> None:
        """Remove an unlocked leaf that no request can resume from."""
        if self._is_useless(node):
            self._remove(node)

    def _is_useless(self, node: TreeNode) -> bool:
        if not node.is_free_leaf:
            return False
        lacks_states = self.keeps_states and not node.checkpoint
        return lacks_states or any(p is None and reach != 0 for p, reach in zip(node.pages, self._reach, strict=True))

    def evictable_pages(self, group: int) -> int:
        return self._evictable[group]

    def reset(self) -> None:
        nodes = [node for root in self._roots.values() for node in root.descendants()]
        if any(node.holders or any(node.locks) for node in nodes):
            raise RuntimeError("the prefix cache was reset while a request holds a part of it")
        for node in nodes:
            for g in range(len(self._groups)):
                self._drop_pages(node, g)
            self._checkpoints.drop(node)
            node.parent = None
        self._roots.clear()
        self._namespaces.clear()
        self._queues = [[] for _ in self._groups]
        self._watch.cleared()

    # The tree

    def _align(self, num_tokens: int) -> int:
        return num_tokens - num_tokens % self.unit

    def _key(self, ids: Sequence[int], position: int) -> Hashable:
        return ids[position] if self.unit == 1 else tuple(ids[position : position + self.unit])

    def _root(self, namespace: Hashable) -> TreeNode:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = TreeNode(None, [], 0, [[] for _ in self._groups])
            self._namespaces[root] = namespace
            self._watch.began(root)
        return root

    def _touch(self, node: TreeNode) -> None:
        self._clock += 1
        for step in node.path():
            step.last_access = self._clock
            for g in range(len(self._groups)):
                self._queue(step, g)

    def _split(self, node: TreeNode, position: int) -> TreeNode:
        """Split a node at ``position``: it keeps the later tokens; return its new parent, which gets the earlier."""
        parent = node.parent
        assert parent is not None and node.start < position < node.end
        cut = position - node.start
        shares: list[list[int] | None] = []
        for g, page_size in enumerate(self._page_sizes):
            pages = node.pages[g]
            shares.append(None if pages is None else pages[: cut // page_size])
            node.pages[g] = None if pages is None else pages[cut // page_size :]
        upper = TreeNode(parent, node.ids[:cut], position, shares)
        upper.locks = list(node.locks)
        upper.last_access = node.last_access
        parent.children[self._key(upper.ids, 0)] = upper
        node.ids = node.ids[cut:]
        node.parent = upper
        upper.children[self._key(node.ids, 0)] = node
        self._watch.split(upper, node)
        for g in range(len(self._groups)):
            self._queue(upper, g)
        return upper

    def check_integrity(self) -> None:
        evictable = [0] * len(self._groups)
        seen: list[set[int]] = [set() for _ in self._groups]
        for root in self._roots.values():
            for node in root.descendants():
                self._check_node(node)
                for g, pages in enumerate(node.pages):
                    for page in pages or []:
                        assert page not in seen[g], f"page {page} of group {g} is in two nodes"
                        seen[g].add(page)
                    if pages is not None and node.locks[g] == 0:
                        evictable[g] += len(pages)
        self._checkpoints.check_integrity([node for root in self._roots.values() for node in root.descendants()])
        assert evictable == self._evictable, f"evictable {self._evictable}, counted {evictable}"
        for g, allocator in enumerate(self._allocators):
            assert seen[g] <= allocator.used_pages(), f"group {g}: the tree holds pages that are free"

    def _check_node(self, node: TreeNode) -> None:
        parent = node.parent
        assert parent is not None and parent.end == node.start and node.ids
        assert len(node.ids) % self.unit == 0
        assert parent.children[self._key(node.ids, 0)] is node
        for g, pages in enumerate(node.pages):
            assert pages is None or len(pages) * self._page_sizes[g] == len(node.ids)
            assert node.locks[g] >= 0
            assert not (node.locks[g] and pages is None), "a held node has lost its pages"
            if self._reach[g] is None:
                assert pages is not None, "a node without pages in a full group"
                assert parent.parent is None or parent.locks[g] >= node.locks[g], "held below what is not"
            assert node.queued[g] or not self._is_evictable(node, g), "evictable, but not queued"
        assert not self._is_useless(node), "a useless leaf"

    def num_pages(self, group: int) -> int:
        return sum(len(node.pages[group] or []) for root in self._roots.values() for node in root.descendants())
