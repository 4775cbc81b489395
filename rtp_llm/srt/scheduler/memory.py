"""Ownership of pages: allocators, prefix cache and page tables of running requests. Host only, no torch."""

from collections import deque
from collections.abc import Sequence

from rtp_llm.srt.cache.allocator import PageAllocator
from rtp_llm.srt.cache.block_events import CacheWatch
from rtp_llm.srt.cache.checkpoints import Checkpoints
from rtp_llm.srt.cache.prefix_cache import Lock, Match, NoPrefixCache, PrefixCache
from rtp_llm.srt.cache.radix_cache import RadixCache
from rtp_llm.srt.cache.spec import CacheGroup
from rtp_llm.srt.plan import NewPages, PageWrite
from rtp_llm.srt.scheduler.request import Request
from rtp_llm.srt.scheduler.states import NoStates, StateLimits, StateSlots


class CacheMemory:
    """Pages of every cache group, as requests take and return them.

    ``available`` pages are free or can be freed by evicting: ``grow`` can always get that many.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        num_pages: Sequence[int],
        max_chunk: int,
        disable_prefix_cache: bool,
        states: StateLimits | None = None,
        watch: CacheWatch | None = None,
    ) -> None:
        """``states``: of a model that keeps some. ``watch``: is told what the prefix cache holds."""
        self.groups = list(groups)
        self.allocators = [PageAllocator(count) for count in num_pages]
        self.checkpoints = Checkpoints(1 if states is None else states.num_slots)
        self.cache: PrefixCache = (
            NoPrefixCache(groups)
            if disable_prefix_cache
            else RadixCache(groups, self.allocators, None if states is None else self.checkpoints, watch)
        )
        self.states = NoStates() if states is None else StateSlots(self.cache, self.checkpoints, states)
        self._page_sizes = [group.page_size for group in groups]
        self._unit = self.cache.unit
        self._has_windows = any(group.window is not None for group in groups)
        # Pages that a request can hold at once in a window group: its reach, a chunk, a broken unit before and a
        # broken page after them.
        self._resident = [
            None if group.window is None else self._num_pages(g, group.window + max_chunk + self._unit) + 1
            for g, group in enumerate(groups)
        ]
        self.evicted_tokens = 0  # in all, from the prefix cache
        # Duplicates that steps in flight still read: (last such step, group, pages).
        self._pending_frees: deque[tuple[int, int, list[int]]] = deque()

    def _num_pages(self, group: int, num_tokens: int) -> int:
        return -(-num_tokens // self._page_sizes[group])

    def available(self, group: int) -> int:
        return self.allocators[group].num_free + self.cache.evictable_pages(group)

    def available_everywhere(self) -> list[int]:
        return [self.available(g) for g in range(len(self.groups))]

    def usage(self) -> float:
        """Return the share of the fullest group's pages that requests hold, 0 to 1; cached pages count as free."""
        shares = (1 - self.available(g) / allocator.num_pages for g, allocator in enumerate(self.allocators))
        return max(shares, default=0.0)

    def free_tokens(self, group: int) -> int:
        """Tokens of a group that neither a request nor the prefix cache holds."""
        return self.allocators[group].num_free * self._page_sizes[group]

    def evictable_tokens(self, group: int) -> int:
        """Tokens that only the prefix cache holds."""
        return self.cache.evictable_pages(group) * self._page_sizes[group]

    # Looking ahead

    def pages_to_grow(self, request: Request, num_tokens: int) -> list[int]:
        """Pages per group that the next ``num_tokens`` tokens take."""
        num_tokens += request.num_computed
        return [self._num_pages(g, num_tokens) - len(table) for g, table in enumerate(request.pages)]

    def pages_to_hold(self, request: Request, num_tokens: int) -> list[int]:
        """Pages per group that the request will take at most until it has ``num_tokens`` tokens."""
        pages = []
        for g, (table, first) in enumerate(zip(request.pages, request.first_page, strict=True)):
            growth, resident = max(0, self._num_pages(g, num_tokens) - len(table)), self._resident[g]
            pages.append(growth if resident is None else min(growth, max(0, resident - (len(table) - first))))
        return pages

    def room(self, request: Request) -> int:
        """Number of tokens that the request can grow by now."""
        rooms = (
            (len(table) + self.available(g)) * self._page_sizes[g] - request.num_computed
            for g, table in enumerate(request.pages)
        )
        return min(rooms, default=request.uncomputed)

    def can_grow_by_one(self, requests: Sequence[Request]) -> bool:
        """Whether each request can get the page of its next token."""
        available = self.available_everywhere()
        if len(requests) <= min(available, default=len(requests)):
            return True
        needed = [len(self._without_page(requests, g)) for g in range(len(self.groups))]
        return all(n <= a for n, a in zip(needed, available, strict=True))

    def _without_page(self, requests: Sequence[Request], group: int) -> list[Request]:
        """Requests whose next token begins a page that they do not have yet."""
        page_size = self._page_sizes[group]
        return [r for r in requests if r.num_computed >= len(r.pages[group]) * page_size]

    # A request's life

    def match(self, request: Request) -> Match:
        match = self.cache.match(request.namespace, request.keys, request.match_limit)
        while (span := request.span_around(match.num_tokens)) is not None:
            match = self.cache.match(request.namespace, request.keys, span[0])
        return match

    def enter(self, request: Request, match: Match) -> None:
        """Make the request hold its cached prefix."""
        request.lock = self.cache.lock(match)
        request.pages = match.pages
        request.first_page = [0] * len(self.groups)
        request.num_computed = request.num_committed = match.num_tokens
        self._free_out_of_reach(request)

    def grow(self, request: Request, num_tokens: int) -> list[PageWrite]:
        """Allocate pages for the next ``num_tokens`` tokens. The caller has made sure that they are available."""
        writes = []
        for g, count in enumerate(self.pages_to_grow(request, num_tokens)):
            if count > 0:
                table = request.pages[g]
                pages = self._allocate(g, count)
                writes.append(PageWrite(request.row, g, len(table), pages))
                table.extend(pages)
        return writes

    def grow_by_one(self, requests: Sequence[Request]) -> list[NewPages]:
        """Do ``grow(request, 1)`` for each request, in one message per group. Call ``can_grow_by_one`` before."""
        new_pages = []
        for g in range(len(self.groups)):
            growing = self._without_page(requests, g)
            if growing:
                tables = [request.pages[g] for request in growing]
                places = [len(table) for table in tables]
                pages = self._allocate(g, len(growing))
                for table, page in zip(tables, pages, strict=True):
                    table.append(page)
                new_pages.append(NewPages(g, [request.row for request in growing], places, pages))
        return new_pages

    def _allocate(self, group: int, count: int) -> list[int]:
        allocator = self.allocators[group]
        num_free = allocator.num_free
        if num_free < count:
            self.cache.evict(group, count - num_free)
            self.evicted_tokens += (allocator.num_free - num_free) * self._page_sizes[group]
        return allocator.allocate(count)

    def has_pages_to_share(self, request: Request) -> bool:
        """Whether the request has complete pages that are not in the prefix cache yet."""
        return request.insertable_len // self._unit > request.cached_len // self._unit

    def share(self, request: Request, last_step: int) -> list[PageWrite]:
        """Enter the request's computed tokens into the prefix cache.

        Return the writes that exchange its duplicates for the cache's pages. Steps up to ``last_step`` may still read
        the duplicates: ``settle`` frees them.
        """
        keys = request.keys[: request.insertable_len]
        insertion = self.cache.insert(request.namespace, keys, request.pages, request.lock)
        request.lock = insertion.lock
        writes = []
        for exchange in insertion.exchanges:
            end = exchange.start + len(exchange.page_ids)
            request.pages[exchange.group][exchange.start : end] = exchange.page_ids
            writes.append(PageWrite(request.row, exchange.group, exchange.start, exchange.page_ids))
        for g, pages in enumerate(insertion.duplicates):
            if pages and request.in_flight:
                self._pending_frees.append((last_step, g, pages))
            else:
                self.allocators[g].free(pages)
        return writes

    def advance(self, request: Request) -> None:
        """Free window pages that the request can no longer reach, or unlock them if the cache owns them."""
        if not self._has_windows:
            return
        self.cache.advance(request.lock, request.num_committed)
        self._free_out_of_reach(request)

    def _free_out_of_reach(self, request: Request) -> None:
        for g, group in enumerate(self.groups):
            if group.window is None:
                continue
            table = request.pages[g]
            page_size = self._page_sizes[g]
            own_from = request.cached_len // page_size
            reachable = max(0, request.num_committed - (group.window - 1)) // self._unit * self._unit
            reachable = min(reachable // page_size, len(table))
            unreachable = table[max(own_from, request.first_page[g]) : reachable]
            self.allocators[g].free([page for page in unreachable if page])
            if reachable > request.first_page[g]:
                table[request.first_page[g] : reachable] = [0] * (reachable - request.first_page[g])
                request.first_page[g] = reachable

    def release(self, request: Request) -> None:
        """Take back all that the request holds; computed tokens stay cached. No step in flight names it."""
        if request.insertable_len > request.cached_len:
            self.share(request, last_step=-1)
        self.states.release(request)
        cached_len = request.cached_len
        self.cache.unlock(request.lock)
        for g, table in enumerate(request.pages):
            self.allocators[g].free([page for page in table[cached_len // self._page_sizes[g] :] if page])
        request.pages, request.first_page, request.lock = [], [], Lock(0)
        request.num_computed = request.num_committed = 0

    def settle(self, committed_step: int) -> None:
        """Free the duplicates that no step after ``committed_step`` reads."""
        while self._pending_frees and self._pending_frees[0][0] <= committed_step:
            _, group, pages = self._pending_frees.popleft()
            self.allocators[group].free(pages)

    def check_integrity(self, requests: Sequence[Request]) -> None:
        """Check that every page is free, the cache's, exactly one request's, or waiting to be freed. For tests."""
        self.cache.check_integrity()
        self.states.check_integrity(requests)
        for g, allocator in enumerate(self.allocators):
            owned: list[int] = []
            for request in requests:
                if request.pages:
                    owned.extend(page for page in request.pages[g][request.cached_len // self._page_sizes[g] :] if page)
            owned.extend(page for _, group, pages in self._pending_frees if group == g for page in pages)
            assert len(owned) == len(set(owned)), f"group {g}: a page has two owners"
            assert allocator.num_used == len(owned) + self.cache.num_pages(g), (
                f"group {g}: {allocator.num_used} pages are in use"
            )
