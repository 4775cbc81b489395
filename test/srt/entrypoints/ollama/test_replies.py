"""Answers in Ollama's form, from events and completions."""

import time
from typing import Any

import pytest

from rtp_llm.srt.entrypoints.chat_answer import INVALID_JSON, ChatAnswer
from rtp_llm.srt.entrypoints.ollama.replies import MessageWriter, Reply, chat_layout, generate_layout, timestamp
from rtp_llm.srt.managers.detokenizer import Completion
from rtp_llm.srt.messages import FinishReason, GenerateRequest, TokenOutput
from rtp_llm.srt.parser.events import Arguments, CallBegin, CallEnd, Content, Event, Reasoning
from rtp_llm.srt.request_spec import RequestSpec
from rtp_llm.srt.sampling_params import SamplingParams

CALL = [CallBegin(0, "now", "c1"), Arguments(0, '{"zone": '), Arguments(0, '"UTC"}'), CallEnd(0)]


def told(*events: Event) -> list[dict[str, Any]]:
    writer = MessageWriter()
    return [dict(message) for message in (*writer.write(events), *writer.close())]


def test_content_and_thinking() -> None:
    assert told(Reasoning("Hm"), Content("Hel"), Content("lo")) == [
        {"role": "assistant", "content": "", "thinking": "Hm"},
        {"role": "assistant", "content": "Hel"},
        {"role": "assistant", "content": "lo"},
    ]


def test_a_call_comes_when_it_is_complete() -> None:
    writer = MessageWriter()
    assert list(writer.write(CALL[:-1])) == []
    [message] = writer.write(CALL[-1:])
    function = {"index": 0, "name": "now", "arguments": {"zone": "UTC"}}
    assert message == {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": function}]}
    assert list(writer.close()) == []


@pytest.mark.parametrize(
    ("text", "arguments"),
    [("", {}), ('{"a": 1, "b": "c', {"a": 1}), ("[1]", {INVALID_JSON: "[1]"}), ("{nope", {INVALID_JSON: "{nope"})],
)
def test_a_call_that_was_cut(text: str, arguments: dict[str, Any]) -> None:
    [message] = told(CallBegin(0, "now", "c1"), *([Arguments(0, text)] if text else []))
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


def finished(*outputs: TokenOutput) -> Reply:
    spec = RequestSpec(SamplingParams(max_new_tokens=8), seed=0)
    completion = Completion(GenerateRequest("r", [5, 6, 7], spec), None)
    for output in outputs:
        completion.add(output)
    return Reply(ChatAnswer(completion, None), "tiny", generate_layout, time.perf_counter(), gives_context=True)


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        (FinishReason("stop", matched=2), "stop"),
        (FinishReason("length", length=2), "length"),
        (FinishReason("abort", status_code=499), "length"),
    ],
)
def test_counts_and_durations(reason: FinishReason, name: str) -> None:
    reply = finished(TokenOutput("r", [3], cached_tokens=2), TokenOutput("r", [4], finish_reason=reason))
    end = reply.end()
    assert (end["done"], end["done_reason"], end["context"]) == (True, name, [5, 6, 7, 3, 4])
    counts = [end[f"{part}_count"] for part in ("prompt_eval", "prompt_eval_cached", "eval")]
    assert counts == [3, 2, 2]
    parts = [end[f"{part}_duration"] for part in ("load", "prompt_eval", "eval")]
    assert min(parts) > 0 and abs(sum(parts) - end["total_duration"]) <= len(parts)


def test_an_answer_of_no_tokens_has_durations_too() -> None:
    end = finished(TokenOutput("r", [], finish_reason=FinishReason("length", length=0))).end()
    assert end["eval_count"] == 0 and end["eval_duration"] == 1 and end["total_duration"] > 0


def test_layouts() -> None:
    [thought, said] = told(Reasoning("Hm"), Content("Hello"))
    assert chat_layout(thought) == {"message": thought}  # type: ignore[arg-type]
    assert generate_layout(thought) == {"response": "", "thinking": "Hm"}  # type: ignore[arg-type]
    assert generate_layout(said) == {"response": "Hello"}  # type: ignore[arg-type]


def test_times() -> None:
    assert timestamp(0.5) == "1970-01-01T00:00:00.500000Z"
