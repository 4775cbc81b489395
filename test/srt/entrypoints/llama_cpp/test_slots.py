"""Slots: requests take them in their order, and leave them to those that wait."""

from random import Random

from rtp_llm.srt.entrypoints.llama_cpp.slots import Slots
from rtp_llm.srt.managers.detokenizer import Completion
from rtp_llm.srt.messages import GenerateRequest, TokenOutput
from rtp_llm.srt.request_spec import RequestSpec
from rtp_llm.srt.sampling_params import SamplingParams


def completion(number: int) -> Completion:
    spec = RequestSpec(SamplingParams(max_new_tokens=9, temperature=0.5), seed=number)
    return Completion(GenerateRequest(str(number), [1, 2, 3], spec), None)


def seeds(slots: Slots) -> list[int | None]:
    """Return which requests the slots hold."""
    return [slot["params"]["seed"] if slot["is_processing"] else None for slot in slots.told()]


def test_requests_wait_for_slots() -> None:
    slots = Slots(2, 100)
    first, second, third, fourth = map(completion, range(4))
    for item in (first, second, third, fourth):
        slots.started(item)
    assert seeds(slots) == [0, 1] and slots.num_free == 0
    slots.ended(first, 1.0)
    assert seeds(slots) == [2, 1]
    slots.ended(fourth, 1.0)  # its client has gone
    slots.ended(second, 1.0)
    assert seeds(slots) == [2, None] and slots.num_free == 1


def test_what_a_slot_tells() -> None:
    slots = Slots(2, 100)
    item = completion(7)
    slots.started(item)
    item.add(TokenOutput("7", [4, 5], cached_tokens=2))
    running, idle = slots.told()
    assert idle == {"id": 1, "n_ctx": 100, "speculative": False, "is_processing": False}
    assert running["next_token"] == [{"has_next_token": True, "has_new_line": False, "n_remain": 7, "n_decoded": 2}]
    assert (running["id_task"], running["n_prompt_tokens"], running["n_prompt_tokens_cache"]) == (0, 3, 2)
    assert (running["params"]["temperature"], running["params"]["n_predict"]) == (0.5, 9)


def test_any_order_leaves_all_slots_free() -> None:
    draw = Random(5)
    slots, live = Slots(3, 100), []
    for number in range(300):
        if live and draw.random() < 0.5:
            slots.ended(live.pop(draw.randrange(len(live))), 1.0)
        else:
            live.append(completion(number))
            slots.started(live[-1])
        held = [seed for seed in seeds(slots) if seed is not None]
        assert len(set(held)) == len(held) == min(3, len(live)) == 3 - slots.num_free
    while live:
        slots.ended(live.pop(), 1.0)
    assert seeds(slots) == [None] * 3
