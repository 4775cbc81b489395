"""Anthropic's own client, unmodified. ``pip install 'rtp-llm[test-all]'`` brings it."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mm_parity import draw_image
from pydantic import BaseModel
from recorded_answers import ARGUMENTS, JSON_ARGUMENTS, TOOLS
from scripted_core import SPECIAL, TEMPLATE, ScriptedCore, make_spoken_checkpoint, scripted

from rtp_llm.srt.messages import FinishReason
from tiny_seeing import make_seeing
from tiny_server import in_process

anthropic: Any = pytest.importorskip("anthropic")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("server-in-process")]

WEATHER = f'<tool_call>{{"name": "get_weather", "arguments": {JSON_ARGUMENTS}}}</tool_call>'
USER = {"role": "user", "content": "the weather"}
FUNCTIONS = [tool["function"] for tool in TOOLS]
DEFINITIONS = [{"name": f["name"], "description": f["description"], "input_schema": f["parameters"]} for f in FUNCTIONS]
ASKED = {"model": "tiny", "max_tokens": 300, "messages": [USER]}


def connected(url: str, api_key: str = "none") -> Any:
    return anthropic.Anthropic(base_url=url, api_key=api_key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedCore, Any]]:
    folder = tmp_path_factory.mktemp("spoken")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    path = make_spoken_checkpoint(folder, SPECIAL)
    options: dict[str, Any] = {"chat_template": str(template), "api_key": "secret"}
    with scripted(path, **options) as (server, core), connected(server.url, "secret") as client:
        yield core, client


def test_a_message(running: tuple[ScriptedCore, Any]) -> None:
    core, client = running
    core.texts = ["<think>Hm</think>Hello"]
    message = client.messages.create(
        **ASKED, system="Be kind.", metadata={"user_id": "x"}, extra_body={"temperature": 0}
    )
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert (message.content[1].text, message.stop_reason, message.model) == ("Hello", "end_turn", "tiny")
    assert message.usage.output_tokens > 0 and message._request_id
    assert [model.id for model in client.models.list()] == ["tiny"]
    count = client.messages.count_tokens(model="tiny", messages=[USER], system="Be kind.")
    assert count.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens


def test_a_stream(running: tuple[ScriptedCore, Any]) -> None:
    core, client = running
    core.texts = [f"<think>Hm</think>Hello {WEATHER}"] * 3
    whole = client.messages.create(**ASKED, tools=DEFINITIONS)
    with client.messages.stream(**ASKED, tools=DEFINITIONS) as stream:
        text = "".join(stream.text_stream)
    streamed = stream.get_final_message()
    assert text == "Hello" and streamed.content[2].input == ARGUMENTS
    told = [
        (message.stop_reason, message.usage, [block.model_dump(exclude={"id"}) for block in message.content])
        for message in (whole, streamed)
    ]
    assert told[0] == told[1]
    events = [event.type for event in client.messages.create(**ASKED, tools=DEFINITIONS, stream=True)]
    assert events[0] == "message_start" and events[-2:] == ["message_delta", "message_stop"]


def test_a_loop_with_a_tool(running: tuple[ScriptedCore, Any]) -> None:
    """By hand, as a stream, and by the client's own runner."""
    core, client = running
    core.texts, core.prompts = [f"<think>Hm</think>{WEATHER}", "Sunny"] * 2, []
    with client.messages.stream(**ASKED, tools=DEFINITIONS) as stream:
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    call = next(block for block in first.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sun"}]}
    messages = [USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(**ASKED | {"messages": messages}, tools=DEFINITIONS)
    assert second.content[0].text == "Sunny" and core.prompts[1].startswith(core.prompts[0])

    @anthropic.beta_tool
    def get_weather(city: str, days: int) -> str:
        """The weather"""
        return f"sun in {city} for {days} days"

    last = client.beta.messages.tool_runner(**ASKED, tools=[get_weather]).until_done()
    assert last.content[0].text == "Sunny" and "sun in " in core.prompts[3]


class City(BaseModel):
    name: str


def test_an_output_format(running: tuple[ScriptedCore, Any]) -> None:
    core, client = running
    core.texts = ['{"name": "Paris"}']
    parsed = client.messages.parse(**ASKED, output_format=City)
    assert parsed.parsed_output == City(name="Paris")


def test_errors(running: tuple[ScriptedCore, Any]) -> None:
    core, client = running
    with pytest.raises(anthropic.BadRequestError, match="stop_sequences") as caught:
        client.messages.create(**ASKED, stop_sequences=["x"] * 33)
    assert caught.value.type == "invalid_request_error" and caught.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**ASKED | {"model": "x"})
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(**ASKED)
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        client.messages.create(**ASKED | {"messages": [{"role": "user", "content": "\x00" * 5000}]})
    broken = FinishReason("abort", message="it broke", status_code=500)
    core.texts = [broken, broken]
    with pytest.raises(anthropic.InternalServerError, match="it broke"):
        client.messages.create(**ASKED)
    with pytest.raises(anthropic.APIStatusError, match="it broke"), client.messages.stream(**ASKED) as stream:
        stream.until_done()


def test_an_image(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    draw_image(56, 84, seed=1).save(buffer, "PNG")
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(buffer.getvalue()).decode()}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]
    asked = ASKED | {"max_tokens": 8, "extra_body": {"top_k": 1}, "messages": [{"role": "user", "content": content}]}
    with in_process(make_seeing(tmp_path)) as server, connected(server.url) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
        counted = client.messages.count_tokens(model="tiny", messages=asked["messages"])
        blind = client.messages.count_tokens(model="tiny", messages=[{"role": "user", "content": content[1:]}])
    assert [b.model_dump() for b in streamed.content] == [b.model_dump() for b in whole.content]
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert counted.input_tokens > blind.input_tokens + 3
