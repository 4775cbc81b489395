"""A tokenizer's own description of answers (transformers' response templates), read as they come."""

from types import SimpleNamespace
from typing import Any

import pytest

from rtp_llm.srt.parser.events import Arguments, CallBegin, CallEnd, Content, Event, Reasoning, merged
from rtp_llm.srt.parser.response_template import ResponseTemplateParser, read_response_template

CALL = {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.arguments}"}}
TEMPLATE = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "content": {},
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "content": "json",
            "repeats": True,
            "transform": CALL,
        },
    },
}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
NOW = '<tool_call>{"name": "now", "arguments": {"a": "é"}}</tool_call>'


def events(text: str, prefix: str = "", size: int = 1, **options: Any) -> list[Event]:
    template = read_response_template(SimpleNamespace(response_template=TEMPLATE))
    assert template is not None
    parser = ResponseTemplateParser(template, prefix, **({"tools": TOOLS, "new_id": lambda: "id"} | options))
    told = [event for i in range(0, len(text), size) for event in parser.feed(text[i : i + size])]
    return merged([*told, *parser.finish()])


CALLED: list[Event] = [CallBegin(0, "now", "id"), Arguments(0, '{"a": "é"}'), CallEnd(0)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Hello", [Content("Hello")]),
        (f"<think>Hm\n</think>\nOk {NOW}", [Reasoning("Hm"), Content("Ok"), *CALLED]),
        (f"{NOW}", CALLED),
        ("<tool_call>{now</tool_call> x <think>y", [Content("{now x <think>y")]),
        ('<tool_call>{"name": 1, "arguments": 2}</tool_call>', [Content('{"name": 1, "arguments": 2}')]),
        ('a <tool_call>{"name', [Content('a{"name')]),
    ],
)
def test_answers(text: str, said: list[Event]) -> None:
    for size in (1, 3, len(text)):
        assert events(text, size=size) == said


def test_the_prompt_may_have_begun_the_thinking() -> None:
    prefix = "<|user|><think><|assistant|><think>"
    assert events("Hm</think>Ok", prefix) == [Reasoning("Hm"), Content("Ok")]
    assert events("Hm</think>Ok", prefix, separates=False) == [Content("HmOk")]


def test_without_tools_calls_are_text() -> None:
    assert events(NOW, tools=None) == [Content('{"name": "now", "arguments": {"a": "é"}}')]


def test_tokenizers_without_one() -> None:
    assert read_response_template(SimpleNamespace()) is None
    with pytest.raises(ValueError, match="start_anchor"):
        read_response_template(SimpleNamespace(response_template={"fields": {"content": {}}}))
