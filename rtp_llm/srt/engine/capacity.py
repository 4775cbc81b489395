"""The number of pages of each cache group, and of slots for states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rtp_llm.srt.cache.spec import CacheGroup, StateGroup, whole_pages

# Without a limit, no more tokens than this are reserved: small models would fill the memory without need.
MAX_AUTO_TOKENS = 1 << 22
MIN_AUTO_TOKENS = 1 << 18


class NotEnoughMemory(RuntimeError):
    """The cache that fits beside the weights is too small to serve a request."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Pages per cache group, and what follows from them."""

    num_pages: tuple[int, ...]
    max_total_tokens: int  # of full groups, or of window groups where there are no others
    max_req_len: int  # tokens of the longest request that fits
    cache_bytes: int  # per rank


# More checkpoints than one for so many tokens that the cache holds would be of no use.
TOKENS_PER_CHECKPOINT = 64


@dataclass(frozen=True, slots=True)
class StateCapacity:
    """Slots for recurrent states: one for each running request, all others for checkpoints."""

    max_running_requests: int
    num_slots: int = 0
    num_bytes: int = 0  # per rank


def auto_max_tokens(context_length: int, max_running_requests: int) -> int:
    """Tokens that all running requests could use, within bounds."""
    return min(max(context_length * max_running_requests, MIN_AUTO_TOKENS), MAX_AUTO_TOKENS)


def plan_capacity(
    groups: Sequence[CacheGroup],
    context_length: int,
    max_chunk: int | None,
    budget_bytes: int,
    max_total_tokens: int | None,
    auto_tokens: int,
    window_ratio: float,
) -> Capacity:
    """Share ``budget_bytes`` (per rank) among the groups.

    A window group gets ``window_ratio`` of the tokens of a full one, but no less than one request needs for its window
    and a chunk of ``max_chunk`` tokens (None: prompts are not cut, and a whole one is in the cache at once).
    ``max_total_tokens`` is used as it is.

    Raises:
        NotEnoughMemory: ``max_total_tokens``, or the least that serves a request, does not fit.
    """

    def pages_of(group: CacheGroup, total: int) -> int:
        pages = total // group.page_size
        if group.window is None or not has_full:
            return pages
        alone = -(-(group.window + (max_chunk or context_length) + unit) // group.page_size) + 1
        return max(int(total * window_ratio) // group.page_size, min(pages, alone))

    def pages_for(total: int) -> list[int]:
        return [max(1, pages_of(group, total)) for group in groups]

    def bytes_for(total: int) -> int:
        return sum(pages * group.bytes_per_page for pages, group in zip(pages_for(total), groups, strict=True))

    unit = whole_pages(groups)
    has_full = any(group.window is None for group in groups)
    page_size = max((group.page_size for group in groups), default=1)
    if max_total_tokens is not None:
        total = max_total_tokens
        if bytes_for(total) > budget_bytes:
            raise NotEnoughMemory(
                f"max_total_tokens={total} needs {_gib(bytes_for(total))} of cache, but {_gib(budget_bytes)} are left "
                f"beside the weights: lower it, or raise mem_fraction_static"
            )
    else:
        total = _largest(bytes_for, budget_bytes, auto_tokens)
    if total < page_size:
        raise NotEnoughMemory(
            f"there is no room for a page of {page_size} tokens: {_gib(budget_bytes)} are left for the cache beside "
            f"the weights. Free memory, raise mem_fraction_static, or choose a smaller model or dtype"
            if max_total_tokens is None
            else f"max_total_tokens={total} is less than a page of {page_size} tokens"
        )
    num_pages = pages_for(total)
    slides = max_chunk is not None
    longest = [_longest(group, pages, slides, unit) for group, pages in zip(groups, num_pages, strict=True)]
    if min(longest, default=2) < 2:
        raise NotEnoughMemory(
            f"the cache holds {total} token, but a request needs two at least: one of the prompt and a new one. "
            "Raise max_total_tokens or mem_fraction_static"
        )
    return Capacity(tuple(num_pages), total // page_size * page_size, min([context_length, *longest]), bytes_for(total))


def plan_states(
    states: StateGroup | None,
    max_running_requests: int,
    budget_bytes: int,
    auto_tokens: int,
    checkpoint_fraction: float,
    keeps_checkpoints: bool,
    beside_pages: bool,
) -> StateCapacity:
    """Return how many requests may run, and how many slots they and checkpoints get, within ``budget_bytes`` per rank.

    Args:
        auto_tokens: tokens that the cache is for; more checkpoints than one for each 64 of them are not kept.
        checkpoint_fraction: of the budget, for checkpoints; at most what requests leave.
        keeps_checkpoints: there is a prefix cache; it gets one slot at least.
        beside_pages: pages come out of the same budget, and keep half of it, or more.

    Raises:
        NotEnoughMemory: one request and one checkpoint do not fit.
    """
    if states is None:
        return StateCapacity(max_running_requests)
    least = 1 if keeps_checkpoints else 0
    slots = budget_bytes // states.bytes_per_slot - 2  # beside those of no tokens and of dummies
    if slots < 1 + least:
        raise NotEnoughMemory(
            f"there is no room for the states of {1 + least} requests of {states.bytes_per_slot / 2**20:.1f} MiB each: "
            f"{_gib(budget_bytes)} are left for the cache beside the weights. Free memory, raise mem_fraction_static, "
            "or lower max_total_tokens"
        )
    live = min(max_running_requests, max(1, (slots // 2 if beside_pages else slots) - least))
    wanted = min(int(slots * checkpoint_fraction), auto_tokens // TOKENS_PER_CHECKPOINT, slots - live)
    num_slots = live + (max(least, wanted) if keeps_checkpoints else 0)
    return StateCapacity(live, num_slots, (num_slots + 2) * states.bytes_per_slot)


def _longest(group: CacheGroup, num_pages: int, slides: bool, unit: int) -> int:
    """Tokens of the longest request that fits alone. ``slides``: pages leave a window even within a prompt."""
    num_tokens = num_pages * group.page_size
    # A window slides: its reach, the token being computed, a broken unit before them and a broken page after them.
    if slides and group.window is not None and num_tokens >= group.window + unit + group.page_size:
        return 1 << 62
    return num_tokens


def _largest(bytes_for: Callable[[int], int], budget_bytes: int, limit: int) -> int:
    """Return the largest number up to ``limit`` whose bytes stay within the budget."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_for(middle) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
