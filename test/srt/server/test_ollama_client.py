"""Ollama's own client, unmodified. ``pip install 'rtp-llm[test-all]'`` brings it."""

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mm_parity import draw_image
from programs import check_installed, result_of
from pydantic import BaseModel
from scripted_core import SPECIAL, TEMPLATE, ScriptedCore, make_spoken_checkpoint, scripted

from rtp_llm.srt.messages import FinishReason
from tiny_seeing import make_seeing
from tiny_server import in_process

ollama: Any = pytest.importorskip("ollama")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("server-in-process")]

USER = {"role": "user", "content": "the weather"}
ADD = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
DOUBLE = '<tool_call>{"name": "double", "arguments": {"number": 5}}</tool_call>'
KEY = {"authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedCore, Any]]:
    folder = tmp_path_factory.mktemp("spoken")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    options: dict[str, Any] = {"chat_template": str(template), "api_key": "secret"}
    with (
        scripted(make_spoken_checkpoint(folder, SPECIAL), **options) as (server, core),
        ollama.Client(server.url, headers=KEY, timeout=60) as client,
    ):
        yield core, client


def test_a_chat(running: tuple[ScriptedCore, Any]) -> None:
    core, client = running
    core.texts = ["<think>Hm</think>Hello"] * 3
    whole = client.chat("tiny", [USER], think=True, options={"temperature": 0, "num_ctx": 2048}, keep_alive="5m")
    assert (whole.message.content, whole.message.thinking, whole.done_reason) == ("Hello", "Hm", "stop")
    assert whole.eval_count > 0 and whole.total_duration >= whole.eval_duration > 0
    parts = list(client.chat("tiny", [USER], stream=True, options=ollama.Options(temperature=0)))
    assert "".join(part.message.content for part in parts) == "Hello" and parts[-1].eval_count == whole.eval_count
    assert "".join(part.message.thinking or "" for part in parts) == "Hm"
    assert client.chat("tiny:latest", [ollama.Message(**USER)])["message"]["content"] == "Hello"


def test_a_completion(running: tuple[ScriptedCore, Any]) -> None:
    core, client = running
    core.texts, core.prompts = ["Hello", " world", "Hello", "raw"], []
    first = client.generate("tiny", "the weather", system="Be kind.")
    assert first.response == "Hello"
    assert client.generate("tiny", "again", context=first.context).response == " world"
    assert core.prompts[1].startswith(core.prompts[0] + "Hello")
    assert "".join(part.response for part in client.generate("tiny", "the weather", stream=True)) == "Hello"
    assert client.generate("tiny", "the weather", raw=True).response == "raw" and core.prompts[-1] == "the weather"


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number
        b: The second number
    """
    return a + b


def double(number: int) -> int:
    """Double a number."""
    return 2 * number


def whole_message(told: Any, streams: bool) -> Any:
    """Return the message of an answer, or that of a stream's parts together."""
    if not streams:
        return told.message
    parts = [part.message for part in told]
    return ollama.Message(
        role="assistant",
        content="".join(part.content for part in parts),
        thinking="".join(part.thinking or "" for part in parts),
        tool_calls=[call for part in parts for call in part.tool_calls or ()],
    )


@pytest.mark.parametrize("streams", [False, True])
def test_a_loop_with_two_tools(running: tuple[ScriptedCore, Any], streams: bool) -> None:
    core, client = running
    core.texts, core.prompts = [f"<think>Hm</think>{ADD}", DOUBLE, "It is 10."], []
    functions = {function.__name__: function for function in (add, double)}
    messages: list[Any] = [{"role": "user", "content": "2 + 3, doubled"}]
    while True:
        told = client.chat("tiny", messages, tools=[add, double], stream=streams)
        messages.append(message := whole_message(told, streams))
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            result = str(functions[call.function.name](**call.function.arguments))
            messages.append({"role": "tool", "tool_name": call.function.name, "content": result})
    assert message.content == "It is 10."
    assert "The first number" in core.prompts[0] and "<|tool|>5<|end|>" in core.prompts[1]
    assert core.prompts[2].endswith("<|tool|>10<|end|><|assistant|>") and "Hm" in core.prompts[2]


class City(BaseModel):
    name: str
    people: int


def test_a_format(running: tuple[ScriptedCore, Any]) -> None:
    core, client = running
    core.texts, core.grammars = ['{"name": "Paris", "people": 2}', "{}"], []
    told = client.chat("tiny", [USER], format=City.model_json_schema())
    assert City.model_validate_json(told.message.content) == City(name="Paris", people=2)
    assert client.generate("tiny", "the weather", format="json").response == "{}"
    assert None not in core.grammars


def test_models(running: tuple[ScriptedCore, Any]) -> None:
    _, client = running
    [listed], [loaded] = client.list().models, client.ps().models
    assert listed.model == loaded.name == "tiny:latest" and listed.digest == loaded.digest
    assert loaded.context_length == client.show("tiny").modelinfo["llama.context_length"] == 4096
    assert client.show(listed.model).capabilities == ["completion", "tools", "thinking"]


def test_errors(running: tuple[ScriptedCore, Any]) -> None:
    core, client = running
    for status, words, ask in (
        (404, "'x' not found", lambda: client.chat("x", [USER])),
        (400, "mirostat is not supported", lambda: client.chat("tiny", [USER], options={"mirostat": 1})),
        (400, "maximum context length", lambda: client.generate("tiny", "\x00" * 5000)),
        (400, "one model", lambda: client.pull("x")),
        (400, "one model", lambda: list(client.pull("x", stream=True))),
        (400, "one model", lambda: client.delete("tiny")),
        (400, "no output 'embed'", lambda: client.embed("tiny", "x")),
    ):
        with pytest.raises(ollama.ResponseError, match=words) as caught:
            ask()
        assert caught.value.status_code == status
    with (
        pytest.raises(ollama.ResponseError, match="wrong or missing"),
        ollama.Client(str(client._client.base_url)) as stranger,
    ):
        stranger.list()
    core.texts = [FinishReason("abort", message="it broke", status_code=500)]
    with pytest.raises(ollama.ResponseError, match="it broke"):
        list(client.chat("tiny", [USER], stream=True))


def test_the_asynchronous_client(running: tuple[ScriptedCore, Any]) -> None:
    core, client = running
    core.texts = ["Hello"]

    async def ask() -> str:
        async with ollama.AsyncClient(str(client._client.base_url), headers=KEY, timeout=60) as other:
            return "".join([part.message.content async for part in await other.chat("tiny", [USER], stream=True)])

    assert asyncio.run(ask()) == "Hello"


LITELLM = """
import json
import litellm
from pydantic import BaseModel

class City(BaseModel):
    name: str
    people: int

user = {"role": "user", "content": "the weather"}
asked = {"model": "ollama_chat/tiny", "api_base": "URL", "api_key": "secret"}
[choice] = litellm.completion(messages=[user], temperature=0, max_tokens=90, **asked).choices
told = [choice.message.content, choice.message.reasoning_content]
chunks = litellm.completion(messages=[user], stream=True, **asked)
told.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
function = {"name": "add", "description": "Add", "parameters": {"type": "object", "properties": {}}}
asked_with = asked | {"tools": [{"type": "function", "function": function}]}
called = litellm.completion(messages=[user], **asked_with).choices[0].message
[call] = called.tool_calls
told += [call.function.name, json.loads(call.function.arguments)]
messages = [user, called, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
told.append(litellm.completion(messages=messages, **asked_with).choices[0].message.content)
city = litellm.completion(messages=[user], response_format=City, **asked).choices[0].message.content
print("RESULT", json.dumps([*told, City.model_validate_json(city).model_dump()]))
"""


def test_litellm(running: tuple[ScriptedCore, Any], tmp_path: Path) -> None:
    """Another program that speaks Ollama's API."""
    check_installed("litellm")
    core, client = running
    core.texts = ["<think>Hm</think>Hello", "Hello", ADD, "It is 5.", '{"name": "Paris", "people": 2}']
    hello, thought, streamed, name, arguments, sum_, city = result_of(
        LITELLM.replace("URL", str(client._client.base_url)), tmp_path
    )
    assert (hello, thought, streamed) == ("Hello", "Hm", "Hello")
    assert (name, arguments, sum_) == ("add", {"a": 2, "b": 3}, "It is 5.")
    assert city == {"name": "Paris", "people": 2}


def test_an_image(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    draw_image(56, 84, seed=1).save(buffer, "PNG")
    options = {"temperature": 0, "num_predict": 8}
    with in_process(make_seeing(tmp_path)) as server, ollama.Client(server.url, timeout=60) as client:
        message = {"role": "user", "content": "What is this?", "images": [buffer.getvalue()]}
        whole = client.chat("tiny", [message], options=options)
        prompted = client.generate("tiny", "What is this?", images=[buffer.getvalue()], options=options)
        blind = client.chat("tiny", [message | {"images": []}], options=options)
        assert "vision" in client.show("tiny").capabilities
    assert whole.message.content == prompted.response and prompted.context is None
    assert whole.prompt_eval_count == prompted.prompt_eval_count > blind.prompt_eval_count + 3


def test_log_probabilities_of_a_model(tiny_checkpoint: str) -> None:
    with in_process(tiny_checkpoint) as server, ollama.Client(server.url, timeout=60) as client:
        options = {"num_predict": 4, "temperature": 0}
        told = client.generate("tiny", "the cat", logprobs=True, top_logprobs=2, options=options)
        parts = list(client.generate("tiny", "the cat", stream=True, logprobs=True, options=options))
    assert told.eval_count and [len(item.top_logprobs) for item in told.logprobs] == [2] * told.eval_count
    assert sum(len(part.logprobs or ()) for part in parts) == told.eval_count
