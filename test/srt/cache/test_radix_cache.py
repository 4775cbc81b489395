"""The radix cache and the allocator, by example and by random operations."""

import random

import pytest

from rtp_llm.srt.cache.allocator import OutOfPages, PageAllocator
from rtp_llm.srt.cache.prefix_cache import Insertion, Lock, common_length
from rtp_llm.srt.cache.radix_cache import RadixCache
from rtp_llm.srt.cache.spec import CacheGroup, CacheSpec, LengthScaling

NAMESPACE = ("", 0)


def make(
    windows: list[int | None], num_pages: int = 64, page_size: int | list[int] = 1
) -> tuple[RadixCache, list[PageAllocator]]:
    """``page_size``: of all groups, or of each."""
    page_sizes = page_size if isinstance(page_size, list) else [page_size] * len(windows)
    groups = [
        CacheGroup(CacheSpec(1, 8, 8, "float32", window=window), (layer,), size)
        for layer, (window, size) in enumerate(zip(windows, page_sizes, strict=True))
    ]
    allocators = [PageAllocator(num_pages) for _ in groups]
    return RadixCache(groups, allocators), allocators


def put(cache: RadixCache, allocators: list[PageAllocator], ids: list[int], lock: Lock | None = None) -> Insertion:
    """Inserts freshly computed pages for all of ``ids`` and frees the duplicates."""
    pages = [allocator.allocate(len(ids)) for allocator in allocators]
    result = cache.insert(NAMESPACE, ids, pages, lock or Lock(0, None, [0] * len(allocators)))
    for allocator, duplicates in zip(allocators, result.duplicates, strict=True):
        allocator.free(duplicates)
    cache.check_integrity()
    return result


def test_allocator_reuses_and_refuses():
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)
    assert sorted(pages) == [1, 2, 3] and allocator.num_free == 1
    with pytest.raises(OutOfPages, match="2 pages wanted, 1 of 4 free"):
        allocator.allocate(2)
    assert allocator.num_free == 1
    allocator.free([2])
    assert set(allocator.allocate(2)) == {2, 4}
    for wrong in (0, 5):
        with pytest.raises(RuntimeError, match="not in use"):
            allocator.free([wrong])
    allocator.free([1])
    with pytest.raises(RuntimeError, match="not in use"):
        allocator.free([1])


def test_match_finds_the_longest_prefix_and_changes_nothing():
    cache, allocators = make([None])
    cache.unlock(put(cache, allocators, [1, 2, 3, 4, 5]).lock)
    before = cache.evictable_pages(0), allocators[0].num_free
    assert cache.match(NAMESPACE, [1, 2, 3, 9], 4).num_tokens == 3
    assert cache.match(NAMESPACE, [1, 2, 3, 4, 5, 6], 4).num_tokens == 4
    assert cache.match(NAMESPACE, [2, 1], 2).num_tokens == 0
    assert cache.match(("other", 0), [1, 2, 3], 3).num_tokens == 0
    assert (cache.evictable_pages(0), allocators[0].num_free) == before


def test_locked_prefixes_survive_eviction():
    cache, allocators = make([None], num_pages=10)
    held = put(cache, allocators, [1, 2, 3, 4]).lock
    cache.unlock(put(cache, allocators, [1, 2, 7, 8, 9]).lock)
    assert cache.evictable_pages(0) == 3
    cache.evict(0, 100)
    cache.check_integrity()
    assert cache.match(NAMESPACE, [1, 2, 3, 4], 4).num_tokens == 4
    assert cache.match(NAMESPACE, [1, 2, 7, 8], 4).num_tokens == 2
    cache.unlock(held)
    cache.evict(0, 100)
    assert allocators[0].num_free == 10


def test_least_recently_used_goes_first():
    cache, allocators = make([None])
    for first in (1, 2, 3):
        cache.unlock(put(cache, allocators, [first, 0, 0]).lock)
    cache.unlock(cache.lock(cache.match(NAMESPACE, [1, 0, 0], 3)))
    cache.evict(0, 3)
    assert [cache.match(NAMESPACE, [first, 0, 0], 3).num_tokens for first in (1, 2, 3)] == [3, 0, 3]


def test_duplicates_come_back_with_the_pages_to_use_instead():
    cache, allocators = make([None])
    first = put(cache, allocators, [1, 2, 3, 4])
    again = put(cache, allocators, [1, 2, 3, 9])
    assert [(e.group, e.start) for e in again.exchanges] == [(0, 0)]
    assert again.exchanges[0].page_ids == cache.match(NAMESPACE, [1, 2, 3], 3).pages[0]
    assert len(again.duplicates[0]) == 3
    cache.unlock(first.lock)
    cache.unlock(again.lock)
    cache.check_integrity()


def test_a_match_ends_where_every_group_can_resume():
    cache, allocators = make([None, 4])  # a window of 4: three tokens before the query's own
    ids = list(range(1, 13))
    lock = put(cache, allocators, ids).lock
    cache.unlock(lock)
    cache.evict(1, 9)  # the window group loses its oldest nodes; the leaf's last three tokens are one node
    cache.check_integrity()
    assert cache.match(NAMESPACE, ids, 12).num_tokens == 12
    assert cache.match(NAMESPACE, ids, 12).pages[1][:9] == [0] * 9
    assert cache.match(NAMESPACE, ids, 11).num_tokens == 0, "tokens 8..10 are needed at 11, and 8 is gone"


def test_window_pages_are_let_go_as_the_request_advances():
    cache, allocators = make([None, 4])
    ids = list(range(1, 13))
    lock = put(cache, allocators, ids).lock
    assert cache.evictable_pages(1) == 9 and cache.evictable_pages(0) == 0
    cache.advance(lock, 14)
    cache.check_integrity()
    assert cache.evictable_pages(1) == 9, "the last node is still partly within reach"
    cache.advance(lock, 15)
    assert cache.evictable_pages(1) == 12
    cache.evict(1, 12)
    cache.unlock(lock)
    cache.check_integrity()
    assert allocators[0].num_free == allocators[1].num_free == 64, "nothing can resume there: it is all gone"


def test_a_tombstone_is_filled_again():
    cache, allocators = make([None, 4])
    ids = list(range(1, 11))
    cache.unlock(put(cache, allocators, ids + [77]).lock)
    cache.evict(1, 8)
    assert cache.match(NAMESPACE, ids[:6], 6).num_tokens == 0
    result = put(cache, allocators, ids)
    assert cache.match(NAMESPACE, ids[:6], 6).num_tokens == 6
    cache.unlock(result.lock)
    cache.check_integrity()


def test_pages_freed_before_insertion_become_tombstones():
    cache, allocators = make([None, 4])
    pages = [allocators[0].allocate(8), [0] * 5 + allocators[1].allocate(3)]
    result = cache.insert(NAMESPACE, list(range(8)), pages, Lock(0, None, [0, 0]))
    cache.check_integrity()
    cache.unlock(result.lock)
    assert cache.match(NAMESPACE, list(range(8)), 8).num_tokens == 8
    assert cache.match(NAMESPACE, list(range(8)), 7).num_tokens == 0


def test_only_whole_pages_are_shared():
    cache, allocators = make([None], page_size=4)
    pages = [allocators[0].allocate(3)]
    result = cache.insert(NAMESPACE, list(range(10)), pages, Lock(0, None, [0]))
    assert result.lock.num_tokens == 8
    assert cache.match(NAMESPACE, list(range(10)), 10).num_tokens == 8
    assert cache.match(NAMESPACE, list(range(10)), 7).num_tokens == 4
    assert cache.match(NAMESPACE, [0, 1, 2, 9], 4).num_tokens == 0
    cache.check_integrity()


def test_what_is_shared_is_whole_pages_of_every_group():
    cache, allocators = make([None, None, 5], page_size=[4, 6, 1])
    assert cache.unit == 12
    ids = list(range(30))
    pages = [allocators[0].allocate(8), allocators[1].allocate(5), [0] * 12 + allocators[2].allocate(18)]
    result = cache.insert(NAMESPACE, ids, pages, Lock(0, None, [0, 0, 0]))
    cache.check_integrity()
    assert result.lock.num_tokens == 24
    assert [cache.num_pages(g) for g in range(3)] == [6, 4, 12]
    match = cache.match(NAMESPACE, ids, 29)
    assert match.num_tokens == 24 and match.pages == [pages[0][:6], pages[1][:4], pages[2][:24]]
    assert cache.match(NAMESPACE, ids, 23).num_tokens == 0, "the last group has lost what is needed at 12"
    assert cache.match(NAMESPACE, [*ids[:20], 99, 99, 99, 99, 99], 25).num_tokens == 0
    assert cache.common_len(ids, [*ids[:20], 99], 20) == 12
    cache.unlock(result.lock)
    cache.reset()


def test_reset_refuses_while_something_is_held():
    cache, allocators = make([None])
    lock = put(cache, allocators, [1, 2, 3]).lock
    with pytest.raises(RuntimeError, match="holds a part"):
        cache.reset()
    cache.unlock(lock)
    cache.reset()
    assert allocators[0].num_free == 64


def test_common_length():
    rng = random.Random(0)
    for _ in range(300):
        a = [rng.randrange(3) for _ in range(rng.randrange(12))]
        b = [rng.randrange(3) for _ in range(rng.randrange(12))]
        limit = rng.randrange(min(len(a), len(b)) + 1)
        expected = next((i for i in range(limit) if a[i] != b[i]), limit)
        assert common_length(a, 0, b, 0, limit) == expected


def test_length_scaling_separates_keys():
    dynamic, longrope = LengthScaling(64, per_length=True), LengthScaling(64, per_length=False)
    assert dynamic.key_class(10) == dynamic.key_class(64) == longrope.key_class(64) == 0
    assert dynamic.key_class(65) != dynamic.key_class(66) and longrope.key_class(65) == longrope.key_class(66) != 0


class Simulation:
    """Requests that are admitted, computed chunk by chunk, inserted, advanced and ended in random order."""

    def __init__(self, seed: int, windows: list[int | None], page_size: int | list[int]) -> None:
        self.rng = random.Random(seed)
        self.windows = windows
        self.page_sizes = page_size if isinstance(page_size, list) else [page_size] * len(windows)
        self.cache, self.allocators = make(windows, num_pages=60, page_size=page_size)
        # What each page holds: the tokens up to its end. A page found in the cache must hold what is asked for.
        self.content: list[dict[int, tuple]] = [{} for _ in windows]
        self.live: list[dict] = []

    def random_ids(self) -> list[int]:
        ids: list[int] = []
        while len(ids) < self.rng.randrange(2, 40):
            ids.extend([self.rng.randrange(3)] * self.rng.randrange(1, 9))
        return ids

    def reserve(self, group: int, count: int) -> list[int] | None:
        allocator = self.allocators[group]
        if allocator.num_free + self.cache.evictable_pages(group) < count:
            return None
        self.cache.evict(group, count - allocator.num_free)
        return allocator.allocate(count)

    def admit(self) -> None:
        ids = self.random_ids()
        namespace = ("", self.rng.randrange(2))
        match = self.cache.match(namespace, ids, len(ids) - 1)
        self.check_content(namespace, ids, match.num_tokens, match.pages)
        lock = self.cache.lock(match)
        self.live.append({"ns": namespace, "ids": ids, "lock": lock, "done": match.num_tokens, "pages": match.pages})

    def check_content(self, namespace: tuple, ids: list[int], num_tokens: int, pages: list[list[int]]) -> None:
        for g, window in enumerate(self.windows):
            assert len(pages[g]) * self.page_sizes[g] == num_tokens
            for i, page in enumerate(pages[g]):
                end = (i + 1) * self.page_sizes[g]
                if window is None or end > num_tokens - (window - 1):
                    assert page, "a page within reach is missing"
                if page:
                    assert self.content[g][page] == (namespace, tuple(ids[:end]))

    def compute(self, request: dict) -> None:
        ids, done = request["ids"], request["done"]
        target = min(len(ids), done + self.rng.randrange(1, 12))
        grown = []
        for g in range(len(self.windows)):
            need = -(-target // self.page_sizes[g]) - len(request["pages"][g])
            pages = self.reserve(g, need)
            if pages is None:
                for other, taken in enumerate(grown):
                    self.allocators[other].free(taken)
                return
            grown.append(pages)
        for g, pages in enumerate(grown):
            request["pages"][g].extend(pages)
            size = self.page_sizes[g]
            for i in range(done // size, target // size):
                page = request["pages"][g][i]
                self.content[g][page] = (request["ns"], tuple(ids[: (i + 1) * size]))
        request["done"] = target
        if self.rng.random() < 0.6:
            self.insert(request)
        self.let_go(request)

    def insert(self, request: dict) -> None:
        result = self.cache.insert(request["ns"], request["ids"][: request["done"]], request["pages"], request["lock"])
        request["lock"] = result.lock
        for exchange in result.exchanges:
            end = exchange.start + len(exchange.page_ids)
            request["pages"][exchange.group][exchange.start : end] = exchange.page_ids
        for g, pages in enumerate(result.duplicates):
            self.allocators[g].free(pages)

    def let_go(self, request: dict) -> None:
        self.cache.advance(request["lock"], request["done"])
        for g, window in enumerate(self.windows):
            if window is None:
                continue
            table = request["pages"][g]
            passed = max(0, request["done"] - (window - 1)) // self.cache.unit * self.cache.unit
            own_from = request["lock"].num_tokens // self.page_sizes[g]
            for i in range(own_from, min(passed // self.page_sizes[g], len(table))):
                if table[i]:
                    self.allocators[g].free([table[i]])
                    table[i] = 0

    def end(self, request: dict) -> None:
        if self.rng.random() < 0.8:
            self.insert(request)
        num_tokens = request["lock"].num_tokens
        self.cache.unlock(request["lock"])
        for g, table in enumerate(request["pages"]):
            self.allocators[g].free([page for page in table[num_tokens // self.page_sizes[g] :] if page])
        self.live.remove(request)

    def check(self) -> None:
        self.cache.check_integrity()
        for g, allocator in enumerate(self.allocators):
            size = self.page_sizes[g]
            owned = sum(sum(1 for page in r["pages"][g][r["lock"].num_tokens // size :] if page) for r in self.live)
            assert allocator.num_used == owned + self.cache.num_pages(g), "a page is lost or counted twice"
        for request in self.live:
            for g, window in enumerate(self.windows):
                low = 0 if window is None else max(0, request["done"] - (window - 1))
                size = self.page_sizes[g]
                for i in range(low // size, request["done"] // size):
                    expected = (request["ns"], tuple(request["ids"][: (i + 1) * size]))
                    assert self.content[g][request["pages"][g][i]] == expected, "a page in use was overwritten"

    def run(self, operations: int) -> None:
        for step in range(operations):
            roll = self.rng.random()
            if roll < 0.25 and len(self.live) < 6:
                self.admit()
            elif roll < 0.80 and self.live:
                self.compute(self.rng.choice(self.live))
            elif roll < 0.97 and self.live:
                self.end(self.rng.choice(self.live))
            else:
                self.cache.evict(self.rng.randrange(len(self.windows)), self.rng.randrange(8))
            if step % 10 == 0:
                self.check()
        while self.live:
            self.end(self.live[0])
        self.check()
        self.cache.reset()
        assert all(allocator.num_used == 0 for allocator in self.allocators)


@pytest.mark.parametrize(
    ("seed", "num_operations"), [(0, 2000), *(pytest.param(seed, 10_000, marks=pytest.mark.slow) for seed in range(4))]
)
@pytest.mark.parametrize(
    ("windows", "page_size"),
    [
        ([None], 1),
        ([None, 6], 1),
        ([6, None, 11], 1),
        ([5], 1),
        ([1, None], 1),
        ([None], 4),
        ([None, 6], 4),
        ([None, None], [1, 2]),
        ([None, 6], [4, 1]),
        ([7, None], [2, 3]),
    ],
    ids=str,
)
def test_random_operations(windows: list[int | None], page_size: int | list[int], seed: int, num_operations: int):
    Simulation(seed, windows, page_size).run(num_operations)
