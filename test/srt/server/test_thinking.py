"""Thinking before an answer, by a model with random weights: its budget, and forms of what follows it."""

import json
from collections.abc import Iterator
from shutil import copytree
from typing import Any

import httpx
import pytest

from tiny_server import InProcess, in_process

OPENING, CLOSING = "<think>", "</think>"
NAME = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "tame": {"type": "boolean"}},
    "required": ["name", "tame"],
    "additionalProperties": False,
}
OF_NAME = {"type": "json_schema", "json_schema": {"name": "name", "schema": NAME, "strict": True}}
# The prompt opens the thinking, closes it, or leaves it to the model.
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is not defined %}<think>{% elif not enable_thinking %}<think></think>{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """A server of a model with tokens of its own for the beginning and the end of thinking."""
    folder = tmp_path_factory.mktemp("thinking")
    path, template = folder / "checkpoint", folder / "template.jinja"
    copytree(tiny_checkpoint, path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (path / name).read_text()
        (path / name).write_text(text.replace("<|system|>", CLOSING).replace("<|user|>", OPENING))
    template.write_text(TEMPLATE)
    with in_process(str(path), chat_template=str(template), reasoning_parser="qwen3") as server:
        yield server


def post(server: InProcess, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def bias(server: InProcess, closing: float, opening: float = -100.0) -> dict[str, Any]:
    """How much the model tends to end and to begin its thinking."""
    [first], [last] = (post(server, "/tokenize", {"content": text}).json()["tokens"] for text in (OPENING, CLOSING))
    return {"logit_bias": {str(first): opening, str(last): closing}}


def asked(server: InProcess, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the answer of a chat, which is the same as a stream, and its usage."""
    body = {"messages": [{"role": "user", "content": "the cat"}], "temperature": 1.0, "seed": 7} | options
    answer = post(server, "/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    [whole] = answer.json()["choices"]
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    lines = post(server, "/v1/chat/completions", streamed).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    for name in ("reasoning_content", "content"):
        assert "".join(choice["delta"].get(name) or "" for choice in choices) == (whole["message"].get(name) or "")
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    counts, told = answer.json()["usage"], events[-1]["usage"]
    assert {**told, "prompt_tokens_details": None} == {**counts, "prompt_tokens_details": None}
    return whole, counts


@pytest.mark.parametrize("name", ["thinking_token_budget", "thinking_budget", "max_thinking_tokens"])
def test_thinking_ends_at_its_budget(thinker: InProcess, name: str) -> None:
    never = bias(thinker, closing=-100.0)
    end = len(post(thinker, "/tokenize", {"content": f"\n{CLOSING}"}).json()["tokens"])
    for budget in (0, 1, 12):
        told, usage = asked(thinker, **never, **{name: budget}, max_tokens=40, ignore_eos=True)
        thought = usage["completion_tokens_details"]["reasoning_tokens"]
        assert budget + end <= thought <= budget + end + 3, usage  # no character is cut
        assert bool(told["message"].get("reasoning_content")) == bool(budget) and told["message"]["content"]
    told, usage = asked(thinker, **never, **{name: -1}, max_tokens=40, ignore_eos=True)
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 40 and not told["message"]["content"]


def test_a_budget_before_a_form(thinker: InProcess) -> None:
    never = bias(thinker, closing=-100.0)
    told, usage = asked(thinker, **never, thinking_budget=9, response_format=OF_NAME, max_tokens=300)
    assert told["finish_reason"] == "stop" and json.loads(told["message"]["content"]).keys() == {"name", "tame"}
    assert usage["completion_tokens_details"]["reasoning_tokens"] >= 9


def test_a_form_after_thinking(thinker: InProcess) -> None:
    """Where the prompt opens the model's thinking, it is free, and the content that follows it is of the form."""
    soon, never = bias(thinker, closing=100.0), bias(thinker, closing=-100.0)
    told, _ = asked(thinker, **soon, response_format=OF_NAME, max_tokens=300)
    assert told["finish_reason"] == "stop" and json.loads(told["message"]["content"]).keys() == {"name", "tame"}
    told, _ = asked(thinker, **never, response_format=OF_NAME, max_tokens=20)
    assert told["finish_reason"] == "length" and told["message"]["reasoning_content"], told
    assert not told["message"]["content"]
    wrong = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "format": "idn-email"}}}
    body = {"messages": [{"role": "user", "content": "the cat"}], "response_format": wrong}
    answer = post(thinker, "/v1/chat/completions", body)
    assert answer.status_code == 400 and "response_format" in answer.json()["error"]["message"]
    told, _ = asked(thinker, response_format=OF_NAME, separate_reasoning=False, max_tokens=300)
    assert json.loads(told["message"]["content"]).keys() == {"name", "tame"}
