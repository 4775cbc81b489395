"""How recurrent states are kept for later requests: which tokens of which requests are computed again, if any."""

import random

import pytest
from scheduled import Loop, QuickWorker, config, layout, request

from rtp_llm.srt.messages import AbortRequest, FlushCache
from rtp_llm.srt.plan import RowResult
from rtp_llm.srt.scheduler import states

NEVER_ENDS = {"ignore_eos": True}
Prompts = list[list[int]]


def make_loop(
    windows: tuple[int | None, ...] = (None,),
    num_slots: int = 200,
    depth: int = 0,
    page_size: int = 1,
    num_tokens: int = 30_000,
    **options,
) -> Loop:
    """A loop with room for ``num_tokens`` in pages; ``num_slots`` are those of states."""
    options = {"max_req_len": 4000, "max_running_requests": min(64, num_slots - 1)} | options
    cache_layout = layout(list(windows), page_size, states=True)
    loop = Loop(config(**options), cache_layout, [num_tokens // page_size] * len(windows), depth, num_slots)
    loop.worker = QuickWorker(cache_layout)
    return loop


def cached(loop: Loop, rid: str) -> int:
    return loop.outputs[rid][-1].cached_tokens


def draw_ids(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(1, 50) for _ in range(count)]


def alike(common: int, seed: int = 0, count: int = 64) -> Prompts:
    """Prompts that share ``common`` tokens, and differ in all later ones, of which there are 20 to 300."""
    draw = random.Random(seed)
    prefix = draw_ids(draw, common)
    return [[*prefix, 100 + i, *draw_ids(draw, draw.randrange(20, 300))] for i in range(count)]


def run_in_order(loop: Loop, prompts: Prompts, order: str) -> None:
    requests = [request(f"r{i}", prompt, 2, params=NEVER_ENDS) for i, prompt in enumerate(prompts)]
    if order == "one by one":
        for each in requests:
            loop.run([each])
    elif order == "at once":
        loop.run(requests)
    else:
        for each in requests:  # a new one with every step
            loop.turn([each])
        loop.run()


@pytest.mark.parametrize("order", ["one by one", "at once", "one a step"])
@pytest.mark.parametrize(("common", "depth"), [(2000, 0), (2000, 1), (2001, 1), (2100, 0), (2777, 1)])
def test_a_common_prefix_is_computed_once(order: str, common: int, depth: int) -> None:
    """Wherever it ends, at least 62 of 64 requests find all of it but a few tokens, not worth a checkpoint."""
    loop = make_loop(depth=depth)
    run_in_order(loop, alike(common), order)
    found = [cached(loop, f"r{i}") for i in range(64)]
    assert sum(common - states.STATE_UNIT < tokens <= common for tokens in found) >= 62, found
    loop.check_empty()


def test_a_moved_boundary_is_found_again() -> None:
    """Prompts whose common part ends elsewhere than that of the prompts before them."""
    loop = make_loop()
    for n, common in enumerate((2000, 2001, 2100, 1223)):
        run_in_order(loop, [[*prompt[:common], 200 + n, *prompt[common:]] for prompt in alike(2200)], "one by one")
        found = [cached(loop, f"r{i}") for i in range(64)]
        assert sum(tokens > common - states.STATE_UNIT for tokens in found) >= 62, found
        loop.outputs.clear()


def test_equal_prompts_are_computed_once() -> None:
    prompt = alike(700)[0]
    loop = make_loop()
    loop.run([request(f"r{i}", prompt, 2) for i in range(9)])
    last = (len(prompt) - 1) // states.STATE_UNIT * states.STATE_UNIT
    first, *others = sorted(cached(loop, f"r{i}") for i in range(9))
    assert first == 0 and all(last <= tokens < len(prompt) for tokens in others)


@pytest.mark.parametrize("windows", [(None,), (), (None, 50)], ids=str)
@pytest.mark.parametrize("depth", [0, 1])
def test_a_chat_computes_each_token_once(windows: tuple[int | None, ...], depth: int) -> None:
    draw = random.Random(1)
    loop = make_loop(windows, num_slots=6, max_running_requests=4, depth=depth)
    ids: list[int] = []
    for turn in range(10):
        ids = [*ids, *draw_ids(draw, draw.choice([5, 40, 300]))]
        known = len(ids)
        loop.run([request(f"turn{turn}", ids, 30, params=NEVER_ENDS)])
        ids = [*ids, *loop.ids(f"turn{turn}")]
        assert len(ids) == known + 30
    assert loop.scheduler.stats.computed_tokens == len(ids) - 1, "the last token is never computed"
    loop.check_empty()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("windows", [(None,), (), (None, 7)], ids=str)
@pytest.mark.parametrize("num_slots", [2, 3])
def test_fifty_requests_with_slots_for_three(num_slots: int, windows: tuple[int | None, ...], depth: int) -> None:
    """Some share a prefix; all end, with their own tokens."""
    draw = random.Random(2)
    prefix = draw_ids(draw, 40)
    prompts = [[*prefix[: draw.choice([0, 35, 40])], *draw_ids(draw, draw.randrange(1, 80))] for _ in range(50)]
    requests = [request(f"r{i}", prompt, 10, params=NEVER_ENDS) for i, prompt in enumerate(prompts)]
    options = {"max_running_requests": num_slots - 1, "chunked_prefill_size": 64}
    loop = make_loop(windows, num_slots, depth, num_tokens=2000, **options)
    loop.run(requests)
    assert all(loop.ids(each.rid) == loop.worker.expected(each) for each in requests)
    loop.check_empty()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_retracted_request_resumes_where_it_was(depth: int) -> None:
    cache_layout = layout([None], states=True)
    loop = Loop(config(chunked_prefill_size=16), cache_layout, [150], depth, num_state_slots=20)
    requests = [request(f"r{i}", [1 + i, 2, 3 + i], 60, params=NEVER_ENDS) for i in range(4)]
    loop.run(requests)
    assert loop.scheduler.stats.retractions > 0
    assert all(loop.ids(each.rid) == loop.worker.expected(each) for each in requests)
    loop.check_empty()


def test_a_long_prompt_is_kept_at_intervals() -> None:
    prompt = draw_ids(random.Random(3), 3000)
    loop = make_loop(state_checkpoint_interval=500)  # 512, in units of 64
    loop.run([request("long", prompt, 1)])
    for cut in (511, 600, 1024, 2900):
        loop.run([request("part", [*prompt[:cut], 99, 98], 1)])
        assert cached(loop, "part") == cut // 512 * 512, cut
        loop.outputs.clear()


def test_one_prompt_does_not_evict_all_others() -> None:
    draw = random.Random(4)
    loop = make_loop(num_slots=24, max_running_requests=4, state_checkpoint_interval=64)
    short = draw_ids(draw, 100)
    loop.run([request("short", short, 1)])
    loop.run([request("long", draw_ids(draw, 3900), 1)])
    loop.run([request("again", [*short[:70], 99], 1)])
    assert cached(loop, "again") == 64
    loop.check_empty()


def test_a_common_prefix_that_is_used_stays() -> None:
    """Other prompts take what is left, however many they are."""
    draw = random.Random(5)
    loop = make_loop(num_slots=6, max_running_requests=2)
    prompts = alike(320, count=30)
    for i, prompt in enumerate(prompts):
        loop.run([request(f"r{i}", prompt, 2), request(f"other{i}", draw_ids(draw, 200), 2)])
    assert [cached(loop, f"r{i}") for i in range(30)].count(320) >= 28
    loop.check_empty()


def test_without_a_prefix_cache_a_request_has_its_slot_alone() -> None:
    loop = make_loop(num_slots=2, max_running_requests=2, disable_radix_cache=True)
    run_in_order(loop, alike(300, count=5), "at once")
    assert all(cached(loop, f"r{i}") == 0 for i in range(5))
    loop.check_empty()


def test_states_of_a_failed_row_are_not_kept() -> None:
    loop = make_loop()
    prompt = alike(300)[0]
    loop.take(loop.scheduler.receive([request("bad", prompt, 5)]))
    result = loop.worker.execute(loop.scheduler.plan())
    result.rows[0] = RowResult(error="not finite")
    loop.take(loop.scheduler.commit(result))
    loop.scheduler.check_integrity()
    assert loop.scheduler.memory.checkpoints.slots.num_used == 0
    loop.run([request("good", prompt, 5)])
    assert cached(loop, "good") == 0
    loop.check_empty()


@pytest.mark.parametrize("depth", [0, 1])
def test_an_aborted_request_leaves_what_it_has_computed(depth: int) -> None:
    loop = make_loop(depth=depth, chunked_prefill_size=256)
    prompt = alike(1000)[0]
    loop.turn([request("a", prompt, 5)])
    loop.turn()
    loop.turn([AbortRequest("a")])
    loop.run([request("b", prompt, 5)])
    assert cached(loop, "b") in (512, 768)
    loop.check_empty()


def test_flushing_frees_all_checkpoints() -> None:
    loop = make_loop()
    run_in_order(loop, alike(300, count=3), "at once")
    assert loop.scheduler.memory.checkpoints.slots.num_used > 0
    (answer,) = loop.scheduler.receive([FlushCache("f")])
    assert answer.success and loop.scheduler.memory.checkpoints.slots.num_used == 0


@pytest.mark.parametrize("page_size", [4, 48])
def test_pages_of_several_tokens(page_size: int) -> None:
    """A request resumes from whole pages only, and so do states."""
    loop = make_loop(page_size=page_size)
    run_in_order(loop, alike(1001, count=10), "one by one")
    assert [cached(loop, f"r{i}") % page_size for i in range(10)] == [0] * 10
    assert min(cached(loop, f"r{i}") for i in range(2, 10)) > 1001 - max(states.MIN_SAVED_TOKENS, 4 * page_size)
    loop.check_empty()
