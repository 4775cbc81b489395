"""Every format's recorded answers, in one piece and in all pieces; garbage; what is malformed."""

import json
import random
from dataclasses import astuple
from itertools import count
from typing import Any

import pytest
from recorded_answers import ANSWERS, TOOLS, Answer

from rtp_llm.srt.parser.chat_parser import ChatParser
from rtp_llm.srt.parser.choose import begins_thinking, choose_format
from rtp_llm.srt.parser.events import Arguments, CallBegin, CallEnd, Content, Event, Reasoning, merged
from rtp_llm.srt.parser.schemas import ToolSchemas
from rtp_llm.srt.parser.tables import REASONING_PARSERS, TOOL_CALL_PARSERS

SCHEMAS = ToolSchemas(TOOLS)
by_name = pytest.mark.parametrize("answer", ANSWERS, ids=[answer.name for answer in ANSWERS])


def parser_of(answer: Answer, **options: Any) -> ChatParser:
    form = choose_format("", answer.tool_call_parser, answer.reasoning_parser)
    ids = count()
    thinks = answer.thinks or begins_thinking(form, "")
    return ChatParser(form, SCHEMAS, thinks, new_id=lambda: f"id{next(ids)}", **options)


def parsed(parser: ChatParser, pieces: list[str], is_cut: bool = False) -> list[Event]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return merged([*events, *parser.finish(is_cut)])


def said(events: list[Event]) -> tuple[str, str, list[tuple[str, str]]]:
    """Return the content, the reasoning, and the calls with their arguments' texts."""
    content = "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    names = [event.name for event in events if isinstance(event, CallBegin)]
    texts = ["".join(e.text for e in events if isinstance(e, Arguments) and e.index == i) for i in range(len(names))]
    return content, reasoning, list(zip(names, texts, strict=True))


@by_name
def test_what_an_answer_says(answer: Answer) -> None:
    events = parsed(parser_of(answer), [answer.text])
    content, reasoning, calls = said(events)
    assert (content, reasoning) == (answer.content, answer.reasoning)
    assert [(name, json.loads(text)) for name, text in calls] == answer.calls
    begins = [event for event in events if isinstance(event, CallBegin)]
    assert [event.index for event in begins] == list(range(len(answer.calls)))
    assert tuple(event.id for event in begins) == (answer.ids or tuple(f"id{i}" for i in range(len(begins))))
    assert [e.index for e in events if isinstance(e, CallEnd)] == list(range(len(begins)))


@by_name
def test_no_matter_how_the_text_is_cut(answer: Answer) -> None:
    text = answer.text
    whole = parsed(parser_of(answer), [text])
    assert parsed(parser_of(answer), list(text)) == whole
    for i in range(1, len(text)):
        assert parsed(parser_of(answer), [text[:i], text[i:]]) == whole, (text[:i], text[i:])


@by_name
def test_texts_that_end_early(answer: Answer) -> None:
    """They are read as they come; a call that is cut has no end, and arguments with an end are whole."""
    for i in range(0, len(answer.text), 3):
        events = parsed(parser_of(answer), [answer.text[:i]], is_cut=True)
        assert events == parsed(parser_of(answer), list(answer.text[:i]), is_cut=True)
        check_whole(events)


def check_whole(events: list[Event]) -> None:
    """Check that calls come one after the other, and that arguments are JSON where a call has an end."""
    calls = said(events)[2]
    begun = -1
    for event in events:
        if isinstance(event, CallBegin):
            begun += 1
            assert event.index == begun
        if isinstance(event, Arguments | CallEnd):
            assert event.index == begun
        if isinstance(event, CallEnd):
            assert isinstance(json.loads(calls[event.index][1]), dict)


@by_name
def test_without_tools_calls_are_text(answer: Answer) -> None:
    form = choose_format("", answer.tool_call_parser, answer.reasoning_parser)
    events = parsed(ChatParser(form, None, answer.thinks), [answer.text])
    assert not any(isinstance(event, CallBegin) for event in events)
    for name, arguments in answer.calls:
        assert name in said(events)[0] + said(events)[1]
        assert all(key in said(events)[0] + said(events)[1] for key in arguments)


@by_name
def test_garbage_is_text(answer: Answer) -> None:
    """Tags, JSON and words in any order: nothing fails, no word is lost, and the pieces do not matter."""
    draw = random.Random(answer.name)
    form = choose_format("", answer.tool_call_parser, answer.reasoning_parser)
    parts = [*form.tags, *'{}[]()":,', '{"name": "now"', '"arguments": {', "now(", " ", "\n", "Aé"]
    for _ in range(12):
        words = [f"w{i}w" for i in range(12)]
        text = "".join(word + "".join(draw.choices(parts, k=draw.randrange(4))) for word in words)
        whole = parsed(parser_of(answer), [text])
        assert parsed(parser_of(answer), list(text)) == whole
        told = "".join(str(part) for event in whole for part in astuple(event))
        assert form.channels is not None or [word for word in words if word not in told] == [], text


@pytest.mark.parametrize(
    ("parser", "text", "content", "calls"),
    [
        ("hermes", "<tool_call>now</tool_call> x", "<tool_call>now</tool_call> x", []),
        ("hermes", '<tool_call>{"name": 1}', '<tool_call>{"name": 1}', []),
        ("hermes", '<tool_call>{"name": "now"', '<tool_call>{"name": "now"', []),
        ("hermes", '<tool_call>{"name": "\\ud800"}', '<tool_call>{"name": "\\ud800"}', []),
        ("hermes", "<tool_call> <tool_call>" + '{"name": "now"}', "<tool_call>", [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": b c}}</tool_call>x', "x", [("now", '{"a": b c}')]),
        ("hermes", '<tool_call>{"name": "now", "arguments": 7}', '<tool_call>{"name": "now", "arguments": 7}', []),
        ("qwen3_coder", "<function=now>\nx", "<function=now>\nx", []),
        ("qwen3_coder", "<function=now><parameter=a>1</parameter>x", "", [("now", '{"a": 1</parameter>x')]),
        ("lfm2", "<|tool_call_start|>[now(1)]", "<|tool_call_start|>[now(1)]", []),
        ("lfm2", "<|tool_call_start|>[now(a=x y, 2)]", "2)]", [("now", '{"a": "x y"}')]),
        (
            "glm45",
            "<tool_call>now<arg_key>a</arg_key>1</tool_call>",
            "<arg_key>a</arg_key>1</tool_call>",
            [("now", "{}")],
        ),
        ("mistral", "[TOOL_CALLS]now[ARGS]7", "[TOOL_CALLS]now[ARGS]7", []),
        ("deepseek_v31", "<｜tool▁calls▁begin｜>x", "<｜tool▁calls▁begin｜>x", []),
        ("openai", "<|channel|>final", "<|channel|>final", []),
        ("openai", "<|channel|>c to=browser<|message|>x<|end|>", "<|channel|>c to=browser<|message|>x", []),
    ],
)
def test_malformed_calls(parser: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    """They are text; one that has begun ends there, and what follows is text."""
    for pieces in ([text], list(text)):
        events = parsed(ChatParser(choose_format("", parser, "none"), SCHEMAS), pieces)
        assert said(events) == (content, "", calls)


def test_names_and_headers_of_any_length_are_text() -> None:
    for parser, text in (
        ("mistral", "[TOOL_CALLS]" + "x" * 300),
        ("openai", "<|channel|>" + "x" * 600 + "<|message|>"),
    ):
        told = ChatParser(choose_format("", parser, "none"), SCHEMAS).feed(text)
        assert said(told)[0] == text


def test_tokens_of_thinking_and_of_calls() -> None:
    parser = ChatParser(choose_format("", "hermes", "qwen3"), SCHEMAS)
    parser.feed("<think>a b")
    assert parser.thinking_spans == [(0, 10)]
    parser.feed("</think> ok <think>")
    parser.finish()
    assert (parser.thinking_spans, parser.num_calls) == ([(0, 18)], 0)


def test_thinking_that_is_not_told_apart_is_content_with_its_tags() -> None:
    form = choose_format("", "hermes", "qwen3")
    text = "<think>\nHm\n</think>\n\nOk"
    assert said(parsed(ChatParser(form, SCHEMAS, separates=False), list(text))) == (text, "", [])


def test_every_format_has_a_recorded_answer() -> None:
    tried = {id(TOOL_CALL_PARSERS[answer.tool_call_parser]) for answer in ANSWERS}
    assert {name for name, form in TOOL_CALL_PARSERS.items() if id(form) not in tried} == set()
    known = [REASONING_PARSERS[answer.reasoning_parser] for answer in ANSWERS]
    assert {name for name, form in REASONING_PARSERS.items() if form not in known} == {"granite", "kimi"}
