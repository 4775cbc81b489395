"""The free pages of a cache group. Host only, no torch."""


class OutOfPages(RuntimeError):
    """More pages were asked for than are free: the caller must evict or retract first."""


class PageAllocator:
    """Hands out page ids ``1 .. num_pages`` of one cache group. Page 0 is the dummy that pads page tables.

    Freed pages are reused last in, first out; untouched ones are handed out in order, so that memory that was never
    needed is never touched.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a cache group needs at least one page, got {num_pages}")
        self.num_pages = num_pages
        self._next_untouched = 1
        self._freed: list[int] = []
        self._in_use = bytearray(num_pages + 1)

    @property
    def num_free(self) -> int:
        return self.num_pages + 1 - self._next_untouched + len(self._freed)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def allocate(self, count: int) -> list[int]:
        """Return ``count`` page ids.

        Raises:
            OutOfPages: fewer are free; none is taken.
        """
        if count > self.num_free:
            raise OutOfPages(f"{count} pages wanted, {self.num_free} of {self.num_pages} free")
        from_freed = min(count, len(self._freed))
        pages = self._freed[len(self._freed) - from_freed :]
        del self._freed[len(self._freed) - from_freed :]
        fresh = count - from_freed
        pages.extend(range(self._next_untouched, self._next_untouched + fresh))
        self._next_untouched += fresh
        for page in pages:
            self._in_use[page] = 1
        return pages

    def free(self, pages: list[int]) -> None:
        """Take pages back.

        Raises:
            RuntimeError: a page is not in use (freed twice, the dummy, out of range).
        """
        for page in pages:
            if not 0 < page <= self.num_pages or not self._in_use[page]:
                raise RuntimeError(f"page {page} was freed but is not in use")
            self._in_use[page] = 0
        self._freed.extend(pages)

    def used_pages(self) -> set[int]:
        return {page for page, used in enumerate(self._in_use) if used}
