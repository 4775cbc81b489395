"""Grammars in the core: the same tokens however steps, memory and processes are arranged."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from made_requests import generate_request
from stepped_core import Core
from transformers import AutoTokenizer

from rtp_llm.srt.devices.cpu.provider import CpuProvider
from rtp_llm.srt.engine.grammars import Grammars
from rtp_llm.srt.messages import AbortRequest, GenerateRequest
from rtp_llm.srt.request_spec import GrammarSpec, ThinkingSpec
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.scheduler import request
from tiny_server import make_checkpoint

PATTERNS = ("([ab]c){3,20}", "[0-9]{30}", "(the|a) (cat|dog)( (sat|ran))*", "x?")
# Free text; what "a" begins ends as it must.
TAG = GrammarSpec(
    "structural_tag",
    json.dumps({"structures": [{"begin": "a", "schema": {"type": "integer"}, "end": ";"}], "triggers": ["a"]}),
)
THINKING = ThinkingSpec("<think>", "mat", (), False, True, 0, (7, 8, 9))  # ids of any tokens
PROMPTS = ([5], list(range(4, 60)), [7, 8, 9] * 8, [11, 12])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("with-tokenizer"))


@pytest.fixture
def core(checkpoint: str) -> Iterator[Callable[..., Core]]:
    made: list[Core] = []

    def make(**options: Any) -> Core:
        made.append(Core("llama-default", model_path=checkpoint, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def requests(output_ids: dict[str, list[int]] | None = None) -> list[GenerateRequest]:
    """Requests with grammars, and free ones between them."""
    made = []
    for i in range(12):
        pattern = PATTERNS[i % 4]
        params = SamplingParams(max_new_tokens=60, temperature=0.0 if i % 3 == 0 else 1.0)
        grammar = TAG if i in (5, 8) else GrammarSpec("regex", pattern)
        options: dict[str, Any] = {} if i % 5 == 4 else {"grammar": grammar}
        if i in (7, 9):
            options = {"thinking": replace(THINKING, budget=i)}
        rid = f"r{i}"
        begun = {} if output_ids is None else {"output_ids": output_ids[rid]}
        made.append(generate_request(rid, PROMPTS[i % 4], params, 50 + i, eos_token_ids=(0,), **options, **begun))
    return made


@pytest.fixture(scope="module")
def expected(checkpoint: str) -> dict[str, list[int]]:
    core = Core("llama-default", model_path=checkpoint)
    found = core.run(requests())
    ends = {rid: outputs[-1].finish_reason for rid, outputs in core.outputs.items()}
    assert all(ends.values()) and {ends[f"r{i}"].type for i in range(4)} == {"stop"}
    for i in (7, 9):  # a character may come before
        assert any(found[f"r{i}"][j : j + 3] == [7, 8, 9] for j in range(i, i + 4)), "the budget was not kept"
    core.close()
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 1},
        {"depth": 1, "delayed": True},
        {"max_running_requests": 2},
        {"chunked_prefill_size": 5},
        {"depth": 1, "threads": True, "pp_size": 2},
        pytest.param({"threads": True, "pp_size": 2}, marks=pytest.mark.slow),
        pytest.param({"threads": True, "tp_size": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_steps_and_memory(
    core: Callable[..., Core], expected: dict[str, list[int]], options: dict[str, Any]
) -> None:
    assert core(**options).run(requests()) == expected


def test_nor_on_pieces_of_logits(
    core: Callable[..., Core], expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuProvider, "logit_bytes_at_once", 1)  # of one row at a time
    assert core().run(requests()) == expected


def test_nor_on_retractions(core: Callable[..., Core], expected: dict[str, list[int]]) -> None:
    small = core(max_total_tokens=150, disable_radix_cache=True)
    assert small.run(requests()) == expected
    assert small.core.scheduler.stats.retractions > 0


@pytest.mark.usefixtures("warm_processes")
def test_nor_on_processes(core: Callable[..., Core], expected: dict[str, list[int]]) -> None:
    assert core(processes=True).run(requests()) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
def test_nor_on_stages_in_processes(core: Callable[..., Core], expected: dict[str, list[int]]) -> None:
    assert core(processes=True, depth=1, pp_size=2).run(requests()) == expected


@pytest.mark.parametrize("options", [{}, {"chunked_prefill_size": 3}, {"max_total_tokens": 150}], ids=str)
def test_forced_tokens_are_not_drawn_one_by_one(
    core: Callable[..., Core], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    patterns = ('[{]"the name": "[a-c]{4}", "the other name": [0-9]{3}[}]', "the cat sat on the [a-z]{5} and the dog")

    def asked() -> list[GenerateRequest]:
        made = []
        for i in range(6):
            params = SamplingParams(max_new_tokens=12 if i == 3 else 80, temperature=1.0, min_new_tokens=i)
            grammar = GrammarSpec("regex", patterns[i % 2])
            made.append(generate_request(f"r{i}", PROMPTS[i % 4], params, i, eos_token_ids=(0,), grammar=grammar))
        return made

    jumping = core(**options)
    found = jumping.run(asked())
    monkeypatch.setattr(request, "MIN_FORCED_TOKENS", 10**6)
    plain = core()
    drawn = plain.run(asked())
    tokenizer = AutoTokenizer.from_pretrained(plain.core.grammars._args.model_path)
    for rid, ids in drawn.items():
        for each, tokens in ((jumping, found[rid]), (plain, ids)):
            text, ends = tokenizer.decode(tokens), each.outputs[rid][-1].finish_reason.type
            whole = re.fullmatch(patterns[int(rid[1:]) % 2], text)
            assert whole if ends == "stop" else (ends, len(tokens)) == ("length", 12), (ends, text)
    if not options:
        assert jumping.core.scheduler._num_steps < 0.8 * plain.core.scheduler._num_steps


def test_a_resubmitted_request_goes_on_where_it_was(core: Callable[..., Core], expected: dict[str, list[int]]) -> None:
    begun = {rid: ids[: len(ids) // 2] for rid, ids in expected.items()}
    rest = core().run(requests(begun))
    assert {rid: begun[rid] + rest.get(rid, []) for rid in begun} == expected


def test_a_grammar_that_allows_nothing_more_has_ended(core: Callable[..., Core]) -> None:
    asked = generate_request(
        "r", [5], SamplingParams(max_new_tokens=20), eos_token_ids=(0,), grammar=GrammarSpec("regex", "abc")
    )
    one = core()
    [output] = [one.run([asked])["r"]]
    resumed = generate_request(
        "again", [5], SamplingParams(max_new_tokens=20), eos_token_ids=(0,), grammar=GrammarSpec("regex", "abc"),
        output_ids=output,
    )  # fmt: skip
    assert one.run([resumed])["again"] == []
    assert one.outputs["again"][-1].finish_reason.type == "stop"


def test_what_no_token_can_satisfy_ends_with_an_error(core: Callable[..., Core]) -> None:
    params = SamplingParams(max_new_tokens=20, allowed_token_ids=[300])
    one = core(depth=1)
    one.run([generate_request("r", [5], params, grammar=GrammarSpec("regex", "[0-9]+x"))])
    reason = one.outputs["r"][-1].finish_reason
    assert (reason.type, reason.status_code) == ("abort", 400) and "grammar" in reason.message
    one.core.scheduler.check_integrity()


def test_a_compiler_that_fails_costs_its_request_alone(
    core: Callable[..., Core], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def compile(self, *_: Any) -> None:
            raise KeyError("oops")

    monkeypatch.setattr(Grammars, "_make_backend", lambda self: Broken())
    one = core()
    free = generate_request("free", [5], SamplingParams(max_new_tokens=5, ignore_eos=True))
    bound = generate_request("bound", [5], SamplingParams(max_new_tokens=5), grammar=GrammarSpec("regex", "a"))
    found = one.run([free, bound])
    while "bound" not in one.outputs:
        one.core.step(block=False)
    assert len(found["free"]) == 5
    reason = one.outputs["bound"][-1].finish_reason
    assert (reason.type, reason.status_code) == ("abort", 500) and re.search("KeyError", reason.message)


def test_a_request_that_waits_for_its_grammar_can_be_aborted(core: Callable[..., Core]) -> None:
    one = core()
    asked = generate_request("r", [5], SamplingParams(max_new_tokens=5), grammar=GrammarSpec("regex", "a"))
    for message in (asked, AbortRequest("r")):
        one.link.client.send(message)
    one.core.step(block=False)
    assert one.outputs["r"][-1].finish_reason.type == "abort"
    assert not len(one.core.grammars) and one.core.scheduler.idle
