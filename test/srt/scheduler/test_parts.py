"""Schedulers of several ranks that plan together, over a stub of the model for each rank."""

import random
from collections import Counter, deque
from typing import Any

import numpy as np
import pytest
from scheduled import Loop, StubWorker, config, layout, random_request, request

from rtp_llm.srt.engine.executor import joined_results
from rtp_llm.srt.messages import AbortRequest, FlushCache, FlushCacheDone, GenerateRequest
from rtp_llm.srt.plan import StepPlan, StepResult, TokenMasks
from rtp_llm.srt.scheduler.config import SchedulerConfig
from rtp_llm.srt.scheduler.parts import MIN_CACHED_TOKENS, PartedScheduler
from rtp_llm.srt.scheduler.scheduler import Scheduler
from rtp_llm.srt.worker.own_rows import OwnRows

MAX_LEN = 60


class Ranks:
    """A stub for each rank, which gets its rows of each plan."""

    def __init__(self, workers: list[StubWorker], num_rows: int) -> None:
        self.workers = workers
        self.groups, self.expected = workers[0].groups, workers[0].expected
        self._own_rows = [OwnRows(rank, num_rows) for rank in range(len(workers))]

    def execute(self, plan: StepPlan) -> StepResult:
        plans = [own.plan(plan) for own in self._own_rows]
        assert plan.rank_tokens == [sum(work.num_tokens for work in own.work) or 1 for own in plans]
        assert sum(len(own.work) for own in plans) == len(plan.work)
        return joined_results([worker.execute(own) for worker, own in zip(self.workers, plans, strict=True)])


class PartedLoop(Loop):
    """The core's loop over parts."""

    def __init__(
        self, loop_config: SchedulerConfig, cache_layout: Any, num_pages: list[int], num_parts: int, depth: int = 0
    ) -> None:
        num_rows = loop_config.max_running_requests
        self.parts = [
            Scheduler(loop_config, cache_layout, num_pages, num_rows + 8, first_row=part * num_rows)
            for part in range(num_parts)
        ]
        self.scheduler: Any = PartedScheduler(self.parts)
        self.worker: Any = Ranks([StubWorker(cache_layout) for _ in self.parts], num_rows)
        self.depth = depth
        self.in_flight = deque()
        self.outputs, self.plans = {}, []

    def commit(self) -> None:
        due, _ = self.in_flight.popleft()
        self.take(self.scheduler.commit(self.worker.execute(due)))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("windows", "states", "num_parts"), [([None], False, 3), ([None, 6], False, 2), ([None], True, 2)], ids=str
)
def test_random_traffic(windows: list[int | None], states: bool, num_parts: int, depth: int) -> None:
    """Every request ends once, with its own tokens, whichever part has it."""
    rng = random.Random(num_parts + 10 * depth)
    loop_config = config(max_req_len=MAX_LEN, max_running_requests=5, chunked_prefill_size=16, share_prefixes=True)
    loop = PartedLoop(loop_config, layout(windows, states=states), [90] * len(windows), num_parts, depth)
    sent: dict[str, GenerateRequest] = {}
    aborted: set[str] = set()
    for step in range(120):
        messages: list[Any] = []
        for _ in range(rng.choice([0, 0, 0, 1, 1, 4])):
            new = random_request(rng, f"r{len(sent)}", MAX_LEN)
            if new.spec.media is None:
                sent[new.rid] = new
                messages.append(new)
        if sent and rng.random() < 0.1:
            aborted.add(rng.choice(list(sent)))
            messages.append(AbortRequest(max(aborted)))
        loop.turn(messages)
        if step % 5 == 0:
            loop.scheduler.check_integrity()
    loop.run()
    assert Counter(rid for rid, told in loop.outputs.items() for o in told if o.finish_reason) == Counter(list(sent))
    for rid, message in sent.items():
        expected, ids = loop.worker.expected(message), loop.ids(rid)
        assert ids == expected or (rid in aborted and ids == expected[: len(ids)])
    assert all(part.stats.finished_requests for part in loop.parts)
    assert loop.scheduler.stats.finished_requests == len(sent) and loop.scheduler.idle
    loop.scheduler.check_integrity()


def two_parts() -> PartedLoop:
    return PartedLoop(config(max_req_len=MAX_LEN, max_running_requests=16), layout([None]), [400], 2)


def test_a_prefix_goes_where_it_is_cached() -> None:
    """And another prompt to the part with fewer requests."""
    loop = two_parts()
    prompt = list(range(1, MIN_CACHED_TOKENS + 4))
    loop.run([request("a", prompt)])
    loop.turn([request("b", [40, 41, 42], params={"ignore_eos": True})])
    assert [part.num_live for part in loop.parts] == [1, 0], "both had none: the first one has it"
    loop.turn([request("c", [7, *prompt], params={"ignore_eos": True})])
    assert [part.num_live for part in loop.parts] == [1, 1]
    loop.turn([request("d", prompt, params={"ignore_eos": True})])
    assert [part.num_live for part in loop.parts] == [2, 1]
    loop.run()
    assert loop.outputs["d"][0].cached_tokens >= MIN_CACHED_TOKENS
    assert loop.scheduler.stats.prompt_tokens == sum(part.stats.prompt_tokens for part in loop.parts)


def test_a_busy_part_gives_up_its_prefix() -> None:
    loop = two_parts()
    prompt = list(range(1, MIN_CACHED_TOKENS + 4))
    loop.run([request("a", prompt)])
    loop.turn([request(f"r{i}", [*prompt, i], params={"ignore_eos": True}) for i in range(12)])
    assert [part.num_live for part in loop.parts] == [10, 2], "it is ahead by eight at most when it gets one"
    loop.run()


def test_one_answer_to_what_is_for_all() -> None:
    loop = two_parts()
    loop.turn([request("a", [1, 2, 3], 30), request("b", [4, 5, 6], 30)])
    assert [part.num_live for part in loop.parts] == [1, 1]
    [refused] = loop.scheduler.receive([request("b", [9])])
    assert refused.finish_reason is not None and "running already" in str(refused.finish_reason.message)
    [flushed] = loop.scheduler.receive([FlushCache("f")])
    assert isinstance(flushed, FlushCacheDone) and not flushed.success
    ended = loop.scheduler.receive([AbortRequest(None)])
    assert sorted(output.rid for output in ended) == ["a", "b"]
    [flushed] = loop.scheduler.receive([FlushCache("g")])
    assert isinstance(flushed, FlushCacheDone) and flushed.success
    assert all(not part.memory.cache.num_pages(0) for part in loop.parts)


def test_masks_of_own_rows() -> None:
    masks = TokenMasks([1, 4, 5, 9], np.arange(8, dtype=np.int32).reshape(4, 2))
    own = OwnRows(1, 4).masks(masks)
    assert own.rows == [0, 1] and own.words.tolist() == [[2, 3], [4, 5]]
    assert OwnRows(3, 4).masks(masks).rows == []
