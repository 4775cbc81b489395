"""Checkpoints in the radix tree: where a match ends, what is kept and what goes."""

import pytest

from rtp_llm.srt.cache.allocator import PageAllocator
from rtp_llm.srt.cache.checkpoints import Checkpoints
from rtp_llm.srt.cache.prefix_cache import Lock
from rtp_llm.srt.cache.radix_cache import RadixCache
from rtp_llm.srt.cache.spec import CacheGroup, CacheSpec

NAMESPACE = ("", 0)
IDS = list(range(1, 13))


class Tree:
    """A radix tree with checkpoints, and with one cache group or none."""

    def __init__(self, num_groups: int = 1, num_slots: int = 8) -> None:
        groups = [CacheGroup(CacheSpec(1, 8, 8, "float32"), (layer,)) for layer in range(num_groups)]
        self.pages = [PageAllocator(64) for _ in groups]
        self.checkpoints = Checkpoints(num_slots)
        self.cache = RadixCache(groups, self.pages, self.checkpoints)

    def put(self, ids: list[int], *positions: int) -> Lock:
        """Insert tokens with checkpoints at some positions; return the lock."""
        pages = [allocator.allocate(len(ids)) for allocator in self.pages]
        insertion = self.cache.insert(NAMESPACE, ids, pages, Lock(0, None, [0] * len(pages)))
        for allocator, duplicates in zip(self.pages, insertion.duplicates, strict=True):
            allocator.free(duplicates)
        for position in positions:
            [slot] = self.checkpoints.slots.allocate(1)
            if not self.cache.keep_state(insertion.lock, position, slot):
                self.checkpoints.slots.free([slot])
        return insertion.lock

    def found(self, ids: list[int]) -> tuple[int, int]:
        """Up to where a request could resume, and how many of its tokens are there."""
        match = self.cache.match(NAMESPACE, ids, len(ids))
        return match.num_tokens, match.found_len

    def use(self, ids: list[int]) -> None:
        self.cache.unlock(self.cache.lock(self.cache.match(NAMESPACE, ids, len(ids))))

    def check_empty(self) -> None:
        self.cache.check_integrity()
        assert not self.checkpoints.slots.num_used and not any(allocator.num_used for allocator in self.pages)


@pytest.fixture(params=[1, 0], ids=["pages", "no pages"])
def tree(request: pytest.FixtureRequest) -> Tree:
    return Tree(request.param)


def test_a_match_ends_at_a_checkpoint(tree: Tree) -> None:
    tree.cache.unlock(tree.put(IDS, 4, 9, 12))
    tree.cache.check_integrity()
    assert tree.found(IDS) == (12, 12) and tree.found(IDS[:11]) == (9, 11)
    assert tree.found([*IDS[:6], 99, 98]) == (4, 6), "6 tokens are there, but states only of 4"
    assert tree.found(IDS[:3]) == (0, 3)


def test_a_checkpoint_stays_where_a_node_is_split(tree: Tree) -> None:
    first, second = tree.put(IDS, 12), tree.put([*IDS[:5], 77, 78], 7)
    assert tree.found(IDS) == (12, 12) and tree.found([*IDS[:5], 77, 78]) == (7, 7)
    tree.cache.unlock(first)
    tree.cache.unlock(second)
    tree.cache.check_integrity()


def test_the_same_states_are_kept_once(tree: Tree) -> None:
    first, second = tree.put(IDS, 12), tree.put(IDS, 12, 6)
    assert len(tree.checkpoints) == tree.checkpoints.slots.num_used == 2
    tree.cache.unlock(first)
    tree.cache.unlock(second)


def test_tokens_that_nobody_can_resume_behind_are_removed(tree: Tree) -> None:
    lock = tree.put(IDS, 5)
    assert tree.found(IDS) == (5, 12)
    tree.cache.unlock(lock)
    assert tree.found(IDS) == (5, 5), "there are no states behind token 5"
    assert tree.cache.evict_state()
    tree.check_empty()


def test_the_least_recently_used_checkpoint_goes_first(tree: Tree) -> None:
    tree.cache.unlock(tree.put(IDS, 4, 8, 12))
    tree.use(IDS[:4])
    assert tree.cache.evict_state() and tree.found(IDS) == (12, 12)
    assert tree.found(IDS[:8]) == (4, 8)
    assert tree.cache.evict_state() and tree.found(IDS) == (4, 4)
    assert tree.cache.evict_state() and not tree.cache.evict_state()
    tree.check_empty()


def test_what_a_plan_reads_is_not_evicted(tree: Tree) -> None:
    lock = tree.put(IDS, 12)
    tree.checkpoints.pin(tree.cache.state_of(lock))
    assert not tree.cache.evict_state()
    tree.checkpoints.unpin_all()
    assert tree.cache.evict_state() and tree.cache.state_of(lock) == 0
    tree.cache.unlock(lock)
    tree.check_empty()


def test_a_request_goes_on_in_place_of_a_checkpoint(tree: Tree) -> None:
    lock = tree.put(IDS, 6, 12)
    slot = tree.cache.take_state(lock)
    assert tree.found(IDS) == (6, 12) and tree.checkpoints.num_with_requests == 1
    with pytest.raises(RuntimeError, match="no states of a prefix"):
        tree.cache.take_state(lock)
    tree.checkpoints.slots.free([slot])
    tree.cache.unlock(lock)
    assert tree.found(IDS) == (6, 6)


def test_checkpoints_go_with_their_pages() -> None:
    tree = Tree()
    tree.cache.unlock(tree.put(IDS, 4, 12))
    tree.cache.evict(0, 1)
    assert tree.found(IDS) == (4, 4) and tree.checkpoints.slots.num_used == 1
    tree.cache.evict(0, 64)
    tree.check_empty()


def test_a_long_chain_of_tokens_is_removed_at_once() -> None:
    """However many nodes it has become: its checkpoints go one by one, the last one with all tokens."""
    tree = Tree(0, num_slots=4000)
    ids = list(range(3000))
    tree.cache.unlock(tree.put(ids, *range(1, 3001)))
    while tree.cache.evict_state():
        pass
    tree.check_empty()


def test_a_reset_frees_checkpoints_but_not_those_in_use(tree: Tree) -> None:
    lock = tree.put(IDS, 6)
    with pytest.raises(RuntimeError, match="reset while a request holds"):
        tree.cache.reset()
    tree.cache.unlock(lock)
    tree.cache.reset()
    tree.check_empty()
