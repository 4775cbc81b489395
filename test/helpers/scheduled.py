"""The scheduler's loop over a stub of the model that checks every page and state it is given, and requests for it."""

import random
from collections import deque
from dataclasses import replace

from made_requests import generate_request

from rtp_llm.srt.cache.spec import CacheGroup, CacheLayout, CacheSpec, LengthScaling, StateGroup, StateSpec, StateTensor
from rtp_llm.srt.messages import GenerateRequest, TokenOutput
from rtp_llm.srt.plan import Admission, RowResult, RowWork, StateAccess, StepPlan, StepResult, TokenLogprob
from rtp_llm.srt.request_spec import PromptMedia
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.scheduler.config import SchedulerConfig
from rtp_llm.srt.scheduler.scheduler import Scheduler

EOS = 0
STATES = StateGroup(((99, StateSpec((StateTensor("all", (1,), "float32"),))),))


def layout(
    windows: list[int | None],
    page_size: int | list[int] = 1,
    scaling: LengthScaling | None = None,
    states: bool = False,
) -> CacheLayout:
    """``page_size``: of all groups, or of each. ``states``: a layer keeps one."""
    page_sizes = page_size if isinstance(page_size, list) else [page_size] * len(windows)
    groups = tuple(
        CacheGroup(CacheSpec(1, 8, 8, "float32", window=window), (layer,), size)
        for layer, (window, size) in enumerate(zip(windows, page_sizes, strict=True))
    )
    return CacheLayout(groups, scaling, STATES if states else None)


class StubWorker:
    """Keeps page tables and page contents as a worker would, and draws tokens that depend on all tokens before.

    Every cached token is stored with its whole history: a wrong, stale or overwritten page shows at once. So does a
    state slot, which has the history of all tokens before a position.
    """

    def __init__(self, cache_layout: CacheLayout, vocab_size: int = 50, eos_rate: int = 11) -> None:
        self.groups = cache_layout.groups
        self.states: dict[int, tuple] | None = {0: ()} if cache_layout.states else None  # by slot
        self.vocab_size = vocab_size
        self.eos_rate = eos_rate
        self.rows: dict[int, tuple] = {}  # row -> (admission, ids)
        self.tables: list[dict[tuple[int, int], int]] = [{} for _ in self.groups]
        self.slots: list[dict[int, tuple]] = [{} for _ in self.groups]
        self.computed_tokens = 0
        self.num_shared = 0  # prefixes

    def next_token(self, history: tuple, stop_ids: list[int], banned: bool) -> int:
        value = hash(history) % 1_000_003
        if not banned and value % self.eos_rate == 0 and stop_ids:
            return stop_ids[0]
        return 1 + value % (self.vocab_size - 1)

    def execute(self, plan: StepPlan) -> StepResult:
        for row in plan.releases:
            del self.rows[row]
        for admission in plan.admissions:
            assert admission.row not in self.rows, "a row was given twice"
            self.rows[admission.row] = (admission, [*admission.prompt_ids, *admission.output_ids])
        for write in plan.page_writes:
            for i, page in enumerate(write.page_ids):
                self.tables[write.group][write.row, write.start + i] = page
        for new in plan.new_pages:
            for row, place, page in zip(new.rows, new.places, new.page_ids, strict=True):
                self.tables[new.group][row, place] = page
        self.check_shared(plan)
        if self.states is not None:
            self.run_states(plan, self.states)
        return StepResult(plan.step_id, [self.compute(work) for work in plan.work])

    def run_states(self, plan: StepPlan, states: dict[int, tuple]) -> None:
        """All rows load, then all store: what a plan stores to, no other row of it reads."""
        access_of = {access.row: access for access in plan.states}
        assert len(access_of) == len(plan.states), "a row has two accesses"
        assert set(access_of) <= {work.row for work in plan.work}, "an access without work"
        stored: list[tuple[int, tuple]] = []
        loaded = {self.loaded(work.row, access_of): work.row for work in plan.work}
        for work in plan.work:
            admission, ids = self.rows[work.row]
            keys, _ = media_of(admission)
            known, own = tuple(keys + ids[len(keys) :]), admission.state_slot
            access = access_of.get(work.row, StateAccess(work.row, own))
            assert states.get(access.load) == known[: work.start], f"wrong states in slot {access.load}"
            positions = [position for position, _ in access.saves]
            assert positions == sorted(set(positions))
            assert all(work.start < position <= work.start + work.num_tokens for position in positions)
            for position, slot in [*access.saves, (work.start + work.num_tokens, own)]:
                stored.append((slot, known[:position]))
                assert loaded.get(slot, work.row) == work.row, "a slot is stored to that another row loads"
        assert len({slot for slot, _ in stored}) == len(stored), "a slot is stored to twice"
        assert all(slot > 0 for slot, _ in stored), "the states of no tokens were written"
        states.update(stored)

    def loaded(self, row: int, access_of: dict[int, StateAccess]) -> int:
        return access_of[row].load if row in access_of else self.rows[row][0].state_slot

    def check_shared(self, plan: StepPlan) -> None:
        """Rows that see a shared prefix wholly have it in the same pages; prefixes nest in the plan's order."""
        work = {w.row: w for w in plan.work}
        covered: dict[int, int] = {}
        for prefix in plan.shared_prefixes:
            assert len(prefix.rows) == len(set(prefix.rows)) > 1
            (begin,) = {covered.get(row, 0) for row in prefix.rows}
            assert begin < prefix.num_tokens
            covered.update(dict.fromkeys(prefix.rows, prefix.num_tokens))
            assert all(work[row].num_tokens == 1 and prefix.num_tokens <= work[row].start for row in prefix.rows)
            for g, group in enumerate(self.groups):
                if group.window and max(work[row].start for row in prefix.rows) - group.window + 1 > begin:
                    continue
                for position in range(begin, prefix.num_tokens):
                    assert len({self.slot(g, row, position) for row in prefix.rows}) == 1, "not the same page"
            self.num_shared += 1

    def compute(self, work) -> RowResult:
        admission, ids = self.rows[work.row]
        keys, blocks = media_of(admission)
        known = keys + ids[len(keys) :]
        end = work.start + work.num_tokens
        assert not any(first < cut <= last for first, last in blocks for cut in (work.start, end)), "a block was cut"

        def content(position: int) -> tuple:
            """What a token's cached values depend on: all tokens before it, and the block that it belongs to."""
            last = next((last for first, last in blocks if first <= position <= last), position)
            return tuple(known[: last + 1])

        result = RowResult()
        for position in range(work.start, end):
            assert position < len(ids), "a token was to be computed that nobody has drawn"
            self.computed_tokens += 1
            for g, group in enumerate(self.groups):
                self.store(g, work.row, position, content(position))
                low = 0 if group.window is None else max(0, position - group.window + 1)
                for seen in range(low, position):
                    assert self.load(g, work.row, seen) == content(seen), f"wrong page for token {seen}"
            if (
                admission.logprob_from is not None
                and admission.logprob_from <= position < len(admission.prompt_ids) - 1
            ):
                result.prompt_logprobs.append(TokenLogprob(admission.prompt_ids[position + 1], -1.0 * position))
        if work.sample:
            assert work.start + work.num_tokens == len(ids)
            banned = len(ids) - len(admission.prompt_ids) < admission.spec.params.min_new_tokens
            token = self.next_token(tuple(known), admission.spec.stop_ids, banned)
            ids.append(token)
            result.token_ids = [token]
        return result

    def slot(self, g: int, row: int, position: int) -> int:
        page_size = self.groups[g].page_size
        page = self.tables[g][row, position // page_size]
        assert page > 0, "the dummy page was used"
        return page * page_size + position % page_size

    def store(self, g: int, row: int, position: int, history: tuple) -> None:
        self.slots[g][self.slot(g, row, position)] = history

    def load(self, g: int, row: int, position: int) -> tuple | None:
        return self.slots[g].get(self.slot(g, row, position))

    def expected(self, request: GenerateRequest) -> list[int]:
        """What a lone request must give."""
        ids, params = (
            [*(request.spec.media.cache_keys if request.spec.media else request.prompt_ids)],
            request.spec.params,
        )
        stop_ids = [*([] if params.ignore_eos else [EOS]), *params.stop_token_ids]
        output: list[int] = []
        while len(output) < params.max_new_tokens:
            token = self.next_token(tuple(ids), stop_ids, len(output) < params.min_new_tokens)
            ids.append(token)
            output.append(token)
            if token in stop_ids and len(output) > params.min_new_tokens:
                break
        return output


class QuickWorker(StubWorker):
    """Checks states only: with long prompts, looking at all pages that each token sees takes too long."""

    def compute(self, work: RowWork) -> RowResult:
        admission, ids = self.rows[work.row]
        self.computed_tokens += work.num_tokens
        if not work.sample:
            return RowResult()
        ids.append(self.next_token(tuple(ids), admission.spec.stop_ids, banned=False))
        return RowResult([ids[-1]])


def media_of(admission: Admission) -> tuple[list[int], list[list[int]]]:
    """The keys of a prompt, and the blocks that see themselves both ways."""
    media = admission.spec.media
    return (admission.prompt_ids, []) if media is None else (media.cache_keys, media.blocks)


class Loop:
    """The core's loop over a stub worker; with a ``depth`` each step is executed only when its result is asked for."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache_layout: CacheLayout,
        num_pages: list[int],
        depth: int = 0,
        num_state_slots: int = 0,
    ) -> None:
        self.scheduler = Scheduler(config, cache_layout, num_pages, num_state_slots)
        self.worker = StubWorker(cache_layout)
        self.depth = depth
        self.in_flight: deque = deque()
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.plans: list[StepPlan] = []

    def take(self, outputs: list) -> None:
        for output in outputs:
            if isinstance(output, TokenOutput):
                seen = self.outputs.setdefault(output.rid, [])
                assert not (seen and seen[-1].finish_reason), f"{output.rid} was heard of after its end"
                seen.append(output)

    def turn(self, messages: list = ()) -> None:
        self.take(self.scheduler.receive(list(messages)))
        plan = self.scheduler.plan()
        if plan is not None:
            self.plans.append(plan)
            self.in_flight.append((plan, self.read_pages(plan)))
        while len(self.in_flight) > self.depth:
            self.commit()
        if plan is None and self.in_flight:
            self.commit()

    def commit(self) -> None:
        due, read = self.in_flight.popleft()
        for pages, allocator in zip(read, self.scheduler.memory.allocators, strict=True):
            assert pages <= allocator.used_pages(), "a page was freed that a step in flight reads"
        self.take(self.scheduler.commit(self.worker.execute(due)))

    def read_pages(self, plan: StepPlan) -> list[set[int]]:
        """Per group, the pages that a plan's tokens can see."""
        requests = {r.row: r for r in self.scheduler.running}
        read: list[set[int]] = [set() for _ in self.worker.groups]
        for work in plan.work:
            for g, group in enumerate(self.worker.groups):
                low = 0 if group.window is None else max(0, work.start - group.window + 1)
                read[g].update(requests[work.row].pages[g][low // group.page_size :])
        return read

    def run(self, messages: list = (), limit: int = 30_000) -> None:
        self.turn(messages)
        for _ in range(limit):
            if self.scheduler.idle:
                return
            self.turn()
        raise AssertionError("requests starve")

    def ids(self, rid: str) -> list[int]:
        return [token for output in self.outputs[rid] for token in output.token_ids]

    def check_empty(self) -> None:
        self.scheduler.check_integrity()
        assert not self.scheduler.running and not len(self.scheduler.waiting)
        self.scheduler.memory.cache.reset()
        assert all(allocator.num_used == 0 for allocator in self.scheduler.memory.allocators), "a page leaked"
        assert not self.scheduler.memory.checkpoints.slots.num_used, "a state slot leaked"


def request(rid: str, prompt: list[int], max_new_tokens: int = 8, **kwargs) -> GenerateRequest:
    params = SamplingParams(max_new_tokens=max_new_tokens, **kwargs.pop("params", {}))
    return generate_request(rid, prompt, params, **{"eos_token_ids": (EOS,), **kwargs})


def config(**kwargs) -> SchedulerConfig:
    return SchedulerConfig(**{"max_req_len": 100, "max_running_requests": 64, **kwargs})


IMAGE = 7  # the id of every placeholder


def with_image(message: GenerateRequest, first: int, keys: list[int], block: bool = True) -> GenerateRequest:
    """Its prompt with an image at ``first``, whose placeholders have these keys."""
    ids = message.prompt_ids
    message.prompt_ids = [*ids[:first], *[IMAGE] * len(keys), *ids[first:]]
    cache_keys = [*ids[:first], *keys, *ids[first:]]
    blocks = [(first, first + len(keys) - 1)] if block else []
    return replace(message, spec=replace(message.spec, media=PromptMedia(b"", cache_keys, blocks)))


MAX_BLOCK = 9


def random_request(rng: random.Random, rid: str, max_len: int) -> GenerateRequest:
    base = (
        [rng.randrange(1, 4)] * rng.randrange(1, 10)
        if rng.random() < 0.5
        else list(range(10, 10 + rng.randrange(1, 30)))
    )
    prompt = (base + [rng.randrange(1, 50) for _ in range(rng.randrange(0, 12))])[: max_len - 1]
    max_new = rng.randrange(0, max_len - len(prompt) + 1) if rng.random() < 0.9 else 1
    message = request(
        rid,
        prompt,
        max_new,
        params={"ignore_eos": rng.random() < 0.5, "min_new_tokens": min(max_new, rng.choice([0, 0, 3]))},
        return_logprob=rng.random() < 0.2,
        logprob_start_len=rng.randrange(0, len(prompt) + 1),
        cache_salt=rng.choice(["", "", "other"]),
    )
    room = max_len - len(prompt) - max_new
    if room > 0 and rng.random() < 0.3:
        first, kind = rng.randrange(len(prompt) + 1), rng.choice([1000, 2000])
        size = rng.randrange(1, min(room, MAX_BLOCK) + 1)
        start = 10 * (kind + size)  # other sizes are other images
        message = with_image(message, first, list(range(start, start + size)), block=kind == 1000)
    return message
