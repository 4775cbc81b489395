"""Tool calls and thinking over HTTP, for the openai package: what the server makes of what a model says."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from recorded_answers import CALL, JSON_ARGUMENTS, TOOLS
from scripted_core import SPECIAL, TEMPLATE, ScriptedCore, make_spoken_checkpoint, scripted

from rtp_llm.srt.constrained.llguidance_backend import LLGuidanceBackend
from rtp_llm.srt.entrypoints import chat_request
from rtp_llm.srt.entrypoints.openai.answers import Answer
from rtp_llm.srt.entrypoints.openai.protocol import MAX_TOOLS, MAX_TOOLS_CHARS, ChatCompletionRequest
from rtp_llm.srt.parser.events import Content, Reasoning
from rtp_llm.srt.request_spec import GrammarSpec
from tiny_server import InProcess, in_process

WEATHER = f'<tool_call>{{"name": "get_weather", "arguments": {JSON_ARGUMENTS}}}</tool_call>'
NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
USER = {"role": "user", "content": "the weather"}


@pytest.fixture(scope="module")
def core_and_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedCore, openai.OpenAI]]:
    folder = tmp_path_factory.mktemp("spoken")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    path = make_spoken_checkpoint(folder, SPECIAL)
    with scripted(path, chat_template=str(template)) as (server, core), connected(server) as client:
        yield core, client


def connected(server: InProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def core(core_and_client: tuple[ScriptedCore, openai.OpenAI]) -> ScriptedCore:
    return core_and_client[0]


@pytest.fixture
def client(core_and_client: tuple[ScriptedCore, openai.OpenAI]) -> openai.OpenAI:
    return core_and_client[1]


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**({"model": "tiny", "messages": [USER], "tools": TOOLS} | options))


def told(message: Any) -> tuple[str | None, str | None, list[tuple[str, Any]]]:
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    assert getattr(message, "reasoning", None) == getattr(message, "reasoning_content", None)
    return message.content, getattr(message, "reasoning", None), calls


def gathered(chunks: list[ChatCompletionChunk]) -> tuple[str | None, str | None, list[tuple[str, Any]]]:
    """Return what the chunks of a stream say together, in the form of ``told``."""
    content, reasoning = "", ""
    names: list[str] = []
    arguments: list[str] = []
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(names) and call.type == "function"
                names.append(call.function.name)
                arguments.append("")
            arguments[call.index] += call.function.arguments
    calls = list(zip(names, arguments, strict=True))
    return content or (None if calls else ""), reasoning or None, calls


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        ("Hello  ", "Hello  ", None, []),
        ("<think>\nHm\n</think>\n\nHello", "Hello", "Hm", []),
        (
            f"<think>Hm</think>I look.\n{WEATHER}\n{NOW}",
            "I look.",
            "Hm",
            [("get_weather", JSON_ARGUMENTS), ("now", "{}")],
        ),
        (NOW, None, None, [("now", "{}")]),
        ("<tool_call>now</tool_call>", "<tool_call>now</tool_call>", None, []),
    ],
)
def test_whole_and_streamed(
    core: ScriptedCore, client: openai.OpenAI, text: str, content: str, reasoning: str, calls: list[tuple[str, str]]
) -> None:
    core.texts = [text, text]
    whole: ChatCompletion = chat(client)
    assert told(whole.choices[0].message) == (content, reasoning, calls)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert gathered(chunks) == (content, reasoning, calls)
    reasons = {c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason}
    assert reasons == {whole.choices[0].finish_reason} == {"tool_calls" if calls else "stop"}
    assert chunks[-1].usage == whole.usage and whole.usage is not None
    details = whole.usage.completion_tokens_details
    assert details is not None
    assert bool(details.reasoning_tokens) == bool(reasoning)
    assert (details.reasoning_tokens or 0) < whole.usage.completion_tokens
    ids = [call.id for call in whole.choices[0].message.tool_calls or ()]
    assert len(set(ids)) == len(calls) and all(ids)


def test_a_loop_with_a_tool(core: ScriptedCore, client: openai.OpenAI) -> None:
    """The call and its result come back into the prompt, in the template's form."""
    core.texts, core.prompts = [f"<think>Hm</think>{WEATHER}", "Sunny"], []
    message = chat(client).choices[0].message
    [call] = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == CALL
    result = {"role": "tool", "tool_call_id": call.id, "content": "sun, 21 degrees"}
    answer = chat(client, messages=[USER, message.model_dump(exclude_none=True), result])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Sunny", "stop")
    first, second = core.prompts
    history = f"<think>Hm</think>{WEATHER}<|end|><|tool|>sun, 21 degrees<|end|><|assistant|>"
    assert second.replace("\\u00e9", "é") == (first + history) and '"get_weather"' in first


def test_tool_choice(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts, core.prompts = [NOW, NOW, NOW], []
    assert chat(client, tool_choice="auto").choices[0].message.tool_calls
    assert chat(client, tool_choice="none").choices[0].message.content == NOW
    assert [("get_weather" in prompt) for prompt in core.prompts] == [True, False]
    assert chat(client, tools=openai.NOT_GIVEN).choices[0].message.content == NOW
    with pytest.raises(openai.BadRequestError, match="not in tools") as caught:
        chat(client, tool_choice={"type": "function", "function": {"name": "x"}})
    assert caught.value.param == "tool_choice"
    with pytest.raises(openai.BadRequestError, match="there are no tools") as caught:
        chat(client, tool_choice="required", tools=openai.NOT_GIVEN)
    assert caught.value.param == "tool_choice"


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_allowed_tools(core: ScriptedCore, client: openai.OpenAI) -> None:
    """The model sees all tools, and can call those that are allowed; with ``auto`` their arguments may be any."""
    core.texts, core.prompts, core.grammars = ["Hello", NOW, NOW], [], []
    for mode in ("auto", "required"):
        chat(client, tool_choice=allowed(mode, "now"))
    chat(client, tool_choice=allowed("auto", "now", "get_weather"), tools=[strict_of(TOOLS[0]), TOOLS[1]])
    assert all("get_weather" in prompt and "now" in prompt for prompt in core.prompts)
    free, demanded, both = ["" if spec is None else spec.text for spec in core.grammars]
    assert "now" in free and "get_weather" not in free and "now" in demanded and "get_weather" not in demanded
    tokens = LLGuidanceBackend(core.tokenizer, len(core.tokenizer))

    def takes(grammar: str, text: str) -> bool:
        matcher = tokens.compile(GrammarSpec("grammar", grammar), [])
        return all(matcher.accept(token_id) for token_id in core.tokenizer(text)["input_ids"])

    assert takes(free, f"I look. {NOW}") and not takes(free, WEATHER) and takes(free, "get_weather")
    assert takes(demanded, NOW) and not takes(demanded, "I look") and not takes(demanded, WEATHER)
    assert takes(both, WEATHER + NOW) and not takes(both, WEATHER.replace("3", '"3"'))
    for choice in (allowed("auto", "now", "later"), allowed("required", "later")):
        with pytest.raises(openai.BadRequestError, match="'later', which is not in tools") as caught:
            chat(client, tool_choice=choice)
        assert caught.value.param == "tool_choice"


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_two_functions_of_one_name(client: openai.OpenAI, choice: str) -> None:
    with pytest.raises(openai.BadRequestError, match="two functions of the name 'now'") as caught:
        chat(client, tools=[*TOOLS, TOOLS[1]], tool_choice=choice)
    assert caught.value.param == "tools"


def test_thinking_in_one_piece(core: ScriptedCore, client: openai.OpenAI) -> None:
    text = f"<think>{'Hm, hm. ' * 20}</think>Hello"
    core.texts = [text, text]
    for most in (None, 60):
        chunks = list(chat(client, stream=True, max_tokens=most, extra_body={"stream_reasoning": False}))
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
        [thought] = [thought for delta in deltas if (thought := getattr(delta, "reasoning_content", None))]
        assert ("Hm, hm. " * 20).startswith(thought) and gathered(chunks)[0] == ("Hello" if most is None else "")


@pytest.mark.parametrize("is_streamed", [True, False])
def test_when_thinking_is_told(is_streamed: bool) -> None:
    asked = ChatCompletionRequest.model_validate({"messages": [USER], "stream_reasoning": is_streamed})
    completion = SimpleNamespace(finished=False)
    events = iter([[Reasoning("Hm, ")], [Reasoning("hm.")], [Content("Hello")], [Reasoning("Oh")], []])
    said: Any = SimpleNamespace(completion=completion, events=lambda text: next(events))
    answer = Answer(asked, said)
    told = []
    for completion.finished in (False, False, False, False, True):
        told.append([delta.get("reasoning", delta.get("content")) for delta in answer.deltas("")])
    whole = [[], [], ["Hm, hm.", "Hello"], [], ["Oh"]]
    assert told == ([["Hm, "], ["hm."], ["Hello"], ["Oh"], []] if is_streamed else whole)


def test_calls_that_are_demanded(core: ScriptedCore, client: openai.OpenAI) -> None:
    """The answer is under a grammar in the model's own format, special tokens by their ids."""
    core.texts, core.grammars = [NOW, NOW, NOW], []
    named = {"type": "function", "function": {"name": "now"}}
    for choice in ("auto", "required", named):
        assert chat(client, tool_choice=choice).choices[0].finish_reason == "tool_calls"
    first, second, third = [None if spec is None else spec.text for spec in core.grammars]
    assert first is None and second is not None and third is not None
    assert all(re.search(r"<\[\d+\]>", text) and "now" in text for text in (second, third))
    assert ("get_weather" in second, "get_weather" in third) == (True, False)


OF_NUMBER = {"type": "json_schema", "json_schema": {"name": "number", "schema": {"enum": [12, 345]}}}


def test_a_form_of_the_content_beside_calls_that_are_demanded(core: ScriptedCore, client: openai.OpenAI) -> None:
    """There is no content then, and the calls' grammar alone counts."""
    core.texts, core.grammars = [NOW, NOW], []
    for options in ({}, {"response_format": OF_NUMBER}):
        assert chat(client, tool_choice="required", **options).choices[0].finish_reason == "tool_calls"
    assert core.grammars[0] == core.grammars[1] and core.grammars[0].around is None


TWO = f"{NOW}{WEATHER}"
ALL_TEXTS = ("12", "13", "<think>Hm</think>12", "Hm</think>12", NOW, f"<think>Hm</think>{NOW}", f"Hm</think>{NOW}", TWO)


@pytest.mark.parametrize(
    ("thinks", "options", "taken"),
    [
        (False, {"tools": TOOLS}, ["12", "<think>Hm</think>12", NOW, f"<think>Hm</think>{NOW}", TWO]),
        (False, {"tools": TOOLS, "parallel_tool_calls": False},
         ["12", "<think>Hm</think>12", NOW, f"<think>Hm</think>{NOW}"]),
        (False, {"tools": TOOLS, "tool_choice": "none"}, ["12", "<think>Hm</think>12"]),
        (True, {"tools": TOOLS}, ["Hm</think>12", f"Hm</think>{NOW}"]),
    ],
)  # fmt: skip
def test_a_form_of_the_content(
    core: ScriptedCore, client: openai.OpenAI, thinks: bool, options: dict[str, Any], taken: list[str]
) -> None:
    """A model may think before it, and call tools instead."""
    core.texts, core.grammars = ["12"], []
    variables = {"chat_template_kwargs": {"enable_thinking": thinks}}
    chat(client, response_format=OF_NUMBER, extra_body=variables, **options)
    spec = core.grammars[0]
    assert spec is not None
    for text in ALL_TEXTS:
        assert takes(core, spec, text) == (text in taken), text


def takes(core: ScriptedCore, spec: GrammarSpec, text: str) -> bool:
    """Whether a grammar lets a model write this text and end it."""
    tokenizer = core.tokenizer
    matcher = LLGuidanceBackend(tokenizer, len(tokenizer)).compile(spec, [tokenizer.eos_token_id])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not all(matcher.accept(token_id) for token_id in ids):
        return False
    return matcher.is_complete or matcher.accept(tokenizer.eos_token_id)


@pytest.mark.parametrize("strict", [False, True])
def test_a_form_of_the_content_beside_strict_tools(core: ScriptedCore, client: openai.OpenAI, strict: bool) -> None:
    core.texts, core.grammars = ["12"], []
    tool = function_of({"type": "object", "properties": {"a": {"type": "string"}}})
    tool["function"]["strict"] = strict
    chat(client, tools=[tool], response_format=OF_NUMBER)
    spec = core.grammars[0]
    assert spec is not None and takes(core, spec, "12")
    assert takes(core, spec, '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>') != strict


def test_demands_that_cannot_be_met(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {"type": "object", "properties": {"a": {"multipleOf": 0.5}}}
    with pytest.raises(openai.BadRequestError, match="the parameters of f: multipleOf") as caught:
        chat(client, tools=[function_of(parameters)], tool_choice="required")
    assert caught.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="another field for a grammar") as caught:
        chat(client, tool_choice="required", extra_body={"regex": "a+"})
    assert caught.value.param == "tool_choice"
    monkeypatch.setattr(chat_request, "MAX_GRAMMAR_CHARS", 100)
    with pytest.raises(openai.BadRequestError, match="characters; at most") as caught:
        chat(client, tool_choice="required")
    assert caught.value.param == "tools"


UNKNOWN_KEYWORDS = {"type": "object", "properties": {"a": {"not": {}}, "b": {"type": "array", "uniqueItems": True}}}


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools", "tools of type 'custom' are not supported"),
        ({"functions": [TOOLS[0]["function"]]}, "functions", "give tools"),
        ({"function_call": {"name": "now"}}, "function_call", "give tool_choice"),
        ({"parameters": {"type": "string"}}, "tools", "must be the schema of an object, not of type 'string'"),
        ({"parameters": {"type": ["null"]}}, "tools", "must be the schema of an object"),
        ({"parameters": UNKNOWN_KEYWORDS, "tool_choice": "required"}, "tools",
         "tool_choice: the parameters of f: keywords that cannot be enforced: not"),
    ],
)  # fmt: skip
def test_tools_of_other_kinds(client: openai.OpenAI, options: dict[str, Any], param: str, words: str) -> None:
    given = dict(options)
    if "parameters" in given:
        given["tools"] = [function_of(given.pop("parameters"))]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[USER], **given)  # type: ignore[call-overload]
    assert caught.value.param == param and words in caught.value.message


def test_arguments_of_no_certain_type(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts = ["ok", "ok"]
    for kind in ({}, {"type": ["object", "null"]}):
        assert chat(client, tools=[function_of(kind)]).choices[0].message.content == "ok"


def strict_of(tool: dict[str, Any], is_strict: bool = True) -> dict[str, Any]:
    return {"type": "function", "function": tool["function"] | {"strict": is_strict}}


def test_strict_functions(core: ScriptedCore, client: openai.OpenAI) -> None:
    """With one among the tools, text is free, calls are of the tools, and the arguments of this one fit its schema."""
    core.texts, core.grammars, core.prompts = [f"I look. {WEATHER}"] * 4, [], []
    tools = [strict_of(TOOLS[0]), strict_of(TOOLS[1], is_strict=False)]
    assert chat(client, tools=tools).choices[0].message.content == "I look."
    assert gathered(list(chat(client, tools=tools, stream=True)))[2] == [("get_weather", JSON_ARGUMENTS)]
    assert chat(client, tools=tools, tool_choice="none").choices[0].message.tool_calls is None
    assert chat(client, tools=[strict_of(TOOLS[0], is_strict=False)]).choices[0].message.tool_calls
    first, streamed, none, loose = core.grammars
    assert first is not None and first == streamed and none is None and loose is None
    assert '"days"' in first.text and "TEXT" in first.text and core.prompts[0] == core.prompts[1]


def test_strict_functions_that_cannot_be(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = strict_of(function_of({"type": "object", "properties": {"a": {"multipleOf": 0.5}}}))
    with pytest.raises(openai.BadRequestError, match="strict: the parameters of f: multipleOf") as caught:
        chat(client, tools=[odd])
    assert caught.value.param == "tools"
    monkeypatch.setattr(chat_request, "MAX_GRAMMAR_CHARS", 100)
    with pytest.raises(openai.BadRequestError, match="strict: the grammar of these 1 tools") as caught:
        chat(client, tools=[strict_of(TOOLS[0])])
    assert caught.value.param == "tools"


def test_strict_functions_in_a_form_without_json(tmp_path: Path) -> None:
    path = make_spoken_checkpoint(tmp_path, SPECIAL)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "a"}}}
    with (
        scripted(path, chat_template=str(template), tool_call_parser="qwen3_coder") as (server, core),
        connected(server) as client,
    ):
        core.texts = ["ok"]
        assert chat(client, tools=[function_of(schema)]).choices[0].message.content == "ok"
        with pytest.raises(openai.BadRequestError, match=r"the parameters of f: strings with pattern.*leave it out"):
            chat(client, tools=[strict_of(function_of(schema))])


def function_of(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


@pytest.mark.parametrize("depth", [90, 900])
def test_schemas_that_are_nested_deeply(core: ScriptedCore, client: openai.OpenAI, depth: int) -> None:
    """They are taken or refused, and no error of the server."""
    parameters: dict[str, Any] = {}
    for _ in range(depth):
        parameters = {"type": "array", "items": parameters}
    for choice in ("auto", "required"):
        core.texts = [NOW]
        with suppress(openai.BadRequestError):
            chat(client, tools=[function_of({"properties": {"a": parameters}})], tool_choice=choice)


NUMBER = {
    "type": "object",
    "properties": {"number": {"enum": [12, 345]}},
    "required": ["number"],
    "additionalProperties": False,
}


def server_token(server: InProcess, text: str) -> int:
    [token_id] = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "add_special_tokens": False}).json()[
        "tokens"
    ]
    return int(token_id)


@pytest.mark.parametrize("parser", ["hermes", "qwen3_coder", "mistral", "llama3_json", "pythonic"])
def test_a_model_that_never_learned_to_call(tiny_checkpoint: str, tmp_path: Path, parser: str) -> None:
    """A random model calls as it must."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ tools|length }}")
    tools = [{"type": "function", "function": {"name": "give_number", "parameters": NUMBER}}]
    options: dict[str, Any] = {"chat_template": str(template), "tool_call_parser": parser}
    with in_process(tiny_checkpoint, **options) as server, connected(server) as client:
        asked = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
        choice = chat(client, **asked).choices[0]
        [call] = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert json.loads(call.function.arguments) in ({"number": 12}, {"number": 345})
        strict = [tools[0] | {"function": tools[0]["function"] | {"strict": True}}]
        opens = {"llama3_json": "{", "pythonic": "["}.get(parser)
        if opens is not None:  # what begins a call, the model is made to begin with
            token_id = server_token(server, opens)
            options = {"tools": strict, "parallel_tool_calls": False, "n": 4, "logit_bias": {token_id: 100}}
            for choice in chat(client, max_tokens=100, seed=3, **options).choices:
                [call] = choice.message.tool_calls
                assert json.loads(call.function.arguments) in ({"number": 12}, {"number": 345})
        refused = {"type": "object", "not": {"required": ["a"]}}
        with pytest.raises(openai.BadRequestError, match="the parameters of f"):
            chat(client, tools=[function_of(refused)], tool_choice="required")


def test_one_call_at_a_time(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts = [WEATHER + NOW] * 2
    assert len(chat(client, parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    assert len(gathered(list(chat(client, parallel_tool_calls=False, stream=True)))[2]) == 1


def test_what_becomes_of_thinking(core: ScriptedCore, client: openai.OpenAI) -> None:
    text = "<think>Hm</think>\nHello"
    core.texts = [text] * 4
    for options, content, reasoning in (
        ({}, "Hello", "Hm"),
        ({"separate_reasoning": False}, text, None),
        ({"include_reasoning": False}, "Hello", None),
    ):
        assert told(chat(client, extra_body=options).choices[0].message) == (content, reasoning, [])
    usage = chat(client, extra_body={"separate_reasoning": False}).usage
    assert usage.completion_tokens_details.reasoning_tokens == 0


def test_budgets_of_thinking(core: ScriptedCore, client: openai.OpenAI, tmp_path: Path) -> None:
    core.texts = ["<think>Hm</think>Hello"] * 3
    for name in ("thinking_token_budget", "thinking_budget", "max_thinking_tokens"):
        assert told(chat(client, extra_body={name: 50}).choices[0].message) == ("Hello", "Hm", [])
    with pytest.raises(openai.BadRequestError, match="differ; give one"):
        chat(client, extra_body={"thinking_budget": 1, "max_thinking_tokens": 2})
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with (
        scripted(make_spoken_checkpoint(tmp_path, []), chat_template=str(template)) as (server, _),
        connected(server) as other,
        pytest.raises(openai.BadRequestError, match="--reasoning-parser") as caught,
    ):
        other.chat.completions.create(model="tiny", messages=[USER], extra_body={"thinking_budget": 5})
    assert caught.value.param == "thinking_budget"


def test_thinking_that_the_prompt_begins(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts, core.prompts = ["Hm</think>Hello"] * 3, []
    asked: list[dict[str, Any]] = [
        {"reasoning_effort": "high"},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}},
    ]
    for options in asked:
        assert told(chat(client, **options).choices[0].message) == ("Hello", "Hm", [])
    assert chat(client, reasoning_effort="none").choices[0].message.content == "Hm</think>Hello"
    assert [prompt.endswith("<think>") for prompt in core.prompts] == [True, True, False]


def test_an_answer_that_is_cut(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts = [WEATHER, WEATHER]
    whole = chat(client, max_tokens=45).choices[0]
    name, arguments = told(whole.message)[2][0]
    assert (whole.finish_reason, name) == ("length", "get_weather") and JSON_ARGUMENTS.startswith(arguments)
    assert gathered(list(chat(client, max_tokens=45, stream=True)))[2] == [(name, arguments)]


def test_several_choices_and_logprobs(core: ScriptedCore, client: openai.OpenAI) -> None:
    core.texts = [NOW, "Hello"]
    first, second = chat(client, n=2).choices
    assert (first.finish_reason, second.finish_reason) == ("tool_calls", "stop")


FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([FUNCTION, FUNCTION], "two functions of the name 'f'"),
        ([{"type": "function", "function": {"name": "a b"}}], "name"),
        ([{"type": "function", "function": {"name": "x" * 257}}], "name"),
        ([{"type": "web_search"}], "function"),
        ([{"type": "function", "function": {"name": f"f{i}"}} for i in range(MAX_TOOLS + 1)], "at most 1024"),
        ([{"type": "function", "function": {"name": "f", "description": "x" * MAX_TOOLS_CHARS}}], "characters as JSON"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], "parameters"),
    ],
)
def test_tools_that_are_refused(client: openai.OpenAI, tools: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        chat(client, tools=tools)
    assert (caught.value.param or "").startswith("tools")


def test_a_form_of_calls_that_is_not_known(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ tools|tojson }}{% for m in messages %}{{ m.content }}{% endfor %}")
    path = make_spoken_checkpoint(tmp_path, [])
    for parser, status in ((None, 400), ("none", 400), ("hermes", 200)):
        options: dict[str, Any] = {"chat_template": str(template), "tool_call_parser": parser}
        with scripted(path, **options) as (server, core), connected(server) as client:
            core.texts = [NOW]
            if status == 200:
                assert chat(client).choices[0].finish_reason == "tool_calls"
                continue
            with pytest.raises(openai.BadRequestError, match="--tool-call-parser") as caught:
                chat(client)
            assert caught.value.param == "tools"
