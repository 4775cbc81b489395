"""Events of the prefix cache: hashes that never change, and a reader's picture that agrees with the tree."""

import random

import pytest

from rtp_llm.srt.cache.allocator import PageAllocator
from rtp_llm.srt.cache.block_events import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    BlockWatch,
    chained,
    number,
    root_digest,
)
from rtp_llm.srt.cache.prefix_cache import Lock
from rtp_llm.srt.cache.radix_cache import RadixCache
from rtp_llm.srt.cache.spec import CacheGroup, CacheSpec

SALTLESS = (None, 0)


class Watched:
    """A radix cache, and what a reader of its events believes each group to hold."""

    def __init__(self, windows: list[int | None], page_size: int = 1, num_pages: int = 400) -> None:
        groups = [
            CacheGroup(CacheSpec(1, 8, 8, "float32", window=window), (layer,), page_size)
            for layer, window in enumerate(windows)
        ]
        self.page_size = page_size
        self.allocators = [PageAllocator(num_pages) for _ in groups]
        self.watch = BlockWatch(groups)
        self.cache = RadixCache(groups, self.allocators, watch=self.watch)
        self.seen: list[set[int]] = [set() for _ in groups]

    def put(self, ids: list[int], namespace: tuple = SALTLESS) -> Lock:
        pages = [allocator.allocate(len(ids) // self.page_size) for allocator in self.allocators]
        result = self.cache.insert(namespace, ids, pages, Lock(0, None, [0] * len(pages)))
        for allocator, duplicates in zip(self.allocators, result.duplicates, strict=True):
            allocator.free(duplicates)
        return result.lock

    def read(self) -> list:
        events = self.watch.take()
        for event in events:
            if isinstance(event, BlocksCleared):
                self.seen = [set() for _ in self.seen]
            elif isinstance(event, BlocksRemoved):
                assert set(event.hashes) <= self.seen[event.group], "removed, but never stored"
                self.seen[event.group] -= set(event.hashes)
            else:
                assert not set(event.hashes) & self.seen[event.group], "stored twice"
                self.seen[event.group] |= set(event.hashes)
        return events

    def held(self, group: int) -> set[int]:
        """The hashes, made anew from the tokens, of all blocks whose last token's page the tree holds."""
        size, hashes = self.watch.block_size, set()
        for root, (salt, _) in self.watch.namespaces.items():
            for node in root.descendants():
                ids = [i for part in reversed([n.ids for n in node.path()]) for i in part]
                digest = root_digest(size, (salt,) if salt else ())
                for end in range(size, node.end + 1, size):
                    digest = chained(digest, ids[end - size : end])
                    if end > node.start and node.pages[group] is not None:
                        hashes.add(number(digest))
        return hashes


def test_hashes_are_the_same_everywhere_and_for_ever():
    """What other machines and later versions must come to, too."""
    first = chained(root_digest(16), range(16))
    assert number(first) == 0x840BAB3E3107716A
    assert number(chained(first, range(16))) == 0xAD19049ABEA72CB4
    assert number(chained(root_digest(16, ("a salt",)), range(16))) == 0x8B1C0325F82C3FC2


def test_a_prompt_is_told_once_and_its_continuation_by_its_own_blocks():
    watched = Watched([None])
    watched.put(list(range(40)))
    [stored] = watched.read()
    assert stored == BlocksStored(stored.hashes, None, list(range(32)), 16, 0)
    watched.put(list(range(40)))
    assert watched.read() == []
    watched.put(list(range(50)))  # block 2 begins in the first node
    [later] = watched.read()
    assert (later.parent, later.token_ids) == (stored.hashes[1], list(range(32, 48)))


def test_branches_share_the_hashes_up_to_where_they_part():
    watched = Watched([None])
    watched.put(list(range(64)))
    watched.put([*range(40), *range(100, 124)])
    whole, branch = watched.read()
    assert branch.parent == whole.hashes[1] and branch.token_ids == [*range(32, 40), *range(100, 124)]
    assert not set(branch.hashes) & set(whole.hashes)


def test_the_salt_is_an_extra_key_of_the_first_block_alone():
    watched = Watched([None])
    watched.put(list(range(48)), ("mine", 7))
    watched.put(list(range(48)))
    watched.put(list(range(64)), ("mine", 7))
    salted, plain, more = watched.read()
    assert salted.extra_keys == [("mine", "length-class:7"), None, None] and more.extra_keys is None
    assert plain.extra_keys is None and not set(plain.hashes) & set(salted.hashes)


def test_ids_of_media_are_told_in_31_bits():
    watched = Watched([None])
    media = (1 << 50) + 5
    watched.put([media] * 16)
    watched.put([media + (1 << 40)] * 16)
    first, second = watched.read()
    assert first.token_ids == second.token_ids == [5] * 16
    assert first.hashes != second.hashes, "the hashes are of the whole ids"


def test_what_is_evicted_is_told():
    watched = Watched([None], page_size=16, num_pages=8)
    watched.cache.unlock(watched.put(list(range(64))))
    [stored] = watched.read()
    watched.cache.evict(0, 1)
    [removed] = watched.read()
    assert removed == BlocksRemoved(stored.hashes, 0)


def test_a_flush_replaces_what_has_not_been_told():
    watched = Watched([None])
    watched.cache.unlock(watched.put(list(range(64))))
    watched.cache.reset()
    assert watched.read() == [BlocksCleared()]


@pytest.mark.parametrize(("windows", "page_size"), [([None], 1), ([None], 16), ([None], 24), ([None, 20], 4)])
def test_a_reader_knows_what_the_tree_holds(windows: list[int | None], page_size: int):
    for seed in range(3):
        draw, watched = random.Random(seed), Watched(windows, page_size)
        unit, locks, texts = watched.cache.unit, [], [[0] * 96]
        for _ in range(60):
            text = draw.choice(texts)
            cut = draw.randrange(0, len(text) + 1)
            ids = [*text[:cut], *[draw.randrange(3) for _ in range(draw.randrange(1, 90))]]
            ids = ids[: len(ids) - len(ids) % unit]
            for group in range(len(windows)):
                wanted = len(ids) // page_size
                free = watched.allocators[group].num_free
                if free < wanted:
                    watched.cache.evict(group, wanted - free)
            if ids and all(a.num_free >= len(ids) // page_size for a in watched.allocators):
                texts.append(ids)
                locks.append(watched.put(ids, draw.choice([SALTLESS, ("salt", 0)])))
            if len(locks) > 2:
                watched.cache.unlock(locks.pop(draw.randrange(len(locks))))
            watched.read()
            for group in range(len(windows)):
                assert watched.seen[group] == watched.held(group)
        assert watched.seen[0], "nothing was ever stored"
