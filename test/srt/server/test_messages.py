"""Anthropic's /v1/messages over HTTP, in plain JSON: what a scripted core says, as a whole and as a stream."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from recorded_answers import ARGUMENTS, JSON_ARGUMENTS, TOOLS
from scripted_core import SPECIAL, TEMPLATE, ScriptedCore, make_spoken_checkpoint, scripted, scripted_speaker

from rtp_llm.srt.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest
from rtp_llm.srt.entrypoints.neutral import HINTS, MESSAGES
from rtp_llm.srt.messages import FinishReason
from tiny_server import InProcess, in_process

WEATHER = f'<tool_call>{{"name": "get_weather", "arguments": {JSON_ARGUMENTS}}}</tool_call>'
NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
USER = {"role": "user", "content": "the weather"}
DEFINITIONS = [
    {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
    for f in (tool["function"] for tool in TOOLS)
]
MINIMAL = {"messages": [USER], "max_tokens": 200}
CREATE, COUNT = "/v1/messages", "/v1/messages/count_tokens"
Told = list[dict[str, Any]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[InProcess, ScriptedCore]]:
    with scripted_speaker(tmp_path_factory.mktemp("spoken"), SPECIAL) as running:
        yield running


@pytest.fixture
def core(running: tuple[InProcess, ScriptedCore]) -> ScriptedCore:
    running[1].prompts, running[1].grammars = [], []
    return running[1]


@pytest.fixture(scope="module")
def client(running: tuple[InProcess, ScriptedCore]) -> Iterator[httpx.Client]:
    headers = {"x-api-key": "any", "anthropic-version": "2023-06-01", "anthropic-beta": "x-2025-01-01"}
    with httpx.Client(base_url=running[0].url, timeout=60, headers=headers) as connected:
        yield connected


def post(client: httpx.Client, path: str = CREATE, **fields: Any) -> httpx.Response:
    minimal = MINIMAL if path == CREATE else {"messages": [USER]}
    return client.post(path, json=minimal | fields)


def answer(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = post(client, **fields)
    assert response.status_code == 200, response.text
    message: dict[str, Any] = response.json()
    return message


def stream(client: httpx.Client, **fields: Any) -> Told:
    """Return the data of the events, whose names are their types."""
    response = post(client, stream=True, **fields)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    told = []
    for part in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        told.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {told[-1]['type']}"
    return told


def gathered(told: Told) -> dict[str, Any]:
    """Return the message that a stream tells."""
    types = [event["type"] for event in told]
    assert types[:2] == ["message_start", "ping"] and types[-2:] == ["message_delta", "message_stop"]
    message = told[0]["message"]
    assert (message["content"], message["stop_reason"], message["stop_sequence"]) == ([], None, None)
    inputs: dict[int, str] = {}
    for event in told[2:-2]:
        assert event["type"].startswith("content_block_")
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
        for name, text in event.get("delta", {}).items():
            if name == "partial_json":
                inputs[event["index"]] = inputs.get(event["index"], "") + text
            elif name != "type":
                message["content"][event["index"]][name] += text
    assert [e["index"] for e in told if e["type"] == "content_block_stop"] == list(range(len(message["content"])))
    for i, text in inputs.items():
        message["content"][i]["input"] = json.loads(text)
    return message | told[-2]["delta"] | {"usage": told[-2]["usage"]}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    assert message["id"].startswith("msg_")
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return message | {"id": None, "content": content}


TEXT = {"type": "text", "text": "Hello"}
WEATHER_USE = {"type": "tool_use", "name": "get_weather", "input": ARGUMENTS}
NOW_USE = {"type": "tool_use", "name": "now", "input": {}}


@pytest.mark.parametrize(
    ("text", "thinking", "blocks", "reason"),
    [
        ("Hello", None, [TEXT], "end_turn"),
        ("", None, [], "end_turn"),
        ("<think>\nHm\n</think>\n\nHello", "Hm", [TEXT], "end_turn"),
        (f"<think>Hm</think>Hello\n{WEATHER}\n{NOW}", "Hm", [TEXT, WEATHER_USE, NOW_USE], "tool_use"),
        (NOW, None, [NOW_USE], "tool_use"),
        ("<tool_call>now</tool_call>", None, [{"type": "text", "text": "<tool_call>now</tool_call>"}], "end_turn"),
    ],
)
def test_whole_and_streamed(
    core: ScriptedCore, client: httpx.Client, text: str, thinking: str | None, blocks: Told, reason: str
) -> None:
    core.texts = [text, text]
    whole = answer(client, tools=DEFINITIONS)
    assert without_ids(gathered(stream(client, tools=DEFINITIONS))) == without_ids(whole)
    content = without_ids(whole)["content"]
    if thinking is not None:
        assert content[0]["thinking"] == thinking and content.pop(0)["signature"]
    assert (content, whole["stop_reason"], whole["stop_sequence"]) == (blocks, reason, None)
    assert (whole["type"], whole["role"], whole["model"]) == ("message", "assistant", "tiny")
    ids = [block["id"] for block in whole["content"] if "id" in block]
    assert len(set(ids)) == len(ids) and all(ids)
    usage = whole["usage"]
    assert usage["output_tokens"] > usage["output_tokens_details"]["thinking_tokens"]
    assert bool(usage["output_tokens_details"]["thinking_tokens"]) == bool(thinking)


def test_a_loop_with_a_tool(core: ScriptedCore, client: httpx.Client) -> None:
    """The call and its result come back into the prompt, in the template's form; the header line does not."""
    system = "x-anthropic-billing-header: cch=0001;\nBe kind."
    core.texts = [f"<think>Hm</think>{WEATHER}", "Sunny"]
    first = answer(client, tools=DEFINITIONS, system=system)
    result = {"type": "tool_result", "tool_use_id": first["content"][1]["id"], "content": "sun, 21 degrees"}
    messages = [USER, {"role": "assistant", "content": first["content"]}, {"role": "user", "content": [result]}]
    second = answer(client, tools=DEFINITIONS, system=system.replace("0001", "0002"), messages=messages)
    assert (second["content"], second["stop_reason"]) == ([{"type": "text", "text": "Sunny"}], "end_turn")
    before, after = core.prompts
    history = f"<think>Hm</think>{WEATHER}<|end|><|tool|>sun, 21 degrees<|end|><|assistant|>"
    assert after.replace("\\u00e9", "é") == before + history
    assert "<|system|>Be kind.<|end|>" in before and "cch" not in before and '"get_weather"' in before


def test_tool_choice(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = [NOW] * 4
    for choice in ({"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "now"}):
        assert answer(client, tools=DEFINITIONS, tool_choice=choice)["stop_reason"] == "tool_use"
    assert answer(client, tools=DEFINITIONS, tool_choice={"type": "none"})["content"][0]["text"] == NOW
    auto, any_tool, named, _ = [None if spec is None else spec.text for spec in core.grammars]
    assert auto is None and any_tool is not None and named is not None
    assert ("get_weather" in any_tool, "get_weather" in named, "now" in named) == (True, False, True)
    assert [("get_weather" in prompt) for prompt in core.prompts] == [True, True, True, False]
    core.texts, core.grammars = [NOW] * 3, []
    strict = [DEFINITIONS[0] | {"strict": True}, DEFINITIONS[1]]
    for options in ({"tools": strict}, {"tools": DEFINITIONS}, {"tools": strict, "tool_choice": {"type": "none"}}):
        answer(client, **options)
    assert [spec is not None and '"days"' in spec.text for spec in core.grammars] == [True, False, False]
    core.texts = [WEATHER + NOW] * 2
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(answer(client, tools=DEFINITIONS, tool_choice=choice)["content"]) == 1
    assert len(gathered(stream(client, tools=DEFINITIONS, tool_choice=choice))["content"]) == 1


def test_thinking(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = ["Hm</think>Hello"] * 4
    enabled = {"type": "enabled", "budget_tokens": 1024}
    for thinking in (enabled, {"type": "adaptive"}):
        content = answer(client, thinking=thinking, max_tokens=2000)["content"]
        assert (content[0]["thinking"], content[1]["text"]) == ("Hm", "Hello")
    omitted = answer(client, thinking=enabled | {"display": "omitted"}, max_tokens=2000)["content"]
    assert (omitted[0]["thinking"], omitted[0]["signature"]) == ("", content[0]["signature"])
    assert answer(client, thinking={"type": "disabled"})["content"] == [{"type": "text", "text": "Hm</think>Hello"}]
    assert [prompt.endswith("<think>") for prompt in core.prompts] == [True, True, True, False]


def test_where_an_answer_ends(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = ["Hello world", "Hello world", "Hello" * 200, WEATHER]
    stopped = answer(client, stop_sequences=["wor", "x"])
    assert (stopped["content"][0]["text"], stopped["stop_reason"], stopped["stop_sequence"]) == (
        "Hello ",
        "stop_sequence",
        "wor",
    )
    cut = answer(client, max_tokens=3)
    assert (cut["stop_reason"], cut["usage"]["output_tokens"]) == ("max_tokens", 3)
    assert answer(client, max_tokens=50)["stop_reason"] == "max_tokens"
    called = answer(client, tools=DEFINITIONS, max_tokens=45)
    assert called["stop_reason"] == "max_tokens" and called["content"][0]["name"] == "get_weather"
    assert set(called["content"][0]["input"]) <= {"city"}
    assert called["usage"]["output_tokens"] == 45


def test_a_context_that_ends_first(core: ScriptedCore, client: httpx.Client) -> None:
    long = [{"role": "user", "content": "\x00" * 4000}]
    core.texts = ["Hello" * 100]
    assert answer(client, messages=long, max_tokens=10_000)["stop_reason"] == "model_context_window_exceeded"


def test_an_answer_that_was_begun(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = [" world"]
    begun = {"role": "assistant", "content": "Hello"}
    assert answer(client, messages=[USER, begun])["content"][0]["text"] == " world"
    assert core.prompts[0].endswith("<|assistant|>Hello")
    called = {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "now", "input": {}}]}
    assert "results must follow" in refused(post(client, messages=[USER, called], tools=DEFINITIONS))


def test_an_output_format(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = ['{"a": 1}']
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    config = {"effort": "high", "format": {"type": "json_schema", "schema": schema}}
    assert answer(client, output_config=config)["content"][0]["text"] == '{"a": 1}'
    [grammar] = core.grammars
    assert grammar is not None and '"integer"' in grammar.text
    config = {"format": {"type": "json_schema", "schema": {"type": "no such type"}}}
    assert "output_config.format" in refused(post(client, output_config=config))


def test_tokens_are_counted(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = ["Hello", "Hello"]
    for fields in ({}, {"tools": DEFINITIONS, "system": "Be kind."}):
        usage = answer(client, **fields)["usage"]
        counted = post(client, COUNT, **fields)
        assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    assert refused(post(client, COUNT, max_tokens=3)) == "unknown field 'max_tokens': this server does not know it"


def refused(response: httpx.Response, status: int = 400, kind: str = "invalid_request_error") -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error"} and body["type"] == "error"
    assert set(body["error"]) - {"details"} == {"type", "message"} and body["error"]["type"] == kind
    message: str = body["error"]["message"]
    return message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"max_tokens": "3"}, "max_tokens: Input should be a valid integer"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [USER | {"content": [{"type": "audio"}]}]}, "messages.0.content.0"),
        ({"messages": [USER | {"content": [{"type": "text", "text": 3}]}]}, "messages.0.content.0"),
        ({"messages": [USER, {"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
         "messages[1].content[0] is of type 'tool_use'"),
        ({"messages": [USER | {"content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]},
         "messages[0].content[0] is an image, and this model takes text only"),
        ({"temprature": 1}, "unknown field 'temprature'"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers is not supported"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tools": [DEFINITIONS[0]] * 2}, "two functions of the name 'get_weather'"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools.0.name"),
        ({"tools": DEFINITIONS, "tool_choice": {"type": "tool", "name": "x"}}, "'x', which is not in tools"),
        ({"tools": DEFINITIONS, "tool_choice": {"type": "tool"}}, "tool_choice has a name if"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"thinking": {"type": "enabled"}}, "thinking has budget_tokens if"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1024}, "must be less than max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"stop_sequences": ["x"] * 33}, "stop_sequences"),
        ({"messages": [USER | {"content": "\x00" * 5000}]}, "This model's maximum context length is"),
    ],
)  # fmt: skip
def test_what_is_refused(client: httpx.Client, fields: dict[str, Any], words: str) -> None:
    assert words in refused(post(client, **fields))


def test_values_that_ask_for_nothing(core: ScriptedCore, client: httpx.Client) -> None:
    nulls = dict.fromkeys([*MessagesRequest.model_fields, *MESSAGES, *HINTS])
    neutral = {name: values[0] for name, values in MESSAGES.items() if values} | {"metadata": {"user_id": "x"}}
    cached = {"cache_control": {"type": "ephemeral"}}
    content = [{"type": "text", "text": "the weather", "citations": None, **cached}]
    hints = cached | {"system": content, "messages": [USER | {"content": content}], "service_tier": "auto"}
    hints |= {"tools": [DEFINITIONS[0] | cached | {"type": "custom", "strict": True, "allowed_callers": ["direct"]}]}
    core.texts = ["Hello"] * 3
    for fields in (nulls | MINIMAL, neutral, hints):
        assert answer(client, **fields)["content"][0]["text"] == "Hello"
    counted = dict.fromkeys(CountTokensRequest.model_fields) | {"messages": [USER]}
    assert post(client, COUNT, **counted).status_code == 200


def test_errors_by_status(core: ScriptedCore, client: httpx.Client) -> None:
    """Nothing else changes its form: neither other paths, nor the name of a request."""
    assert "no model 'x'" in refused(post(client, model="x"), 404, "not_found_error")
    refused(client.get(CREATE), 405)
    refused(client.post(CREATE, content="x"), 415)
    bad = client.post(CREATE, content="{", headers={"content-type": "application/json", "x-request-id": "r1"})
    assert "not JSON" in refused(bad)
    assert (bad.headers["request-id"], bad.headers["x-request-id"]) == ("r1", "r1")
    core.texts = [FinishReason("abort", message="it broke", status_code=500)]
    assert refused(post(client), 500, "api_error") == "it broke"
    thread = post(client, thread={"type": "create"})
    assert "keeps no conversations" in refused(thread)
    assert thread.json()["error"]["details"] == {"error_code": "thread_unsupported_request"}
    other = client.post("/v1/chat/completions", json={})
    assert other.json()["error"]["param"] == "messages" and "request-id" not in other.headers


def test_an_error_within_a_stream(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = [FinishReason("abort", message="it broke", status_code=500)]
    told = stream(client)
    assert [event["type"] for event in told] == ["message_start", "ping", "error"]
    details = {"error_code": "request_failed"}
    assert told[-1]["error"] == {"type": "api_error", "message": "it broke", "details": details}


def test_refusals_before_the_body(tmp_path: Path) -> None:
    """A wrong key, a full queue, the end of the server."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    path = make_spoken_checkpoint(tmp_path, SPECIAL)
    options: dict[str, Any] = {"chat_template": str(template), "api_key": "secret", "max_queued_requests": 0}
    with scripted(path, **options) as (server, core), httpx.Client(base_url=server.url, timeout=60) as client:
        assert "wrong or missing" in refused(post(client), 401, "authentication_error")
        client.headers["x-api-key"] = "secret"
        core.texts = ["Hello"]
        assert answer(client)["stop_reason"] == "end_turn"
        core.info = replace(core.info, max_running_requests=0)
        full = post(client)
        assert "the queue is full" in refused(full, 529, "overloaded_error") and full.headers["retry-after"]
        server.gate.draining = True
        assert "shutting down" in refused(post(client, COUNT), 529, "overloaded_error")


NUMBER = {"type": "object", "properties": {"number": {"enum": [12, 345]}}, "required": ["number"]}


def test_a_model_that_never_learned_to_call(tiny_checkpoint: str, tmp_path: Path) -> None:
    """A random model calls as it must; what it read before is told as read from the cache."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ tools|length }}")
    tools = [{"name": "give_number", "input_schema": NUMBER | {"additionalProperties": False}}]
    asked = {"tools": tools, "tool_choice": {"type": "tool", "name": "give_number"}, "temperature": 0}
    messages = [{"role": "user", "content": "the cat sat on the mat " * 5}]
    with (
        in_process(tiny_checkpoint, chat_template=str(template), tool_call_parser="hermes") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        first, second = (answer(client, messages=messages, **asked) for _ in range(2))
    assert without_ids(first)["content"] == without_ids(second)["content"]
    [block] = first["content"]
    assert (first["stop_reason"], block["name"]) == ("tool_use", "give_number")
    assert block["input"] in ({"number": 12}, {"number": 345})
    assert first["usage"]["cache_read_input_tokens"] == 0 < second["usage"]["cache_read_input_tokens"]
    assert len({sum(a["usage"][n] for n in ("input_tokens", "cache_read_input_tokens")) for a in (first, second)}) == 1
