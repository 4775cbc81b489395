"""Decides what each step computes. It counts tokens, not phases. Host only, no torch."""

import time
from collections import deque
from collections.abc import Sequence

from rtp_llm.srt.cache.block_events import CacheWatch
from rtp_llm.srt.cache.spec import CacheLayout
from rtp_llm.srt.constrained.backend import Matcher
from rtp_llm.srt.messages import (
    AbortRequest,
    FinishReason,
    FlushCache,
    FlushCacheDone,
    FromCore,
    GenerateRequest,
    ToCore,
    TokenOutput,
)
from rtp_llm.srt.plan import PageWrite, RowResult, RowWork, StepPlan, StepResult
from rtp_llm.srt.scheduler.config import SchedulerConfig
from rtp_llm.srt.scheduler.memory import CacheMemory
from rtp_llm.srt.scheduler.policy import WaitingQueue
from rtp_llm.srt.scheduler.request import Request
from rtp_llm.srt.scheduler.sharing import PrefixSharing, saved_tokens
from rtp_llm.srt.scheduler.states import StateLimits
from rtp_llm.srt.scheduler.steps import Budget, PendingPlan, SchedulerStats, StepInFlight, decoding_share

# A request waits for another that is computing the same prefix only if at least so many tokens are saved.
MIN_SHARED_TOKENS = 8
# Decode tokens kept free per running request when another is admitted. Grows with every retraction, then decays.
MIN_RESERVE_TOKENS = 4.0
MAX_RESERVE_TOKENS = 512.0
MAX_CANDIDATES = 256  # waiting requests looked at per step


class Scheduler:
    """The state machine of all requests: ``receive`` messages, ``plan`` a step, ``commit`` its result.

    Steps are committed in the order in which they were planned; several may be in flight. A running request has a row
    in the workers; it gives up row and pages when it ends, or when memory runs out (retraction: it waits again and
    resumes from its tokens; nothing is lost). The first request in the policy's order (by arrival, except with
    ``priority``) is never retracted while another runs. A request that fits into the cache alone is sure to end;
    with ``priority`` it waits for all that come before it.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        layout: CacheLayout,
        num_pages: Sequence[int],
        num_state_slots: int = 0,
        matchers: dict[str, Matcher] | None = None,
        watch: CacheWatch | None = None,
        first_row: int = 0,
    ) -> None:
        """``first_row``: of its rows, where other schedulers have those before."""
        self.config = config
        self._matchers = matchers  # of requests with a grammar, by rid: there before the request comes, taken then
        self._length_scaling = layout.length_scaling
        self._cut_prompts = config.chunked_prefill_size > 0
        self._prefill_budget = (
            min(config.chunked_prefill_size, config.max_prefill_tokens)
            if self._cut_prompts
            else config.max_prefill_tokens
        )
        max_chunk = max(self._prefill_budget, config.max_media_block) if self._cut_prompts else config.max_req_len
        limits = StateLimits(
            num_state_slots, config.max_running_requests, config.max_req_len, config.state_checkpoint_interval
        )
        states = None if layout.states is None else limits
        self.memory = CacheMemory(layout.groups, num_pages, max_chunk, config.disable_radix_cache, states, watch)
        self._states = self.memory.states
        self.waiting = WaitingQueue(config.schedule_policy, lambda r: self.memory.match(r).num_tokens)
        self.running: list[Request] = []  # in order of admission
        self.stats = SchedulerStats()
        self._live: dict[str, Request] = {}
        self._ending: set[Request] = set()  # finished, but named by a step in flight
        self._in_flight: deque[StepInFlight] = deque()
        self._rows = range(first_row, first_row + config.max_running_requests)
        self._free_rows = list(reversed(self._rows))
        self._pending = PendingPlan()
        self._sharing = PrefixSharing(self.memory.cache) if config.share_prefixes else None
        self._reserve = MIN_RESERVE_TOKENS
        self._num_arrivals = 0
        self._num_steps = 0

    @property
    def matchers(self) -> list[Matcher]:
        return self._in_flight[-1].matchers()  # of the step that was planned last

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting and not self._in_flight

    @property
    def memories(self) -> list[CacheMemory]:
        return [self.memory]

    @property
    def num_live(self) -> int:
        """Requests that run or wait."""
        return len(self._live)

    def has(self, rid: str) -> bool:
        return rid in self._live

    def cached_len(self, message: GenerateRequest) -> int:
        """Return how many tokens of a request the prefix cache has."""
        return self.memory.match(self._made(message)).num_tokens if message.prompt_ids else 0

    def _made(self, message: GenerateRequest) -> Request:
        blocks = self.config.max_media_block > 0
        return Request.from_message(message, self._num_arrivals, self._length_scaling, blocks, self.config.outputs)

    # Receiving

    def receive(self, messages: Sequence[ToCore]) -> list[FromCore]:
        """Take in messages; return the answers that can be given at once."""
        outputs: list[FromCore] = []
        for message in messages:
            if isinstance(message, GenerateRequest):
                outputs.extend(self._arrive(message))
            elif isinstance(message, AbortRequest):
                outputs.extend(self._abort(message.rid))
            elif isinstance(message, FlushCache):
                outputs.append(self._flush(message))
            else:
                raise TypeError(f"the scheduler takes no {type(message).__name__}")
        return outputs

    def _arrive(self, message: GenerateRequest) -> list[FromCore]:
        problem = self._refusal(message)
        if problem:
            return [TokenOutput(message.rid, finish_reason=FinishReason("abort", message=problem, status_code=400))]
        request = self._made(message)
        self._num_arrivals += 1
        request.matcher = self._matchers.pop(request.rid, None) if self._matchers else None
        reason = request.ended_before()
        if reason is not None:
            return [TokenOutput(message.rid, finish_reason=reason)]
        self._live[request.rid] = request
        self.waiting.add(request)
        return []

    def _refusal(self, message: GenerateRequest) -> str | None:
        """Return why a request can never be served; None if it can. For clients that do not check themselves."""
        if message.rid in self._live:
            return f"a request with the id {message.rid!r} is running already"
        if not message.prompt_ids:
            return "the prompt is empty: it needs at least one token"
        total = len(message.prompt_ids) + max(message.spec.max_new_tokens, len(message.output_ids))
        if total > self.config.max_req_len:
            return (
                f"the request needs {total} tokens ({len(message.prompt_ids)} of the prompt), "
                f"but at most {self.config.max_req_len} can be served"
            )
        media = message.spec.media
        too_long = None if media is None else media.too_long_for(self.config.max_media_block)
        return too_long or self.config.outputs.problem(message.spec.pooling, len(message.prompt_ids))

    def _abort(self, rid: str | None) -> list[FromCore]:
        requests = list(self._live.values()) if rid is None else [self._live[rid]] if rid in self._live else []
        reason = FinishReason("abort", message="the request was aborted", status_code=499)
        return [self._finish(request, reason) for request in requests]

    def _flush(self, message: FlushCache) -> FlushCacheDone:
        if not self.idle:
            text = f"{len(self.running)} requests run and {len(self.waiting)} wait: the cache was not flushed"
            return FlushCacheDone(message.call_id, False, text)
        self.memory.cache.reset()
        return FlushCacheDone(message.call_id, True)

    # Planning

    def plan(self) -> StepPlan | None:
        """Return the next step; None if nothing can be done, or not before a step in flight is committed."""
        while True:
            decoding = self._make_room()
            if decoding is None:
                return None
            plan = StepPlan(self._num_steps)
            self._states.begin_plan()
            requests: list[Request] = []
            budget = Budget(self._prefill_budget, self._cut_prompts)
            prefilling = [r for r in self.running if r.uncomputed > 1] if len(decoding) < len(self.running) else []
            self._plan_decoding(plan, requests, decoding)
            self._plan_prefilling(plan, requests, prefilling, budget)
            self._plan_waiting(plan, requests, budget)
            if plan.work:
                return self._submit(plan, requests)
            if self._in_flight or self.idle:
                return None
            if not self.running:
                raise RuntimeError(f"{len(self.waiting)} requests wait, none runs, and none can be admitted")
            self._retract()

    def _make_room(self) -> list[Request] | None:
        """Return the decoding requests, each of which can get its next page now; None if a commit must come first."""
        while True:
            decoding = decoding_share(self.running, self.config.num_stages)
            if self.memory.can_grow_by_one(decoding):
                return decoding
            if self._in_flight:
                return None
            self._retract()

    def _plan_decoding(self, plan: StepPlan, requests: list[Request], decoding: list[Request]) -> None:
        """Do ``_add_work`` with one token for each request, in one go: there may be hundreds."""
        plan.new_pages = self.memory.grow_by_one(decoding)
        for request in decoding:
            start = request.num_computed
            sample = request.remaining_new_tokens > 0
            plan.work.append(RowWork(request.row, start, 1, sample))
            request.num_computed = start + 1
            request.num_pending += sample
            request.in_flight += 1
        requests.extend(decoding)
        self.stats.computed_tokens += len(decoding)

    def _plan_prefilling(
        self, plan: StepPlan, requests: list[Request], prefilling: list[Request], budget: Budget
    ) -> None:
        for request in prefilling:
            num_tokens = self._share(request, budget)
            if num_tokens > 0:
                self._add_work(plan, requests, request, num_tokens, budget)

    def _plan_waiting(self, plan: StepPlan, requests: list[Request], budget: Budget) -> None:
        if not len(self.waiting) or not self._free_rows:
            return
        promised = self._promised()
        prefilling = [r for r in self.running if r.is_prefilling]
        for request in self.waiting.candidates()[:MAX_CANDIDATES]:
            if not self._free_rows or budget.is_spent:
                return
            match = self.memory.match(request)
            if request.reuses_prefix and self._is_being_computed(request, match.num_tokens, prefilling):
                continue
            self.memory.enter(request, match)
            if not self._fits(request, promised):
                self.memory.release(request)
                return
            num_tokens = self._share(request, budget)
            if num_tokens <= 0 or not self._states.take(request, match):
                self.memory.release(request)
                return
            self._admit(plan, request, match.num_tokens)
            prefilling.append(request)
            for g, count in enumerate(self._to_hold(request)):
                promised[g] += count
            grown = self.memory.pages_to_grow(request, num_tokens)
            self._add_work(plan, requests, request, num_tokens, budget)
            for g, count in enumerate(grown):
                promised[g] -= min(promised[g], max(0, count))

    def _share(self, request: Request, budget: Budget) -> int:
        """Number of its tokens that the request computes in this step."""
        room = self.memory.room(request)
        return request.uncut(budget.share_of(request.uncomputed, room), room)

    def _to_hold(self, request: Request) -> list[int]:
        reserve = min(max(0, request.remaining_new_tokens), int(self._reserve))
        return self.memory.pages_to_hold(request, request.num_tokens + reserve)

    def _promised(self) -> list[int]:
        """Pages per group that running requests are still expected to take."""
        promised = [0] * len(self.memory.groups)
        for request in self.running:
            for g, count in enumerate(self._to_hold(request)):
                promised[g] += count
        return promised

    def _fits(self, request: Request, promised: list[int]) -> bool:
        """Whether the request fits beside those that run. Alone it does: it would have been refused."""
        if not self.running and not self._ending:
            return True
        wanted = self._to_hold(request)
        available = self.memory.available_everywhere()
        return all(w + p <= a for w, p, a in zip(wanted, promised, available, strict=True))

    def _is_being_computed(self, request: Request, matched: int, prefilling: Sequence[Request]) -> bool:
        """Whether one of ``prefilling`` is computing tokens that ``request`` shares and the cache does not have yet."""
        for other in prefilling:
            if other.namespace != request.namespace:
                continue
            limit = min(request.match_limit, other.prefill_len)
            if limit - matched < MIN_SHARED_TOKENS or request.keys[matched] != other.keys[matched]:
                continue
            common = self.memory.cache.common_len(request.keys, other.keys, limit)
            if common - matched < MIN_SHARED_TOKENS:
                continue
            if self._states.resumable_len(other, common, matched) - matched >= MIN_SHARED_TOKENS:
                return True
            request.states.common_len = max(request.states.common_len, common)
        return False

    def _admit(self, plan: StepPlan, request: Request, matched: int) -> None:
        self.waiting.admitted(request)
        self.running.append(request)
        request.row = self._free_rows.pop()
        request.prefill_len = request.num_sent = len(request.ids)
        if request.cached_tokens is None:
            request.cached_tokens = min(matched, request.prompt_len)
            request.queue_time_s = time.monotonic() - request.arrived_at
            self.stats.prompt_tokens += request.prompt_len
            self.stats.cached_tokens += request.cached_tokens
        plan.admissions.append(request.admission())
        for g, table in enumerate(request.pages):
            if table:
                plan.page_writes.append(PageWrite(request.row, g, 0, list(table)))

    def _add_work(
        self, plan: StepPlan, requests: list[Request], request: Request, num_tokens: int, budget: Budget
    ) -> None:
        plan.page_writes.extend(self.memory.grow(request, num_tokens))
        reaches_end = num_tokens == request.uncomputed
        sample = reaches_end and request.remaining_new_tokens > 0
        self._states.add_work(request, num_tokens)
        plan.work.append(RowWork(request.row, request.num_computed, num_tokens, sample))
        requests.append(request)
        request.num_computed += num_tokens
        request.num_pending += sample
        request.in_flight += 1
        budget.spend(num_tokens)
        self.stats.computed_tokens += num_tokens

    def _submit(self, plan: StepPlan, requests: list[Request]) -> StepPlan:
        plan.releases, plan.known_tokens = self._pending.releases, self._pending.known_tokens
        plan.states = self._states.accesses()
        plan.page_writes = self._pending.page_writes + plan.page_writes
        self._pending = PendingPlan()
        if self._sharing is not None:
            decoding = [request for request, work in zip(requests, plan.work, strict=True) if work.num_tokens == 1]
            plan.shared_prefixes = self._sharing.of(decoding)
            self.stats.shared_tokens += saved_tokens(plan.shared_prefixes)
        step = StepInFlight(plan, requests)
        if self._matchers is not None:
            plan.masked_rows = step.masked_rows()
        self._in_flight.append(step)
        self._num_steps += 1
        self._reserve = max(MIN_RESERVE_TOKENS, self._reserve * 0.99)
        return plan

    def _retract(self) -> None:
        """Take memory and row from the last running request in the policy's order. No step is in flight."""
        if len(self.running) < 2:
            raise RuntimeError("a single request does not fit into the cache, though its length was checked")
        request = max(self.running, key=self.waiting.place)
        self._leave(request)
        request.num_retractions += 1
        self.waiting.add(request)
        self.stats.retractions += 1
        self._reserve = min(MAX_RESERVE_TOKENS, self._reserve * 2)

    def _leave(self, request: Request) -> None:
        """Take a request's row and pages back. No step in flight names it."""
        self.memory.release(request)
        if request in self.running:
            self.running.remove(request)
        self._pending.leave_out(request.row)
        self._free_rows.append(request.row)
        request.row = -1

    # Committing

    def commit(self, result: StepResult) -> list[FromCore]:
        """Take in the result of the oldest step in flight; return its outputs for clients."""
        step = self._in_flight.popleft()
        if step.plan.step_id != result.step_id:
            raise RuntimeError(f"step {step.plan.step_id} is due, but the result of step {result.step_id} came")
        self.memory.settle(result.step_id)
        outputs: list[FromCore] = []
        for request, work, row in zip(step.requests, step.plan.work, result.rows, strict=True):
            request.in_flight -= 1
            request.num_pending -= work.sample
            request.num_committed = work.start + work.num_tokens
            if request.finished:
                if not request.in_flight:
                    self._ending.discard(request)
                    self._leave(request)
                continue
            output = self._commit_row(request, work, row)
            if output is not None:
                outputs.append(output)
        return outputs

    def _commit_row(self, request: Request, work: RowWork, row: RowResult) -> TokenOutput | None:
        if row.error is not None:
            request.is_broken = True
            return self._finish(request, FinishReason("abort", message=row.error, status_code=500))
        if row.prompt_logprobs:
            request.take_prompt_logprobs(len(row.prompt_logprobs))
        token_ids, reason = request.take_all(row.token_ids)
        if len(token_ids) > len(row.token_ids):
            self._pending.known_tokens.append(request.to_send())
        if reason is None and request.max_new_tokens == 0 and request.num_committed >= request.prompt_len:
            reason = FinishReason("length", length=0)
        self.stats.generated_tokens += len(token_ids)
        if reason is None:
            if request.is_prefilling and self.memory.has_pages_to_share(request):
                self._pending.page_writes.extend(self.memory.share(request, self._num_steps - 1))
                self._states.keep(request)
            self.memory.advance(request)
            if not token_ids and not row.prompt_logprobs:
                return None
        else:
            self._end(request)
        return self._output(request, reason, token_ids, row)

    def _output(
        self, request: Request, reason: FinishReason | None, token_ids: list[int], row: RowResult
    ) -> TokenOutput:
        return TokenOutput(
            request.rid,
            token_ids,
            row.logprobs[: len(token_ids)],
            row.prompt_logprobs,
            request.cached_tokens or 0,  # by position: keywords take twice the time, for each row of each step
            request.prompt_len,
            request.num_retractions,
            request.queue_time_s,
            reason,
            row.pooled,
        )

    def _finish(self, request: Request, reason: FinishReason) -> TokenOutput:
        """End a request in any state, without further tokens."""
        self._end(request)
        return self._output(request, reason, [], RowResult())

    def _end(self, request: Request) -> None:
        """Mark a request as ended; its pages go back when no step in flight names it."""
        request.finished = True
        del self._live[request.rid]
        self.stats.finished_requests += 1
        if request.row < 0:
            self.waiting.remove(request)
        elif request.in_flight:
            self.running.remove(request)
            self._ending.add(request)
        else:
            self._leave(request)

    def check_integrity(self) -> None:
        """Check memory (see CacheMemory.check_integrity) and rows. For tests."""
        self.memory.check_integrity([*self.running, *self._ending])
        rows = [r.row for r in [*self.running, *self._ending]]
        assert sorted([*rows, *self._free_rows]) == list(self._rows), "a row is lost"
        assert all(not r.pages and r.row < 0 for r in self.waiting), "a waiting request holds something"
