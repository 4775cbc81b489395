"""How memory becomes pages."""

import pytest

from rtp_llm.srt.cache.spec import CacheGroup, CacheSpec, StateGroup, StateSpec, StateTensor
from rtp_llm.srt.engine.capacity import (
    Capacity,
    NotEnoughMemory,
    StateCapacity,
    auto_max_tokens,
    plan_capacity,
    plan_states,
)

FULL = CacheGroup(CacheSpec(2, 16, 16, "float32"), (0, 2))  # 2 * 32 * 4 bytes in two layers: 512 a token
WINDOW = CacheGroup(CacheSpec(2, 16, 16, "float32", window=10), (1,))  # 256 a token


def plan(groups: list[CacheGroup], **kwargs) -> Capacity:
    defaults = dict(
        context_length=1000,
        max_chunk=20,
        budget_bytes=512 * 300,
        max_total_tokens=None,
        auto_tokens=100_000,
        window_ratio=0.5,
    )
    return plan_capacity(groups, **(defaults | kwargs))


def test_memory_is_used_up_but_not_exceeded():
    capacity = plan([FULL])
    assert capacity.num_pages == (300,) and capacity.max_total_tokens == capacity.max_req_len == 300
    capacity = plan([FULL, WINDOW])
    assert capacity.cache_bytes <= 512 * 300 < capacity.cache_bytes + 512 + 256
    assert capacity.num_pages[1] == int(capacity.num_pages[0] * 0.5)


def test_small_models_do_not_fill_the_memory_for_nothing():
    assert plan([FULL], budget_bytes=1 << 40, auto_tokens=5000).num_pages == (5000,)
    assert auto_max_tokens(512, 256) == 1 << 18
    assert auto_max_tokens(131_072, 256) == 1 << 22


def test_a_given_number_of_tokens_is_kept_or_refused():
    assert plan([FULL], max_total_tokens=77).max_total_tokens == 77
    with pytest.raises(NotEnoughMemory, match="max_total_tokens=301 needs"):
        plan([FULL], max_total_tokens=301)


def test_too_little_memory_says_what_to_do():
    with pytest.raises(NotEnoughMemory, match="raise mem_fraction_static"):
        plan([FULL], budget_bytes=100)
    group = CacheGroup(FULL.spec, (0,), page_size=16)
    with pytest.raises(NotEnoughMemory, match="less than a page of 16 tokens"):
        plan([group], max_total_tokens=5)


def test_a_window_group_holds_at_least_a_window_and_a_chunk():
    capacity = plan([FULL, WINDOW], max_total_tokens=40)
    assert capacity.num_pages == (40, 32)
    assert capacity.max_req_len == 40


def test_only_windows_serve_any_length():
    assert plan([WINDOW], max_total_tokens=50).max_req_len == 1000
    assert plan([WINDOW], max_total_tokens=8).max_req_len == 8, "less than its window: it does not slide"


def test_a_prompt_that_is_not_cut_needs_room_for_all_of_it_in_a_window_group_too():
    assert plan([WINDOW], max_total_tokens=50, max_chunk=None).max_req_len == 50
    assert plan([FULL, WINDOW], max_total_tokens=90, max_chunk=None).num_pages == (90, 90)


def test_a_window_and_a_chunk_are_rounded_up_to_pages():
    groups = [CacheGroup(group.spec, group.layer_ids, page_size=16) for group in (FULL, WINDOW)]
    capacity = plan(groups, max_total_tokens=256, max_chunk=7, window_ratio=0.01)
    assert capacity.num_pages == (16, 4)  # 10 + 7 tokens in two pages, and two broken ones
    assert capacity.max_req_len == 256


def test_a_cache_in_which_no_request_fits_is_refused():
    with pytest.raises(NotEnoughMemory, match="holds 1 token, but a request needs two"):
        plan([FULL], max_total_tokens=1)


def test_whole_pages():
    group = CacheGroup(FULL.spec, FULL.layer_ids, page_size=16)
    capacity = plan([group])
    assert capacity.num_pages == (18,) and capacity.max_req_len == 18 * 16


STATES = StateGroup(((0, StateSpec((StateTensor("state", (16, 4), "float32"),))),))  # 256 bytes a slot


def plan_slots(num_slots: int, **kwargs) -> StateCapacity:
    """With memory for so many slots, and the two that nobody owns."""
    defaults = dict(
        max_running_requests=256,
        auto_tokens=100_000,
        checkpoint_fraction=0.2,
        keeps_checkpoints=True,
        beside_pages=True,
    )
    capacity = plan_states(STATES, budget_bytes=256 * (num_slots + 2), **(defaults | kwargs))
    assert capacity.num_bytes == 256 * (capacity.num_slots + 2) <= 256 * (num_slots + 2)
    return capacity


def test_a_model_without_states_takes_no_memory_for_them():
    assert plan_states(None, 256, 1 << 30, 1000, 0.2, True, True) == StateCapacity(256)


def test_requests_have_a_slot_each_and_checkpoints_a_fifth():
    capacity = plan_slots(2000)
    assert (capacity.max_running_requests, capacity.num_slots) == (256, 256 + 400)
    assert plan_slots(2000, checkpoint_fraction=0.5).num_slots == 256 + 1000
    assert plan_slots(2000, keeps_checkpoints=False).num_slots == 256


def test_small_states_do_not_fill_the_memory_for_nothing():
    assert plan_slots(1 << 20).num_slots == 256 + 100_000 // 64
    assert plan_slots(1 << 20, checkpoint_fraction=1.0, auto_tokens=640).num_slots == 256 + 10


def test_with_little_memory_fewer_requests_run():
    capacity = plan_slots(100)
    assert (capacity.max_running_requests, capacity.num_slots) == (49, 49 + 20)
    for num_slots, running in ((3, 2), (2, 1)):
        capacity = plan_slots(num_slots, beside_pages=False, checkpoint_fraction=1.0)
        assert (capacity.max_running_requests, capacity.num_slots) == (running, num_slots)
    with pytest.raises(NotEnoughMemory, match="no room for the states of 2 requests"):
        plan_slots(1)
    assert plan_slots(1, keeps_checkpoints=False).num_slots == 1


def test_a_model_without_attention_needs_no_pages():
    capacity = plan([], auto_tokens=5000)
    assert (capacity.num_pages, capacity.max_total_tokens, capacity.max_req_len) == ((), 5000, 1000)
    assert capacity.cache_bytes == 0
