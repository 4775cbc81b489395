"""Thinking before an answer, by a model with random weights: its budget, and forms of what follows it."""

import json
import re
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
    "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}"
    "{% if enable_thinking is not defined %}<think>{% elif not enable_thinking %}<think></think>{% endif %}{% endif %}"
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


TAG = {"structures": [{"begin": "<f>", "schema": {"enum": [12]}, "end": "</f>"}], "triggers": ["<"]}
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "response_format": ({"response_format": OF_NAME}, r'\{\s*"name"\s*:\s*".*",\s*"tame"\s*:\s*(true|false)\s*\}'),
    "json": ({"structured_outputs": {"json": {"enum": [12, 345]}}}, "12|345"),
    "regex": ({"regex": "[ab]{3,5}c"}, "[ab]{3,5}c"),
    "choice": ({"structured_outputs": {"choice": ["the dog", "a tree"]}}, "the dog|a tree"),
    "ebnf": ({"ebnf": 'root ::= ("ab" | "cd") "e"'}, "abe|cde"),
    "grammar": ({"structured_outputs": {"grammar": 'start: "ab" "e"?'}}, "abe?"),
    "structural_tag": ({"structural_tag": TAG}, "([^<]|<f>12</f>)*"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_after_thinking(thinker: InProcess, form: str) -> None:
    """Where the model thinks, it is free, and the content that follows it is of the form."""
    grammar, pattern = FORMS[form]
    soon, never = bias(thinker, closing=100.0), bias(thinker, closing=-100.0)
    told, _ = asked(thinker, **soon, **grammar, thinking_budget=5, max_tokens=100)
    content = told["message"]["content"]
    assert re.fullmatch(pattern, content, re.DOTALL) or (form, told["finish_reason"]) == ("structural_tag", "length")
    told, _ = asked(thinker, **never, **grammar, max_tokens=20)
    assert told["finish_reason"] == "length" and told["message"]["reasoning_content"], told
    assert not told["message"]["content"]


@pytest.mark.parametrize("thinks", [True, False])
def test_a_form_of_a_model_that_opens_its_thinking_itself(thinker: InProcess, thinks: bool) -> None:
    grammar = bias(thinker, closing=-100.0, opening=100.0 if thinks else -100.0) | {"regex": "[ab]{3}"}
    left = {"chat_template_kwargs": {"enable_thinking": True}}
    told, usage = asked(thinker, **grammar, **left, thinking_budget=5, max_tokens=60)
    assert told["finish_reason"] == "stop" and re.fullmatch("[ab]{3}", told["message"]["content"]), told
    assert bool(told["message"].get("reasoning_content")) == thinks
    assert (usage["completion_tokens_details"]["reasoning_tokens"] >= 5) == thinks


def test_a_form_without_thinking(thinker: InProcess) -> None:
    """The prompt has closed the thinking, or it is not told from the content: no other is opened."""
    grammar = bias(thinker, closing=-100.0, opening=100.0) | {"regex": "[ab]{3}"}
    for switch in ({"chat_template_kwargs": {"enable_thinking": False}}, {"separate_reasoning": False}):
        told, _ = asked(thinker, **grammar, **switch, max_tokens=60)
        assert re.fullmatch("[ab]{3}", told["message"]["content"]), told


def test_a_wrong_form_after_thinking(thinker: InProcess) -> None:
    wrong = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "format": "idn-email"}}}
    body = {"messages": [{"role": "user", "content": "the cat"}], "response_format": wrong}
    answer = post(thinker, "/v1/chat/completions", body)
    assert answer.status_code == 400 and "response_format" in answer.json()["error"]["message"]
