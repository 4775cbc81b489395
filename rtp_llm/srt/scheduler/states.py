"""The slots of recurrent states, as requests take, save and return them. Host only, no torch."""

import math
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rtp_llm.srt.cache.checkpoints import Checkpoints
from rtp_llm.srt.cache.prefix_cache import Match, PrefixCache
from rtp_llm.srt.plan import StateAccess
from rtp_llm.srt.scheduler.request import HeldStates, Request

# States are kept at multiples of so many tokens, a chunk of the recurrent kernels, except where prefixes part.
STATE_UNIT = 64
# Another checkpoint is worth its memory if it saves so many tokens.
MIN_SAVED_TOKENS = 32
# Without an option, a prompt has a checkpoint every so many tokens, or fewer where few fit.
MIN_INTERVAL = 1024
MIN_CHECKPOINTS_FOR_INTERVALS = 16


@dataclass(frozen=True, slots=True)
class StateLimits:
    """Slots and what they are for.

    ``interval``: a prompt's states are saved at multiples of so many tokens. 0: not; None: by the number of slots.
    """

    num_slots: int
    max_running: int  # requests, each of which has a slot
    max_req_len: int
    interval: int | None = None


class NoStates:
    """What the scheduler asks about states, answered for models that keep none."""

    def begin_plan(self) -> None:
        """Forget what was added to the plan before."""

    def accesses(self) -> list[StateAccess]:
        """Return what the plan's work reads and writes besides the slots of its rows."""
        return []

    def take(self, request: Request, match: Match) -> bool:
        """Give a request that holds ``match`` a slot of its own. False: none can be freed before the next plan."""
        return True

    def add_work(self, request: Request, num_tokens: int) -> None:
        """Add to the plan what the next ``num_tokens`` tokens of a request load and save."""

    def resumable_len(self, request: Request, common: int, matched: int) -> int:
        """Return up to where another request that has ``common`` tokens in common can resume once these are computed.

        States are then saved there, if that is still possible.

        Args:
            matched: from where it can resume now.
        """
        return common

    def keep(self, request: Request) -> None:
        """Let the prefix cache have the states that were saved of tokens which it holds."""

    def release(self, request: Request) -> None:
        """Take back the slots of a request that no step in flight names; its last states stay, if they are usable."""

    @property
    def usage(self) -> float:
        """The share of slots that requests hold, 0 to 1; checkpoints count as free."""
        return 0.0

    def check_integrity(self, requests: Sequence[Request]) -> None:
        """Check that every slot is free, one request's, or the prefix cache's. For tests."""


class StateSlots(NoStates):
    """Each running request has a slot; all others hold checkpoints, which give way to requests.

    Slots are read and written in the order of plans: one that a plan frees may be given away by the next, though the
    step is still in flight. Within a plan, a checkpoint that it loads is pinned.
    """

    def __init__(self, cache: PrefixCache, checkpoints: Checkpoints, limits: StateLimits) -> None:
        self._cache = cache
        self.checkpoints = checkpoints
        spare = max(0, limits.num_slots - limits.max_running) if cache.keeps_states else 0
        # One prompt does not evict the checkpoints of all others.
        self._most_saves = max(1, spare // 4) if cache.keeps_states else 0
        self._unit = math.lcm(cache.unit, STATE_UNIT)
        interval = _default_interval(spare, limits.max_req_len) if limits.interval is None else limits.interval
        self._interval = -(-interval // self._unit) * self._unit
        # Of the plan being made, by row: where its work begins, and what that loads and saves.
        self._planned: dict[int, tuple[int, StateAccess]] = {}

    def begin_plan(self) -> None:
        self.checkpoints.unpin_all()
        self._planned = {}

    def accesses(self) -> list[StateAccess]:
        return [access for _, access in self._planned.values()]

    def _obtain(self) -> int:
        """Return a free slot, for which the least recently used checkpoint may be evicted; 0 if there is none."""
        slots = self.checkpoints.slots
        if not slots.num_free and not self._cache.evict_state():
            return 0
        return slots.allocate(1)[0]

    def take(self, request: Request, match: Match) -> bool:
        load = self._cache.state_of(request.lock)
        was_pinned = self.checkpoints.is_pinned(load)
        if load:
            self.checkpoints.pin(load)
        slot = self._obtain()
        if not slot:
            if not load or was_pinned:
                return False
            slot = self._cache.take_state(request.lock)  # it goes on in place of the checkpoint
        branch = max(match.found_len, request.states.common_len)
        request.states = HeldStates(slot, load, request.num_computed)
        request.states.points = self._points(request, branch)
        return True

    def _points(self, request: Request, branch: int) -> list[int]:
        """Return the positions of a request's tokens at which its states are to be saved, in ascending order.

        They are, the most important first: where its tokens part from those of others; the prompt's last whole unit;
        multiples of the interval.
        """
        start, limit = request.num_computed, len(request.ids) - 1
        wanted = [branch - branch % self._cache.unit, limit - limit % self._unit]
        step = self._interval
        while step and (limit - start) // step > self._most_saves:
            step *= 2
        if step:
            wanted.extend(range(start - start % step + step, limit + 1, step))
        points: list[int] = []
        for position in wanted:
            if len(points) < self._most_saves and position <= limit and self._is_useful(request, position, points):
                insort(points, position)
        return points

    def _is_useful(self, request: Request, position: int, points: Iterable[int]) -> bool:
        """Whether states saved at ``position`` would save enough tokens beyond those of other points."""
        if position - request.states.resumed_len < MIN_SAVED_TOKENS or request.span_around(position) is not None:
            return False
        return all(abs(position - other) >= MIN_SAVED_TOKENS for other in points)

    def add_work(self, request: Request, num_tokens: int) -> None:
        held, start = request.states, request.num_computed
        access = StateAccess(request.row, held.slot if start > held.resumed_len else held.load)
        self._planned[request.row] = start, access
        while held.points and held.points[0] <= start + num_tokens:
            self._save(request, held.points.pop(0), access)

    def _save(self, request: Request, position: int, access: StateAccess) -> None:
        """Save the states at ``position`` in the plan's work of a request, if there is a slot for them."""
        slot = self._obtain()
        if slot:
            insort(access.saves, (position, slot))
            insort(request.states.saves, (position, slot))

    def resumable_len(self, request: Request, common: int, matched: int) -> int:
        common -= common % self._cache.unit
        before = [position for position in self._known(request) if position <= common]
        if len(before) < 2 * self._most_saves and self._is_useful(request, common, before):
            self._save_at(request, common)
        return max((position for position in self._known(request) if position <= common), default=matched)

    def _known(self, request: Request) -> list[int]:
        """Return the positions at which a request's states are being saved, or will be."""
        return [*request.states.points, *(position for position, _ in request.states.saves)]

    def _save_at(self, request: Request, position: int) -> None:
        """Have the states at ``position`` saved, if the request computes it later, or in the plan being made."""
        if request.num_computed < position:
            insort(request.states.points, position)
            return
        start, access = self._planned.get(request.row, (position, None))
        if access is not None and start < position:
            self._save(request, position, access)

    def keep(self, request: Request) -> None:
        held = request.states
        while held.saves and held.saves[0][0] <= request.lock.num_tokens:
            self._give(request, *held.saves.pop(0))

    def _give(self, request: Request, position: int, slot: int) -> None:
        """Give a slot to the prefix cache; free it if that has the same states already."""
        if not self._cache.keep_state(request.lock, position, slot):
            self.checkpoints.slots.free([slot])

    def release(self, request: Request) -> None:
        self.keep(request)
        held = request.states
        self.checkpoints.slots.free([slot for _, slot in held.saves])
        if held.slot:
            position = request.num_committed
            if held.resumed_len < position == request.lock.num_tokens and not request.is_broken:
                self._give(request, position, held.slot)
            else:
                self.checkpoints.slots.free([held.slot])
        request.states = HeldStates()

    @property
    def usage(self) -> float:
        return self.checkpoints.num_with_requests / self.checkpoints.num_slots

    def check_integrity(self, requests: Sequence[Request]) -> None:
        owned = [slot for request in requests for slot in (request.states.slot, *(s for _, s in request.states.saves))]
        owned = [slot for slot in owned if slot]
        assert len(owned) == len(set(owned)), "a state slot has two owners"
        assert len(owned) == self.checkpoints.num_with_requests, "a state slot is lost"


def _default_interval(spare: int, max_req_len: int) -> int:
    """Return how far apart a prompt's checkpoints are, for ``spare`` slots: the longest prompt takes an eighth."""
    if spare < MIN_CHECKPOINTS_FOR_INTERVALS:
        return 0
    return max(MIN_INTERVAL, -(-8 * max_req_len // spare))
