"""The scheduler against a stub of the model: examples, then random traffic with invariants checked at every step."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from scheduled import EOS, MAX_BLOCK, Loop, config, layout, random_request, request, with_image

from rtp_llm.srt.cache.spec import LengthScaling
from rtp_llm.srt.messages import AbortRequest, FlushCache, FlushCacheDone, GenerateRequest, TokenOutput
from rtp_llm.srt.plan import RowResult
from rtp_llm.srt.scheduler import sharing, states
from rtp_llm.srt.scheduler.policy import WaitingQueue
from rtp_llm.srt.scheduler.request import Request


@pytest.mark.parametrize("depth", [0, 1])
def test_a_common_prefix_is_computed_once(depth):
    prefix = list(range(100, 140))
    requests = [request(f"r{i}", [*prefix, 200 + i, 300 + i], 4, params={"ignore_eos": True}) for i in range(32)]
    loop = Loop(config(), layout([None]), [2000], depth)
    loop.run(requests)
    own = sum(len(r.prompt_ids) - len(prefix) for r in requests)
    prompt_tokens = loop.scheduler.stats.computed_tokens - sum(len(loop.ids(r.rid)) - 1 for r in requests)
    wasted = sum(1 for plan in loop.plans for w in plan.work if w.sample) - sum(len(loop.ids(r.rid)) for r in requests)
    assert prompt_tokens - wasted == len(prefix) + own
    assert sum(loop.outputs[r.rid][-1].cached_tokens for r in requests) == 31 * len(prefix)
    loop.check_empty()


def test_equal_prompts_compute_all_but_the_last_token_once():
    prompt = list(range(1, 31))
    loop = Loop(config(), layout([None]), [500])
    loop.run([request(f"r{i}", prompt, 1) for i in range(5)])
    assert loop.scheduler.stats.computed_tokens == 30 + 4
    assert [loop.outputs[f"r{i}"][-1].cached_tokens for i in range(5)] == [0, 29, 29, 29, 29]


def test_unrelated_prompts_do_not_wait_for_each_other():
    loop = Loop(config(), layout([None]), [500])
    loop.turn([request(f"r{i}", [1, 2, *([10 + i] * 20)]) for i in range(5)])
    assert len(loop.plans[0].work) == 5


def test_prompts_are_cut_into_chunks_beside_decoding():
    loop = Loop(config(chunked_prefill_size=16), layout([None]), [500])
    loop.turn([request("short", [1, 2, 3], 30, params={"ignore_eos": True})])
    loop.run([request("long", list(range(10, 60)), 2)])
    chunks = [w.num_tokens for plan in loop.plans for w in plan.work if w.num_tokens > 1]
    assert chunks == [3, 16, 16, 16, 2]
    assert all(any(w.num_tokens == 1 for w in plan.work) for plan in loop.plans[1:5]), "decoding goes on meanwhile"
    loop.check_empty()


def test_without_cutting_a_prompt_longer_than_the_budget_runs_alone():
    loop = Loop(config(chunked_prefill_size=-1, max_prefill_tokens=20), layout([None]), [500])
    loop.run([request("a", [5] * 50, 1), request("b", [6] * 9, 1), request("c", [7] * 9, 1)])
    assert [[w.num_tokens for w in plan.work] for plan in loop.plans] == [[50], [9, 9]]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("windows", [[None], [None, 7], [7]], ids=str)
def test_fifty_requests_with_memory_for_three(windows, depth):
    requests = [request(f"r{i}", [1 + i % 40, 3, 1 + i // 7], 40, params={"ignore_eos": True}) for i in range(50)]
    roomy = Loop(config(), layout(windows), [5000] * len(windows), depth)
    roomy.run(requests)
    tight = Loop(config(chunked_prefill_size=16), layout(windows), [3 * 43] * len(windows), depth)
    tight.run(requests)
    assert all(tight.ids(r.rid) == roomy.ids(r.rid) == tight.worker.expected(r) for r in requests)
    if None in windows:
        assert tight.scheduler.stats.retractions > 0 and roomy.scheduler.stats.retractions == 0
    tight.check_empty()
    roomy.check_empty()


def test_window_pages_are_freed_once_out_of_reach():
    loop = Loop(config(max_req_len=500), layout([None, 8]), [600, 600])
    loop.turn([request("r", [1, 2, 3], 300, params={"ignore_eos": True})])
    for _ in range(200):
        loop.turn()
        # Its reach, and the prompt's node of three tokens while a part of it is within reach.
        memory = loop.scheduler.memory
        assert memory.allocators[1].num_used - memory.cache.evictable_pages(1) <= 7 + 3
    loop.run()
    assert loop.ids("r") == loop.worker.expected(request("r", [1, 2, 3], 300, params={"ignore_eos": True}))
    loop.check_empty()


def test_prompt_logprobs_cap_the_match_and_come_in_order():
    prompt = list(range(1, 41))
    loop = Loop(config(chunked_prefill_size=16), layout([None]), [500])
    loop.run([request("warm", prompt, 2)])
    loop.run([request("r", prompt, 2, return_logprob=True, logprob_start_len=10)])
    logprobs = [entry for output in loop.outputs["r"] for entry in output.prompt_logprobs]
    assert [entry.token_id for entry in logprobs] == prompt[11:]
    assert loop.outputs["r"][-1].cached_tokens == 10


def test_abort_and_flush():
    loop = Loop(config(max_running_requests=1), layout([None]), [500], depth=1)
    loop.turn([request("a", [1, 2], 50, params={"ignore_eos": True}), request("b", [3, 4], 50)])
    (answer,) = loop.scheduler.receive([FlushCache("f")])
    assert isinstance(answer, FlushCacheDone) and not answer.success and "1 requests run and 1 wait" in answer.message
    loop.turn([AbortRequest("a"), AbortRequest("unknown")])
    loop.turn([AbortRequest("b")])
    loop.run()
    for rid in "ab":
        assert loop.outputs[rid][-1].finish_reason.type == "abort"
    loop.check_empty()
    (answer,) = loop.scheduler.receive([FlushCache("f")])
    assert answer.success


def test_what_can_never_be_served_is_refused_at_once():
    loop = Loop(config(max_req_len=20), layout([None]), [20])
    loop.run([request("long", [1] * 15, 6), request("empty", []), request("fits", [1] * 15, 5)])
    assert loop.outputs["long"][-1].finish_reason.status_code == 400
    assert "21 tokens" in loop.outputs["long"][-1].finish_reason.message
    assert "empty" in loop.outputs["empty"][-1].finish_reason.message
    assert loop.outputs["fits"][-1].finish_reason.type in ("stop", "length")


def test_a_prompt_may_fill_everything_if_nothing_new_is_wanted():
    loop = Loop(config(max_req_len=20), layout([None]), [20])
    loop.run([request("r", [1, 2] * 10, 0, return_logprob=True, logprob_start_len=0)])
    assert loop.outputs["r"][-1].finish_reason.type == "length" and loop.ids("r") == []
    assert sum(len(output.prompt_logprobs) for output in loop.outputs["r"]) == 19
    loop.check_empty()


@pytest.mark.parametrize("block", [False, True])
def test_images_share_pages_by_content_not_by_placeholder(block):
    loop = Loop(config(max_media_block=8), layout([None]), [200])
    one, other = list(range(1000, 1008)), list(range(2000, 2008))
    for rid, keys in [("first", one), ("same", one), ("other", other)]:
        loop.run([with_image(request(rid, [1, 2, 3, 4, 5]), 2, keys, block)])
    cached = [loop.outputs[rid][0].cached_tokens for rid in ("first", "same", "other")]
    assert cached == [0, 12, 2]
    assert loop.ids("first") == loop.ids("same") != loop.ids("other")
    assert loop.outputs["other"][0].prompt_tokens == 13
    loop.check_empty()


@pytest.mark.parametrize(("chunk", "ends"), [(4, [4, 5, 13, 17, 18]), (6, [5, 13, 18]), (16, [16, 18]), (-1, [18])])
def test_a_block_is_never_cut(chunk, ends):
    """It waits for the next step if it does not fit into this one's budget, and exceeds the budget if it must."""
    loop = Loop(config(chunked_prefill_size=chunk, max_media_block=8), layout([None, 3]), [100, 100])
    loop.run([with_image(request("r", list(range(11, 21)), 1), 5, list(range(1000, 1008)))])
    assert [work.start + work.num_tokens for plan in loop.plans for work in plan.work] == ends
    loop.check_empty()


def test_a_match_ends_before_a_block_or_after_it():
    """Whole pages are cached, and so only a part of the block."""
    loop = Loop(config(max_media_block=8), layout([None], page_size=4), [20])
    keys = list(range(1000, 1008))
    for rid in ("first", "second"):
        loop.run([with_image(request(rid, [1, 2, 3, 4, 5], 1), 5, keys)])
    assert loop.scheduler.memory.cache.match(("", 0), [1, 2, 3, 4, 5, *keys], 13).num_tokens == 12
    assert loop.outputs["second"][0].cached_tokens == 4
    loop.check_empty()


def test_media_side_by_side_that_are_larger_than_the_models_step_are_refused():
    loop = Loop(config(max_media_block=7), layout([None]), [100])
    loop.run([with_image(request("r", [1, 2]), 1, list(range(1000, 1008)))])
    assert "media side by side take 8 tokens" in loop.outputs["r"][-1].finish_reason.message


def test_a_resubmitted_request_goes_on_where_it_was():
    whole = request("r", [4, 5, 6], 12, params={"ignore_eos": True})
    loop = Loop(config(), layout([None]), [500])
    loop.run([whole])
    for done in (1, 5, 11, 12):
        again = request(f"again{done}", [4, 5, 6], 12, params={"ignore_eos": True}, output_ids=loop.ids("r")[:done])
        loop.run([again])
        assert loop.ids("r")[:done] + loop.ids(again.rid) == loop.ids("r")
        assert loop.outputs[again.rid][-1].finish_reason.length == 12


def test_a_stop_id_within_the_minimum_does_not_end_a_request():
    """Nothing bans it there if no other token is left to draw, or if another core drew it."""
    loop = Loop(config(), layout([None]), [500])
    loop.run([request("r", [4, 5, 6], 3, params={"min_new_tokens": 2}, output_ids=[9, EOS])])
    assert loop.ids("r") and loop.outputs["r"][-1].finish_reason.type in ("stop", "length")


@pytest.mark.parametrize(
    ("params", "last_id", "ends"),
    [
        ({}, EOS, True),
        ({}, 7, True),
        ({}, 9, False),
        ({"stop_token_ids": [9]}, 9, True),
        ({"ignore_eos": True}, 7, False),
        ({"ignore_eos": True, "stop_token_ids": [9]}, 9, True),
    ],
)
def test_what_ends_a_request(params, last_id, ends):
    loop = Loop(config(), layout([None]), [500])
    loop.run([request("r", [4, 5, 6], 3, params=params, output_ids=[last_id], eos_token_ids=(EOS, 7))])
    assert (loop.outputs["r"][-1].finish_reason.matched == last_id and not loop.ids("r")) == ends


def test_prefixes_are_shared_within_one_salt_only():
    loop = Loop(config(), layout([None]), [500])
    prompt = list(range(1, 31))
    cached = []
    for rid, salt in enumerate(["", "mine", "", "mine", "yours"]):
        loop.run([request(str(rid), prompt, 1, cache_salt=salt)])
        cached.append(loop.outputs[str(rid)][-1].cached_tokens)
    assert cached == [0, 0, 29, 29, 0]
    loop.check_empty()


def test_no_tokens_wanted_computes_the_prompt_only():
    loop = Loop(config(), layout([None]), [500])
    loop.run([request("r", [1, 2, 3], 0, return_logprob=True, logprob_start_len=0)])
    assert loop.ids("r") == [] and loop.outputs["r"][-1].finish_reason.length == 0
    assert sum(len(output.prompt_logprobs) for output in loop.outputs["r"]) == 2
    loop.check_empty()


def test_the_oldest_request_is_never_retracted():
    loop = Loop(config(), layout([None]), [60])
    loop.run([request(f"r{i}", [i + 1] * 4, 40, params={"ignore_eos": True}) for i in range(5)])
    assert loop.scheduler.stats.retractions > 0
    assert loop.outputs["r0"][-1].num_retractions == 0
    loop.check_empty()


def test_priorities_then_arrival_decide_who_is_admitted():
    """And a running request gives way to nobody."""
    loop = Loop(config(max_running_requests=1, schedule_policy="priority"), layout([None]), [2000])
    loop.turn([request("running", [1, 2], 9, params={"ignore_eos": True}, priority=9)])
    priorities = {"a": 3, "b": -2, "c": 0, "d": -2, "e": 3}
    loop.run([request(rid, [10 + i] * 5, 2, priority=p) for i, (rid, p) in enumerate(priorities.items())])
    admitted = [admission.rid for plan in loop.plans for admission in plan.admissions]
    assert admitted == ["running", "b", "d", "c", "a", "e"]
    loop.check_empty()


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_other_policies_do_not_look_at_priorities(policy):
    loop = Loop(config(max_running_requests=1, schedule_policy=policy), layout([None]), [2000])
    loop.run([request(f"r{i}", [10 + i] * 5, 2, priority=-i) for i in range(4)])
    assert [admission.rid for plan in loop.plans for admission in plan.admissions] == ["r0", "r1", "r2", "r3"]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_least_urgent_request_is_retracted(policy, depth):
    """Among several, the latest; by arrival alone under other policies. It loses nothing."""
    loop = Loop(config(schedule_policy=policy), layout([None]), [90], depth)
    forty = {"max_new_tokens": 40, "params": {"ignore_eos": True}}
    requests = [request(f"r{i}", [10 + i] * 10, priority=p, **forty) for i, p in enumerate([5, 0, 5, -1])]
    loop.run(requests)
    order = ["r2", "r0", "r1", "r3"] if policy == "priority" else ["r3", "r2", "r1", "r0"]
    counts = [loop.outputs[rid][-1].num_retractions for rid in order]
    assert counts[0] > 0 and counts[-1] == 0 and counts == sorted(counts, reverse=True)
    for each in requests:
        assert loop.ids(each.rid) == loop.worker.expected(each)
    loop.check_empty()


def test_an_urgent_request_overtakes_one_that_was_retracted():
    queue = WaitingQueue("priority", lambda r: 0)
    requests = [
        Request.from_message(request(rid, [1], priority=p), order)
        for order, (rid, p) in enumerate([("late", 2), ("urgent", 1), ("latest", 2)])
    ]
    for item in reversed(requests):
        queue.add(item)
    assert [r.rid for r in queue.candidates()] == ["urgent", "late", "latest"]
    queue.admitted(requests[1])
    assert [r.overtaken for r in requests] == [0, 0, 0], "there is no bound: nobody counts"


def test_a_retracted_request_gets_its_place_by_arrival_back():
    queue = WaitingQueue("fcfs", lambda r: 0)
    early, middle, late = (Request.from_message(request(rid, [1], 1), order) for order, rid in enumerate("abc"))
    for waiting in (middle, late, early):
        queue.add(waiting)
    assert queue.candidates() == [early, middle, late]


def test_longest_prefix_first_without_starvation():
    loop = Loop(config(max_running_requests=1, schedule_policy="lpm"), layout([None]), [2000])
    cached = list(range(1, 31))
    loop.run([request("warm", cached, 1)])
    loop.turn([request("running", [90, 91], 3, params={"ignore_eos": True})])
    loop.turn([request("cold", [70, 71, 72], 1), request("hot", [*cached, 5], 1)])
    loop.run()
    assert list(loop.outputs) == ["warm", "running", "hot", "cold"]
    # A stream of hot requests does not keep the cold one waiting for ever.
    loop.turn([request("victim", [60, 61, 62], 1)] + [request(f"h{i}", [*cached, 6 + i], 1) for i in range(100)])
    loop.run()
    assert list(loop.outputs).index("victim") < list(loop.outputs).index("h99")


def test_length_dependent_keys_are_not_mixed():
    scaling = LengthScaling(original_len=20, per_length=True)
    loop = Loop(config(), layout([None], scaling=scaling), [2000])
    short, long_a = list(range(1, 16)), list(range(1, 31))
    loop.run([request("short", short, 10, params={"ignore_eos": True})])
    loop.run([request("long", long_a, 2), request("same", long_a, 2)])
    loop.run([request("longer", [*long_a, 7], 2)])
    loop.run([request("short2", [*short, *loop.ids("short")][:20], 1)])
    cached = {rid: outputs[-1].cached_tokens for rid, outputs in loop.outputs.items()}
    assert cached == {"short": 0, "long": 0, "same": 29, "longer": 0, "short2": 19}


def test_shared_prefixes_are_told_to_back_ends_that_use_them():
    prefix = list(range(1, 301))
    loop = Loop(config(share_prefixes=True, max_req_len=400), layout([None]), [2000])
    requests = [request(f"r{i}", [*prefix, 40 + i, 50, 60], 9, params={"ignore_eos": True}) for i in range(4)]
    loop.run(requests)
    shared = [(s.num_tokens, len(s.rows)) for s in loop.plans[-2].shared_prefixes]
    assert shared == [(300, 4)] or shared == [(300, 3)]
    assert loop.scheduler.stats.shared_tokens >= 2 * 300 * 7
    assert loop.worker.num_shared > 0
    assert loop.plans[-2].shared_prefixes is loop.plans[-3].shared_prefixes  # nothing has changed between the two


def test_without_prefix_cache_nothing_is_reused():
    loop = Loop(config(disable_radix_cache=True), layout([None]), [500])
    loop.run([request("a", [1, 2, 3, 4], 3), request("b", [1, 2, 3, 4], 3)])
    assert loop.ids("a") == loop.ids("b") and loop.outputs["b"][-1].cached_tokens == 0
    loop.check_empty()


def test_a_failed_row_ends_alone():
    loop = Loop(config(), layout([None]), [500])
    loop.take(loop.scheduler.receive([request("bad", [1, 2], 5), request("good", [3, 4], 5)]))
    plan = loop.scheduler.plan()
    result = loop.worker.execute(plan)
    result.rows[0] = RowResult(error="not finite")
    loop.take(loop.scheduler.commit(result))
    loop.run()
    assert loop.outputs["bad"][-1].finish_reason.to_dict() == {
        "type": "abort",
        "message": "not finite",
        "status_code": 500,
    }
    assert loop.ids("good") == loop.worker.expected(request("good", [3, 4], 5))
    loop.check_empty()


@pytest.mark.parametrize(
    ("seed", "num_steps"), [(0, 100), *(pytest.param(seed, 400, marks=pytest.mark.slow) for seed in range(12))]
)
@pytest.mark.parametrize("depth", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("windows", "page_size", "options"),
    [
        ([None], 1, {}),
        ([None], 4, {"chunked_prefill_size": 7}),
        ([None, 6], 1, {"chunked_prefill_size": 16, "schedule_policy": "lpm"}),
        ([None, 6], 1, {"chunked_prefill_size": 16, "schedule_policy": "priority"}),
        ([9, None, 5], 1, {"chunked_prefill_size": 5}),
        ([6], 2, {"chunked_prefill_size": -1, "max_prefill_tokens": 30}),
        ([None, 7], 1, {"disable_radix_cache": True, "chunked_prefill_size": 16}),
        ([None, 6], [4, 1], {"chunked_prefill_size": 7}),
        ([5, None], [2, 3], {"chunked_prefill_size": 16, "schedule_policy": "lpm"}),
        ([None, 6], [1, 4], {"disable_radix_cache": True, "chunked_prefill_size": 5}),
        ([None, 1], 1, {"max_running_requests": 3}),
        ([None], 1, {"states": True, "chunked_prefill_size": 7}),
        ([], 1, {"states": True, "schedule_policy": "lpm"}),
        ([None, 6], 1, {"states": True, "chunked_prefill_size": 16}),
        ([6, None], [4, 2], {"states": True, "chunked_prefill_size": -1, "max_prefill_tokens": 30}),
        ([None, 6], 1, {"states": True, "disable_radix_cache": True}),
        ([None], 1, {"chunked_prefill_size": 8, "scaling": LengthScaling(12, per_length=True)}),
        ([None, 6], 1, {"chunked_prefill_size": 8, "scaling": LengthScaling(12, per_length=False)}),
    ],
    ids=str,
)
def test_random_traffic(windows, page_size, options, depth, seed, num_steps, monkeypatch):
    """Random arrivals, aborts, lengths and budgets: every request ends exactly once, with its own tokens.

    With a depth of two, workers are in three stages.
    """
    rng = random.Random(seed)
    monkeypatch.setattr(sharing, "MIN_PREFIX_TOKENS", rng.choice([1, 4]))
    monkeypatch.setattr(states, "STATE_UNIT", rng.choice([1, 3, 8]))
    monkeypatch.setattr(states, "MIN_SAVED_TOKENS", rng.choice([1, 5]))
    options = dict(options)
    cache_layout = layout(windows, page_size, options.pop("scaling", None), options.pop("states", False))
    max_len = 60
    num_pages = [-(-rng.choice([70, 90, 200]) // group.page_size) for group in cache_layout.groups]
    interval = rng.choice([None, 0, 4, 20])
    options = {"max_running_requests": 12, "max_media_block": MAX_BLOCK, "share_prefixes": True, **options}
    options["num_stages"] = 3 if depth == 2 else 1
    loop_config = config(max_req_len=max_len, state_checkpoint_interval=interval, **options)
    loop = Loop(loop_config, cache_layout, num_pages, depth, num_state_slots=12 + rng.choice([1, 3, 40]))
    sent: dict[str, GenerateRequest] = {}
    aborted: set[str] = set()
    for step in range(num_steps):
        messages: list = []
        for _ in range(rng.choice([0, 0, 0, 1, 1, 4])):
            new = random_request(rng, f"r{len(sent)}", max_len)
            if options.get("schedule_policy") == "priority":
                new.spec = replace(new.spec, priority=rng.randrange(-2, 3))
            sent[new.rid] = new
            messages.append(new)
        if sent and rng.random() < 0.1:
            rid = rng.choice(list(sent))
            aborted.add(rid)
            messages.append(AbortRequest(rid))
        loop.turn(messages)
        if step % 5 == 0:
            loop.scheduler.check_integrity()
    loop.run()
    endings = Counter(rid for rid, outputs in loop.outputs.items() for o in outputs if o.finish_reason)
    assert endings == Counter(dict.fromkeys(sent, 1))
    for rid, message in sent.items():
        reason, expected = loop.outputs[rid][-1].finish_reason, loop.worker.expected(message)
        if reason.type == "abort":
            assert rid in aborted and loop.ids(rid) == expected[: len(loop.ids(rid))]
        else:
            assert loop.ids(rid) == expected
            check_logprobs(message, loop.outputs[rid])
    assert loop.scheduler.stats.finished_requests == len(sent)
    loop.check_empty()


def test_stages_have_shares_of_the_requests() -> None:
    """Of seven requests in three stages a step has three at most, and steps in flight have different ones."""
    loop = Loop(config(num_stages=3), layout([None]), [500], depth=2)
    requests = [request(f"r{i}", [1 + i, 2, 3], 30, params={"ignore_eos": True}) for i in range(7)]
    loop.run(requests)
    assert all(loop.ids(r.rid) == loop.worker.expected(r) for r in requests)
    rows = [[work.row for work in plan.work] for plan in loop.plans[6:60]]
    assert sorted(len(of_step) for of_step in rows) == [1] * 18 + [3] * 36
    assert all(len({*one, *two, *three}) == 7 for one, two, three in zip(rows, rows[1:], rows[2:], strict=False))
    loop.check_empty()


def check_logprobs(message: GenerateRequest, outputs: list[TokenOutput]) -> None:
    got = [entry.token_id for output in outputs for entry in output.prompt_logprobs]
    asked = message.spec.logprobs
    wanted = [] if asked is None else message.prompt_ids[asked.logprob_start_len + 1 :]
    assert got == wanted
