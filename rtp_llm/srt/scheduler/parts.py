"""Schedulers of ranks that each have requests and a cache of their own, and compute their steps together."""

from collections import deque
from collections.abc import Sequence
from dataclasses import fields

from rtp_llm.srt.constrained.backend import Matcher
from rtp_llm.srt.messages import FlushCache, FromCore, GenerateRequest, ToCore
from rtp_llm.srt.plan import StepPlan, StepResult
from rtp_llm.srt.scheduler.memory import CacheMemory
from rtp_llm.srt.scheduler.request import Request
from rtp_llm.srt.scheduler.scheduler import Scheduler
from rtp_llm.srt.scheduler.steps import SchedulerStats

MIN_CACHED_TOKENS = 32  # of a prompt, for which it is worth to ask a busier rank
MOST_AHEAD = 8  # requests by which that may exceed the least busy one, or by twice of what that has


class PartedScheduler:
    """The interface of a Scheduler, for several: part r has the requests of rank r.

    A request goes to the part that has cached most of its prompt, unless that is much busier than the least busy one,
    and else to that one. A plan has each part's work, in their order; a part may have none.
    """

    def __init__(self, parts: Sequence[Scheduler]) -> None:
        """``parts``: of one configuration; part r has the rows from ``r * max_running_requests`` on."""
        self._parts = list(parts)
        self.config = parts[0].config
        self._in_flight: deque[list[tuple[Scheduler, StepPlan]]] = deque()
        self._num_steps = 0

    @property
    def idle(self) -> bool:
        return all(part.idle for part in self._parts)

    @property
    def running(self) -> list[Request]:
        return [request for part in self._parts for request in part.running]

    @property
    def waiting(self) -> list[Request]:
        return [request for part in self._parts for request in part.waiting]

    @property
    def memories(self) -> list[CacheMemory]:
        return [part.memory for part in self._parts]

    @property
    def stats(self) -> SchedulerStats:
        names = [field.name for field in fields(SchedulerStats)]
        return SchedulerStats(**{name: sum(getattr(part.stats, name) for part in self._parts) for name in names})

    @property
    def matchers(self) -> list[Matcher]:
        return [matcher for part, plan in self._in_flight[-1] if plan.masked_rows for matcher in part.matchers]

    def receive(self, messages: Sequence[ToCore]) -> list[FromCore]:
        """Take in messages; return the answers that can be given at once."""
        outputs: list[FromCore] = []
        for message in messages:
            if isinstance(message, GenerateRequest):
                outputs += self._part_for(message).receive([message])
            elif isinstance(message, FlushCache) and not self.idle:
                outputs += next(part for part in self._parts if not part.idle).receive([message])
            elif isinstance(message, FlushCache):
                answers = [part.receive([message]) for part in self._parts]
                outputs += answers[0]
            else:
                outputs += [output for part in self._parts for output in part.receive([message])]
        return outputs

    def _part_for(self, message: GenerateRequest) -> Scheduler:
        for part in self._parts:
            if part.has(message.rid):
                return part  # which refuses it
        least = min(self._parts, key=lambda part: part.num_live)
        cached, place = max((part.cached_len(message), -place) for place, part in enumerate(self._parts))
        holder, most = self._parts[-place], max(2 * least.num_live, least.num_live + MOST_AHEAD)
        return holder if cached >= MIN_CACHED_TOKENS and holder.num_live <= most else least

    def plan(self) -> StepPlan | None:
        """Return the next step of all parts that can compute one; None if none can."""
        plans = [part.plan() for part in self._parts]
        planned = [(part, plan) for part, plan in zip(self._parts, plans, strict=True) if plan is not None]
        if not planned:
            return None
        self._in_flight.append(planned)
        joined = StepPlan(self._num_steps)
        self._num_steps += 1
        for _, plan in planned:
            _append(joined, plan)
        joined.rank_tokens = [1 if plan is None else sum(work.num_tokens for work in plan.work) for plan in plans]
        return joined

    def commit(self, result: StepResult) -> list[FromCore]:
        """Take in the result of the oldest step in flight; return its outputs for clients."""
        outputs: list[FromCore] = []
        rows = iter(result.rows)
        for part, plan in self._in_flight.popleft():
            outputs += part.commit(StepResult(plan.step_id, [next(rows) for _ in plan.work]))
        return outputs

    def check_integrity(self) -> None:
        """See Scheduler.check_integrity. For tests."""
        for part in self._parts:
            part.check_integrity()


def _append(plan: StepPlan, other: StepPlan) -> None:
    """Add all that a plan says to another."""
    for field in fields(StepPlan):
        value = getattr(other, field.name)
        if isinstance(value, list):
            getattr(plan, field.name).extend(value)
