"""Blocks of an answer: in streams, and in whole messages."""

from typing import Any

import pytest

from rtp_llm.srt.entrypoints.anthropic.blocks import BlockWriter, whole_blocks
from rtp_llm.srt.entrypoints.chat_answer import INVALID_JSON, read_arguments
from rtp_llm.srt.parser.events import Arguments, CallBegin, CallEnd, Content, Event, Reasoning

EVENTS: list[Event] = [
    Reasoning("H"),
    Reasoning("m"),
    Content("I "),
    Content("look."),
    CallBegin(0, "now", "c1"),
    Arguments(0, '{"zone": '),
    Arguments(0, '"UTC"}'),
    CallEnd(0),
    CallBegin(1, "now", "c2"),
    CallEnd(1),
    Content("Well"),
    Reasoning("Then"),
]


def gathered(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the blocks of a stream, with inputs as texts; and check that they come one after the other."""
    blocks: list[dict[str, Any]] = []
    is_open = False
    for event in told:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]) | ({"input": ""} if "input" in event["content_block"] else {}))
            is_open = True
            continue
        assert is_open and event["index"] == len(blocks) - 1
        if event["type"] == "content_block_stop":
            is_open = False
            continue
        [(name, value)] = [(name, value) for name, value in event["delta"].items() if name != "type"]
        blocks[-1]["input" if name == "partial_json" else name] += value
    assert not is_open
    return blocks


def test_the_order_of_events() -> None:
    writer = BlockWriter()
    told = [*writer.write(EVENTS), *writer.close()]
    names = [
        (e["type"].removeprefix("content_block_"), e.get("delta", e.get("content_block", e)).get("type")) for e in told
    ]
    stop = ("stop", "content_block_stop")
    thinking = [("start", "thinking"), ("delta", "thinking_delta")]
    assert names == [
        *thinking,
        ("delta", "thinking_delta"),
        ("delta", "signature_delta"),
        stop,
        *[("start", "text"), ("delta", "text_delta"), ("delta", "text_delta"), stop],
        *[("start", "tool_use"), ("delta", "input_json_delta"), ("delta", "input_json_delta"), stop],
        *[("start", "tool_use"), stop],
        *[("start", "text"), ("delta", "text_delta"), stop],
        *thinking,
        ("delta", "signature_delta"),
        stop,
    ]


@pytest.mark.parametrize("shows_thinking", [True, False])
def test_a_stream_is_the_whole(shows_thinking: bool) -> None:
    writer = BlockWriter(shows_thinking)
    told = [said for event in EVENTS for said in writer.write([event])] + list(writer.close())
    streamed = gathered(told)
    for block in streamed:
        if "input" in block:
            block["input"] = read_arguments(block["input"])
    whole = whole_blocks(EVENTS, shows_thinking)
    assert streamed == whole
    thinking, said, first, second, *_ = whole
    assert (thinking["thinking"], said["text"]) == ("Hm" if shows_thinking else "", "I look.")
    assert (first["input"], second["input"], second["id"]) == ({"zone": "UTC"}, {}, "c2")
    signatures = [block["signature"] for block in whole if "signature" in block]
    assert len(set(signatures)) == 2 and all(signatures)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ('{"a": [1, 2]}', {"a": [1, 2]}),
        ("", {}),
        ('{"a": 1, "b": "cut o', {"a": 1}),
        ('{"a": [1, 2', {"a": [1, 2]}),
        ("[1]", {INVALID_JSON: "[1]"}),
        ("{a: 1}", {INVALID_JSON: "{a: 1}"}),
    ],
)
def test_inputs(written: str, value: dict[str, Any]) -> None:
    assert read_arguments(written) == value
