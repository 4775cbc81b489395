"""/v1/responses, for the openai package: items and events in their order, conversations, what is kept."""

import base64
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types.responses import Response
from PIL import Image
from pydantic import BaseModel
from recorded_answers import CALL, JSON_ARGUMENTS
from scripted_core import SPECIAL, TEMPLATE, ScriptedCore, make_spoken_checkpoint, scripted

from rtp_llm.srt.messages import FinishReason
from tiny_server import InProcess

WEATHER = f'<tool_call>{{"name": "get_weather", "arguments": {JSON_ARGUMENTS}}}</tool_call>'
NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS: list[Any] = [
    {"type": "function", "name": "get_weather", "description": "The weather", "parameters": CITY, "strict": True},
    {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}},
]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A checkpoint and its template."""
    folder = tmp_path_factory.mktemp("spoken")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    return make_spoken_checkpoint(folder, SPECIAL), str(template)


@pytest.fixture(scope="module")
def running(spoken: tuple[str, str]) -> Iterator[tuple[InProcess, ScriptedCore, openai.OpenAI]]:
    with scripted(spoken[0], chat_template=spoken[1]) as (server, core), connected(server) as client:
        yield server, core, client


def connected(server: InProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def core(running: tuple[InProcess, ScriptedCore, openai.OpenAI]) -> ScriptedCore:
    running[1].holds = False
    return running[1]


@pytest.fixture
def client(running: tuple[InProcess, ScriptedCore, openai.OpenAI]) -> openai.OpenAI:
    return running[2]


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.responses.create(**({"model": "tiny", "input": "the weather"} | options))


def said(response: Response) -> list[tuple[str, str, str | None]]:
    """Return type, status and text of each item."""
    texts = []
    for item in response.output:
        if item.type == "function_call":
            texts.append((item.type, item.arguments, item.status))
        else:
            assert item.type in ("message", "reasoning")
            texts.append((item.type, "".join(part.text for part in item.content), item.status))
    return texts


def order_of(kind: str) -> list[str]:
    """Return the types of an item's events, with one delta."""
    if kind == "function_call":
        names = ["function_call_arguments.delta", "function_call_arguments.done"]
    else:
        text = "output_text" if kind == "message" else "reasoning_text"
        names = ["content_part.added", f"{text}.delta", f"{text}.done", "content_part.done"]
    return [f"response.{name}" for name in ("output_item.added", *names, "output_item.done")]


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("Hello  ", [("message", "Hello  ")]),
        ("", [("message", "")]),
        ("<think>\nHm\n</think>\n\nHello", [("reasoning", "Hm"), ("message", "Hello")]),
        (
            f"<think>Hm</think>I look.\n{WEATHER}\n{NOW}",
            [("reasoning", "Hm"), ("message", "I look."), ("function_call", JSON_ARGUMENTS), ("function_call", "{}")],
        ),
        (f"{NOW}\nDone", [("function_call", "{}"), ("message", "Done")]),
    ],
)
def test_events(core: ScriptedCore, client: openai.OpenAI, text: str, items: list[tuple[str, str]]) -> None:
    """Their order, their numbers, their places; deltas make up the whole, and the whole is that without a stream."""
    core.texts = [text, text]
    whole = ask(client, tools=TOOLS)
    expected = [(kind, said_text, "completed") for kind, said_text in items]
    assert (whole.status, said(whole), whole.error) == ("completed", expected, None)
    events = list(ask(client, tools=TOOLS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for i, event in enumerate(events) if not (is_delta(event) and is_delta(events[i - 1]))]
    of_items = [name for kind, said_text in items for name in order_of(kind) if said_text or ".delta" not in name]
    assert kinds == ["response.created", "response.in_progress", *of_items, "response.completed"]
    last = events[-1].response
    assert said(last) == expected and last.usage == whole.usage and last.id == events[0].response.id
    assert (events[0].response.status, events[0].response.output) == ("in_progress", [])
    deltas = [""] * len(items)
    for event in events:
        if is_delta(event):
            deltas[event.output_index] += event.delta
            assert event.item_id == last.output[event.output_index].id
    assert deltas == [said_text for _, said_text in items]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == last.output


def is_delta(event: Any) -> bool:
    return event.type.endswith(".delta")


def test_the_bytes_of_a_stream(running: tuple[InProcess, ScriptedCore, openai.OpenAI]) -> None:
    server, core, _ = running
    core.texts = ["Hello"]
    text = httpx.post(f"{server.url}/v1/responses", json={"input": "a", "stream": True}, timeout=60).text
    blocks = text.removesuffix("\n\n").split("\n\n")
    for block in blocks:
        name, data = block.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert "[DONE]" not in text


def test_usage_and_what_was_asked(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts = ["<think>Hm</think>Hello"]
    asked = {"instructions": "Be brief", "metadata": {"a": "b"}, "temperature": 0.5, "top_p": 0.9, "user": "x"}
    response = ask(client, **asked, max_output_tokens=100, parallel_tool_calls=False, truncation="disabled")
    for name, value in asked.items():
        assert getattr(response, name) == value
    assert (response.max_output_tokens, response.truncation, response.store) == (100, "disabled", True)
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    assert usage.input_tokens_details.cached_tokens == 0
    assert response.created_at <= response.completed_at


def test_an_answer_that_is_cut(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts = [WEATHER, WEATHER]
    whole = ask(client, tools=TOOLS, max_output_tokens=45)
    [(kind, arguments, status)] = said(whole)
    assert (whole.status, whole.incomplete_details.reason, kind, status) == (
        "incomplete",
        "max_output_tokens",
        "function_call",
        "incomplete",
    )
    assert JSON_ARGUMENTS.startswith(arguments)
    *_, last = ask(client, tools=TOOLS, max_output_tokens=45, stream=True)
    assert last.type == "response.incomplete" and said(last.response) == said(whole)


def test_the_helper_for_streams(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts = [f"<think>Hm</think>I look.{WEATHER}"]
    with client.responses.stream(model="tiny", input="the weather", tools=TOOLS) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == "I look."
    assert (final.output[-1].type, final.output[-1].arguments) == ("function_call", JSON_ARGUMENTS)


class Color(BaseModel):
    color: Literal["red", "green"]


def test_structured_text(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts, core.grammars = ['{"color": "red"}'] * 4, []
    parsed = client.responses.parse(model="tiny", input="the cat", text_format=Color)
    assert parsed.output_parsed == Color(color="red")
    form = {"type": "json_schema", "name": "color", "schema": Color.model_json_schema()}
    for given in ({"type": "text"}, {"type": "json_object"}, form):
        assert ask(client, text={"format": given}).text.format.type == given["type"]
    assert [grammar is None for grammar in core.grammars] == [False, True, False, False]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, text={"format": {**form, "schema": {"type": "object", "not": {"required": ["a"]}}}})
    assert caught.value.param == "text"


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_loop_with_a_tool(core: ScriptedCore, client: openai.OpenAI, is_stored: bool) -> None:
    """By the id of the response before, or with its items sent back: the prompt is the same."""
    core.texts, core.prompts = [f"<think>Hm</think>I look.{WEATHER}", "Sunny"], []
    first = ask(client, tools=TOOLS, instructions="Be brief", store=is_stored)
    call = first.output[-1]
    assert (call.name, json.loads(call.arguments)) == CALL
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun, 21 degrees"}
    options: dict[str, Any] = {"tools": TOOLS, "instructions": "Be brief", "store": is_stored}
    if is_stored:
        second = ask(client, input=[result], previous_response_id=first.id, **options)
    else:
        user = {"role": "user", "content": "the weather"}
        second = ask(client, input=[user, *[item.model_dump() for item in first.output], result], **options)
    assert second.output_text == "Sunny" and second.previous_response_id == (first.id if is_stored else None)
    history = f"<think>Hm</think>I look.{WEATHER}<|end|><|tool|>sun, 21 degrees<|end|><|assistant|>"
    assert core.prompts[1].replace("\\u00e9", "é") == core.prompts[0] + history
    assert core.prompts[0].endswith("<|system|>Be brief<|end|><|user|>the weather<|end|><|assistant|>")


def test_tool_choice(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts, core.grammars, core.prompts = [NOW] * 4, [], []
    for choice in ("auto", "none", "required", {"type": "function", "name": "now"}):
        response = ask(client, tools=TOOLS, tool_choice=choice)
        assert response.output[0].type == ("message" if choice == "none" else "function_call")
    texts = ["" if spec is None else spec.text for spec in core.grammars]
    assert [("get_weather" in text, "now" in text) for text in texts] == [
        (True, True),  # the first one is strict
        (False, False),
        (True, True),
        (False, True),
    ]
    assert [("get_weather" in prompt) for prompt in core.prompts] == [True, False, True, True]
    core.texts, core.grammars = [NOW, NOW], []
    for is_strict in (True, False):
        ask(client, tools=[TOOLS[0] | {"strict": is_strict}, TOOLS[1]])
    assert [spec is not None and "get_weather" in spec.text for spec in core.grammars] == [True, False]
    core.texts = [WEATHER + NOW]
    assert len(ask(client, tools=TOOLS, parallel_tool_calls=False).output) == 1
    core.texts, core.grammars, core.prompts = [NOW] * 2, [], []
    for mode in ("auto", "required"):
        choice = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "now"}]}
        assert ask(client, tools=TOOLS, tool_choice=choice).tool_choice.model_dump() == choice
    assert [spec is not None and "get_weather" not in spec.text for spec in core.grammars] == [True, True]
    assert all("get_weather" in prompt for prompt in core.prompts)


def test_messages_that_items_make(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts, core.prompts = ["ok"], []
    items = [
        {"role": "developer", "content": "two"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "now", "arguments": ""},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "12"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "c"},
    ]
    ask(client, input=items, instructions="one", reasoning={"effort": "none", "summary": "auto"})
    turn = f"<|assistant|><think>Hm</think>{NOW}{NOW}<|end|><|tool|>12<|end|><|assistant|>no<|end|>"
    assert core.prompts == [f"<|system|>one\n\ntwo<|end|><|user|>ab<|end|>{turn}<|user|>c<|end|><|assistant|>"]
    core.texts = ["Hm</think>ok"]
    assert [kind for kind, *_ in said(ask(client, reasoning={"effort": "high"}))] == ["reasoning", "message"]
    assert core.prompts[-1].endswith("<|assistant|><think>")


def test_what_is_kept(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts = ["one", "two", "three", "four"]
    first = ask(client, input="a")
    second = ask(client, input="b", previous_response_id=first.id)
    assert client.responses.retrieve(second.id) == second
    page = client.responses.input_items.list(second.id, limit=2)
    texts = [item.content[0].text for item in page]  # fetches the rest
    assert texts == ["b", "one", "a"] and page.has_more
    ordered = list(client.responses.input_items.list(second.id, order="asc"))
    assert [item.id for item in ordered][1] == first.output[0].id
    client.responses.delete(first.id)
    for gone in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            gone(first.id)
    third = ask(client, input=[{"type": "item_reference", "id": first.output[0].id}], store=False)
    assert core.prompts[-1] == "<|assistant|>one<|end|><|assistant|>"  # the second response keeps the item
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(third.id)
    with pytest.raises(openai.BadRequestError, match="store: false") as caught:
        ask(client, previous_response_id=third.id)
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")
    with pytest.raises(openai.BadRequestError, match="as completed"):
        client.responses.cancel(second.id)


def test_a_full_store(spoken: tuple[str, str]) -> None:
    with (
        scripted(spoken[0], chat_template=spoken[1], max_stored_responses=2) as (server, core),
        connected(server) as client,
    ):
        core.texts = ["one", "two", "three"]
        first, second = ask(client), ask(client)
        client.responses.retrieve(first.id)  # used later than the second
        third = ask(client)
        assert [client.responses.retrieve(kept.id).output_text for kept in (first, third)] == ["one", "three"]
        with pytest.raises(openai.NotFoundError, match="the last 2 are kept"):
            client.responses.retrieve(second.id)


def test_cancel(core: ScriptedCore, client: openai.OpenAI) -> None:
    """A stream that is cancelled ends, and what it said is kept."""
    core.texts, core.holds = ["the weather in Paris"], True
    events = []
    with ask(client, stream=True) as stream:
        for event in stream:
            events.append(event)
            if [is_delta(other) for other in events].count(True) == 1 and is_delta(event):
                response_id = events[0].response.id
                assert client.responses.retrieve(response_id).status == "in_progress"
                with pytest.raises(openai.BadRequestError, match="cancel it first"):
                    client.responses.delete(response_id)
                assert client.responses.cancel(response_id).status == "cancelled"
    last = events[-1]
    assert (last.type, last.response.status) == ("response.incomplete", "cancelled")
    assert "the weather in Paris".startswith(last.response.output_text) and last.response.output_text
    assert client.responses.retrieve(last.response.id) == last.response


def test_a_client_that_leaves(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts, core.holds = ["the weather in Paris"], True
    with ask(client, stream=True) as stream:
        first = next(iter(stream))
        assert any(is_delta(event) for event in stream)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            assert client.responses.retrieve(first.response.id).status == "in_progress"
        except openai.NotFoundError:
            return
        time.sleep(0.01)
    pytest.fail("the response still runs")


def test_a_request_that_fails(core: ScriptedCore, client: openai.OpenAI) -> None:
    reason = FinishReason("abort", message="it broke", status_code=500)
    core.texts = [reason, reason]
    with pytest.raises(openai.InternalServerError, match="it broke"):
        ask(client)
    events = list(ask(client, stream=True))
    last = events[-1]
    assert (last.type, last.response.status, last.response.error.message) == ("response.failed", "failed", "it broke")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(last.response.id)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"background": True}, "background", "must be false"),
    ({"truncation": "auto"}, "truncation", "'disabled'"),
    ({"conversation": "conv_1"}, "conversation", "not supported"),
    ({"include": ["message.output_text.logprobs"]}, "include", "not supported"),
    ({"tools": [{"type": "web_search"}]}, "tools", "only functions"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools", "name"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "two functions"),
    ({"tools": [{"type": "function", "name": "f", "description": "x" * (1 << 20)}]}, "tools", "characters as JSON"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "not in tools"),
    ({"metadata": {"a": "x" * 513}}, "metadata", "at most"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16"),
    ({"input": []}, "input", "empty"),
    ({"input": [{"role": "robot", "content": "a"}]}, "input", "role"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input", "message"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input", "input_file"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "a"}]}, "input", "no call 'c'"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "not here"),
    ({"input": "cat " * 5000}, "input", "maximum context length"),
    ({"max_output_tokens": 0}, "max_output_tokens", "greater than"),
    ({"max_output_tokens": 5000}, "max_output_tokens", "max_output_tokens"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning", "auto"),
    ({"text": {"format": {"type": "grammar"}}}, "text", "json_schema"),
    ({"stream_options": {"include_obfuscation": True}, "stream": True}, "include_obfuscation", "not supported"),
]


@pytest.mark.parametrize(("options", "param", "words"), WRONG)
def test_requests_that_are_refused(client: openai.OpenAI, options: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **{name: value for name, value in options.items() if name != "input"}, extra_body=options)
    assert re.search(re.escape(words), caught.value.message) and caught.value.param == param, caught.value.message


def test_an_image_for_a_model_that_takes_text(client: openai.OpenAI) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    image = {"type": "input_image", "image_url": url, "detail": "auto"}
    items: list[Any] = [{"role": "user", "content": "a"}, {"role": "user", "content": [image]}]
    with pytest.raises(openai.BadRequestError, match=r"input\[1\].content\[0\] is an image") as caught:
        ask(client, input=items, instructions="first")
    assert caught.value.param == "input"


def test_a_template_without_thinking(spoken: tuple[str, str], tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with scripted(spoken[0], chat_template=str(template)) as (server, core), connected(server) as client:
        core.texts = ["Hello"]
        with pytest.raises(openai.BadRequestError, match=r"reasoning\.effort") as caught:
            ask(client, reasoning={"effort": "high"})
        assert caught.value.param == "reasoning"
        assert ask(client, reasoning={"effort": "none"}).output_text == "Hello"
