"""Ollama's API over HTTP, in plain JSON: what a scripted core says, as a whole and as a stream."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from recorded_answers import ARGUMENTS, JSON_ARGUMENTS, TOOLS
from scripted_core import SPECIAL, TEMPLATE, ScriptedCore, make_spoken_checkpoint, scripted, scripted_speaker

from rtp_llm.srt.entrypoints.dialects import SPOKEN
from rtp_llm.srt.entrypoints.neutral import OLLAMA_CHAT, OLLAMA_GENERATE, OLLAMA_OPTIONS
from rtp_llm.srt.entrypoints.ollama.protocol import ChatBody, GenerateBody, Options
from rtp_llm.srt.entrypoints.routes import dialect_lines
from rtp_llm.srt.messages import FinishReason
from tiny_server import InProcess

WEATHER = f'<tool_call>{{"name": "get_weather", "arguments": {JSON_ARGUMENTS}}}</tool_call>'
NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
USER = {"role": "user", "content": "the weather"}
MINIMAL: dict[str, dict[str, Any]] = {"/api/chat": {"messages": [USER]}, "/api/generate": {"prompt": "the weather"}}
CHAT, GENERATE = MINIMAL
METRICS = {"total_duration", "load_duration", "prompt_eval_count", "prompt_eval_cached_count", "prompt_eval_duration"}
METRICS |= {"eval_count", "eval_duration"}
VARYING = {name for name in METRICS if name.endswith("duration")} | {"created_at"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
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
    with httpx.Client(base_url=running[0].url, timeout=60) as connected:
        yield connected


def unkept(url: str) -> httpx.Client:
    """A client with a connection for each request: the server ends one whose request it refuses before its body."""
    return httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


def post(client: httpx.Client, path: str = CHAT, **fields: Any) -> httpx.Response:
    return client.post(path, json=MINIMAL[path] | fields)


def answer(client: httpx.Client, path: str = CHAT, **fields: Any) -> dict[str, Any]:
    response = post(client, path, stream=False, **fields)
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", told["created_at"]) and told["done"] is True
    return told


def stream(client: httpx.Client, path: str = CHAT, **fields: Any) -> Told:
    response = post(client, path, **fields)
    assert response.status_code == 200 and response.headers["content-type"].startswith("application/x-ndjson")
    assert response.text.endswith("\n")
    told: Told = [json.loads(part) for part in response.text.splitlines()]
    assert [part["done"] for part in told] == [False] * (len(told) - 1) + [True]
    return told


def gathered(told: Told) -> dict[str, Any]:
    """Return the one object that the stream's would be."""
    whole = told[-1]
    for part in told[:-1]:
        assert not METRICS & part.keys() and "done_reason" not in part
        assert part.get("response", "") or part.get("thinking") or part.get("message", {}).keys() > {"role"}
    if "message" in whole:
        messages = [part["message"] for part in told]
        assert {message["role"] for message in messages} == {"assistant"} and messages[-1]["content"] == ""
        whole["message"]["content"] = "".join(message["content"] for message in messages)
        for name, empty in (("thinking", ""), ("tool_calls", [])):
            if parts := [message[name] for message in messages if name in message]:
                whole["message"][name] = sum(parts, empty) if isinstance(empty, list) else "".join(parts)
        return whole
    whole["response"] = "".join(part["response"] for part in told)
    if parts := [part["thinking"] for part in told if "thinking" in part]:
        whole["thinking"] = "".join(parts)
    return whole


def lasting(told: dict[str, Any]) -> dict[str, Any]:
    """Return what two answers of the same text have in common."""
    kept = {name: value for name, value in told.items() if name not in VARYING}
    for call in kept.get("message", {}).get("tool_calls", ()):
        assert call.pop("id")
    return kept


def test_a_chat(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = [f"<think>Hm</think>Hello {WEATHER}{NOW}"] * 2
    whole = answer(client, tools=TOOLS)
    functions = [{"index": 0, "name": "get_weather", "arguments": ARGUMENTS}, {"index": 1, "name": "now"}]
    message = whole["message"]
    assert [call["function"] for call in message.pop("tool_calls")] == [functions[0], functions[1] | {"arguments": {}}]
    assert message == {"role": "assistant", "content": "Hello", "thinking": "Hm"}
    assert (whole["model"], whole["done_reason"]) == ("tiny", "stop") and whole.keys() >= METRICS
    assert min(whole[name] for name in METRICS - {"prompt_eval_cached_count"}) > 0
    streamed = gathered(stream(client, tools=TOOLS))
    assert lasting(streamed) == lasting(whole | {"message": {**message, "tool_calls": [
        {"id": "x", "function": function | {"arguments": function.get("arguments", {})}} for function in functions
    ]}})  # fmt: skip


def test_a_completion(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = ["<think>Hm</think>Hello"] * 2
    whole = answer(client, GENERATE, system="Be kind.")
    assert (whole["response"], whole["thinking"], whole["done_reason"]) == ("Hello", "Hm", "stop")
    assert core.prompts == ["<|system|>Be kind.<|end|><|user|>the weather<|end|><|assistant|>"]
    assert lasting(gathered(stream(client, GENERATE, system="Be kind."))) == lasting(whole)


def test_a_context_goes_on(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = ["Hello", "Sunny"]
    first = answer(client, GENERATE)
    second = answer(client, GENERATE, prompt="And now?", context=first["context"])
    assert core.prompts[1] == core.prompts[0] + "Hello<|end|><|user|>And now?<|end|><|assistant|>"
    assert second["context"][: len(first["context"])] == first["context"]
    assert second["prompt_eval_count"] + second["eval_count"] == len(second["context"])


def test_raw(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = ["<think>Hm</think>Hello"] * 2
    whole = answer(client, GENERATE, raw=True, options={"temperature": 0})
    assert core.prompts == ["the weather"] and whole["response"] == "HmHello"
    assert "context" not in whole and "thinking" not in whole
    assert lasting(gathered(stream(client, GENERATE, raw=True))) == lasting(whole)


@pytest.mark.parametrize(("path", "empty"), [(CHAT, {"messages": []}), (CHAT, {"messages": None}),
                                             (GENERATE, {"prompt": ""}), (GENERATE, {"prompt": None})])  # fmt: skip
def test_nothing_to_answer(client: httpx.Client, path: str, empty: dict[str, Any]) -> None:
    """The model is loaded in any case, and cannot be unloaded."""
    for fields in ({"stream": False}, {}, {"keep_alive": "5m"}):
        told = post(client, path, **empty, **fields)
        assert told.status_code == 200 and told.headers["content-type"].startswith("application/json")
        said = {"message": {"role": "assistant", "content": ""}} if path == CHAT else {"response": ""}
        head = {"model": "tiny", "created_at": told.json()["created_at"]}
        assert told.json() == {**head, **said, "done": True, "done_reason": "load"}
    assert "cannot be unloaded" in refused(post(client, path, **empty, keep_alive=0))


def test_names(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = ["Hello"] * 2
    assert [answer(client, model=name)["model"] for name in ("tiny", "tiny:latest")] == ["tiny", "tiny:latest"]
    for name in ("tiny:1b", "x", "tiny:latest:latest", "ns/tiny"):
        assert "not found: this server has 'tiny'" in refused(post(client, model=name), 404)


def test_a_loop_with_a_tool(core: ScriptedCore, client: httpx.Client) -> None:
    """The call and its result come back into the prompt, in the template's form."""
    core.texts = [f"<think>Hm</think>{WEATHER}", "Sunny"]
    first = answer(client, tools=TOOLS)
    messages = [USER, first["message"], {"role": "tool", "tool_name": "get_weather", "content": "sun, 21 degrees"}]
    assert answer(client, tools=TOOLS, messages=messages)["message"]["content"] == "Sunny"
    before, after = core.prompts
    history = f"<think>Hm</think>{WEATHER}<|end|><|tool|>sun, 21 degrees<|end|><|assistant|>"
    assert after.replace("\\u00e9", "é") == before + history and '"get_weather"' in before


def test_strict_tools(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = [NOW] * 2
    tools = [{"function": TOOLS[1]["function"] | {"strict": strict}} for strict in (False, True)]
    for tool in tools:
        assert answer(client, tools=[tool])["message"]["tool_calls"]
    free, bound = core.grammars
    assert free is None and bound is not None and bound.kind == "grammar"


def test_thinking(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = ["Hm</think>Hello"] * 6
    for path in (CHAT, GENERATE):
        for think in (True, "low"):
            told = answer(client, path, think=think)
            assert told.get("message", told)["thinking"] == "Hm"
        told = answer(client, path, think=False)
        assert "thinking" not in told.get("message", told)
    assert [prompt.endswith("<think>") for prompt in core.prompts] == [True, True, False] * 2


def test_where_an_answer_ends(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = ["Hello world", "Hello world", "Hello" * 200, "Hello" * 2000, WEATHER]
    stopped = answer(client, options={"stop": ["wor", "x"]})
    assert (stopped["message"]["content"], stopped["done_reason"]) == ("Hello ", "stop")
    cut = answer(client, options={"num_predict": 3})
    assert (cut["done_reason"], cut["eval_count"]) == ("length", 3)
    assert answer(client, options={"num_predict": 10_000})["done_reason"] == "stop"
    filled = answer(client, options={"num_predict": -1})
    assert (filled["done_reason"], filled["prompt_eval_count"] + filled["eval_count"]) == ("length", 4096)
    called = answer(client, tools=TOOLS, options={"num_predict": 45})
    [call] = called["message"]["tool_calls"]
    assert called["done_reason"] == "length" and set(call["function"]["arguments"]) <= {"city"}


def test_an_answer_that_was_begun(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = [" world"]
    begun = {"role": "assistant", "content": "Hello"}
    assert answer(client, messages=[USER, begun])["message"]["content"] == " world"
    assert core.prompts[0].endswith("<|assistant|>Hello")
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
    assert "a message with a result must follow" in refused(post(client, messages=[USER, called], tools=TOOLS))


def test_formats(core: ScriptedCore, client: httpx.Client) -> None:
    core.texts = ['{"a": 1}'] * 3
    assert answer(client, format=SCHEMA)["message"]["content"] == '{"a": 1}'
    assert answer(client, GENERATE, format="json")["response"] == '{"a": 1}'
    answer(client, format="")
    kinds = [None if grammar is None else grammar.text for grammar in core.grammars]
    assert [json.loads(kind) if kind else None for kind in kinds] == [SCHEMA, {"type": "object"}, None]
    core.texts = ['Hm</think>{"a": 1}']
    message = answer(client, format=SCHEMA, think=True)["message"]
    assert (message["thinking"], message["content"]) == ("Hm", '{"a": 1}')
    spec = core.grammars[-1]  # of thinking, and then the form
    assert spec is not None and json.loads(spec.text) == SCHEMA and spec.around is not None
    for think in (False, True):
        assert "format" in refused(post(client, format={"type": "no such type"}, think=think))
    assert "xml" in refused(post(client, GENERATE, format="xml"))


def test_any_content_type(core: ScriptedCore, client: httpx.Client) -> None:
    """As commands in Ollama's documentation send it; but no page of another site."""
    body = json.dumps(MINIMAL[GENERATE] | {"stream": False})
    core.texts = ["Hello"] * 3
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}):
        assert client.post(GENERATE, content=body, headers=headers).json()["response"] == "Hello"
    with unkept(str(client.base_url)) as other:
        for page in ({"origin": "https://example.com"}, {"sec-fetch-site": "cross-site"}):
            refused(other.post(GENERATE, content=body, headers=page | {"content-type": "text/plain"}), 403)
    assert "not JSON" in refused(client.post(GENERATE, content="a=b"))


def refused(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    [(name, message)] = response.json().items()
    assert name == "error" and isinstance(message, str)
    return message


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role is missing"),
        (CHAT, {"messages": [USER | {"images": ["AA=="]}]}, "messages[0].images[0] is an image"),
        (CHAT, {"messages": [USER | {"content": [{"type": "text", "text": "x"}]}]}, "messages.0.content"),
        (CHAT, {"messages": [USER | {"colour": "red"}]}, "unknown field 'messages.0.colour'"),
        (CHAT, {"tools": [TOOLS[0]] * 2}, "two functions of the name 'get_weather'"),
        (CHAT, {"prompt": "x"}, "unknown field 'prompt'"),
        (CHAT, {"options": {"temprature": 1}}, "unknown field 'options.temprature'"),
        (CHAT, {"options": {"num_ctx": 5000}}, "options.num_ctx is 5000, and a request may have 4096 tokens"),
        (CHAT, {"options": {"mirostat": 2}}, "mirostat is not supported"),
        (CHAT, {"options": {"stop": ["x"] * 33}}, "stop has 33 strings"),
        (CHAT, {"think": 3}, "think"),
        (CHAT, {"keep_alive": "long"}, "keep_alive must be"),
        (CHAT, {"messages": [USER | {"content": "\x00" * 5000}]}, "This model's maximum context length is"),
        (GENERATE, {"template": "{{ .Prompt }}"}, "template is not supported"),
        (GENERATE, {"suffix": "x"}, "'tiny' does not support insert"),
        (GENERATE, {"suffix": "x", "system": "y"}, "suffix does not support system"),
        (GENERATE, {"suffix": "x", "raw": True}, "suffix does not support raw"),
        (GENERATE, {"width": 64}, "width is not supported"),
        (GENERATE, {"images": ["AA=="]}, "images[0] is an image, and this model takes text only"),
        (GENERATE, {"raw": True, "images": ["AA=="]}, "the model takes text only"),
        (GENERATE, {"raw": True, "system": "x"}, "raw mode does not support system or context"),
        (GENERATE, {"raw": True, "context": [1]}, "raw mode does not support system or context"),
        (GENERATE, {"raw": True, "think": True}, "raw mode does not support think"),
        (GENERATE, {"context": [1], "images": ["AA=="]}, "images and context cannot both be given"),
        (GENERATE, {"context": [100_000]}, "context has token id 100000"),
        (GENERATE, {"prompt": "\x00" * 5000}, "This model's maximum context length is"),
    ],
)  # fmt: skip
def test_what_is_refused(client: httpx.Client, path: str, fields: dict[str, Any], words: str) -> None:
    assert words in refused(post(client, path, **fields))


def test_values_that_ask_for_nothing(core: ScriptedCore, client: httpx.Client) -> None:
    for path, body, unsupported in ((CHAT, ChatBody, OLLAMA_CHAT), (GENERATE, GenerateBody, OLLAMA_GENERATE)):
        nulls = dict.fromkeys([*body.model_fields, *unsupported])
        nothing = {name: values[0] if values else "" for name, values in unsupported.items()}
        options = dict.fromkeys([*Options.model_fields, *OLLAMA_OPTIONS])
        core.texts = ["Hello"] * 5
        for fields in (nulls | MINIMAL[path], nothing | {"options": options, "truncate": True, "shift": False}):
            assert answer(client, path, **{name: value for name, value in fields.items() if name != "stream"})["done"]
        for unset in ({}, {"stream": None}, {"stream": True}):
            assert post(client, path, **unset).headers["content-type"].startswith("application/x-ndjson")


@pytest.mark.xdist_group("server-in-process")
def test_log_probabilities(server: InProcess) -> None:
    """Those of a token are in the part of the stream where its text is."""
    asked: dict[str, Any] = {"options": {"num_predict": 6, "temperature": 0}, "logprobs": True}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path in (CHAT, GENERATE):
            whole = answer(client, path, **asked, top_logprobs=2)
            told = stream(client, path, **asked)
            streamed = [item for part in told for item in part.get("logprobs", ())]
            assert len(told) > 1 and len(whole["logprobs"]) == whole["eval_count"] == 6
            for item, alone in zip(whole["logprobs"], streamed, strict=True):
                assert set(item) - {"top_logprobs"} == set(alone) == {"token", "logprob", "bytes"}
                assert item["token"] == alone["token"] == item["top_logprobs"][0]["token"]
                assert len(item["top_logprobs"]) == 2 and item["logprob"] == pytest.approx(alone["logprob"], abs=1e-4)


def test_the_model(running: tuple[InProcess, ScriptedCore], client: httpx.Client) -> None:
    core = running[1]
    core.info = replace(core.info, weight_bytes=1000, cache_bytes=500)
    [listed] = client.get("/api/tags").json()["models"]
    [loaded] = client.get("/api/ps").json()["models"]
    shown = client.post("/api/show", json={"model": "tiny"}).json()
    assert listed["name"] == listed["model"] == loaded["name"] == "tiny:latest"
    assert (listed["size"], loaded["size"], loaded["context_length"]) == (1000, 1500, 4096)
    assert listed["digest"] == loaded["digest"] and re.fullmatch("[0-9a-f]{64}", listed["digest"])
    details = {"parent_model": "", "format": "safetensors", "family": "llama", "families": ["llama"]}
    assert listed["details"] == details | {"parameter_size": "", "quantization_level": "F32"} == shown["details"]
    assert shown["template"] == TEMPLATE and shown["capabilities"] == ["completion", "tools", "thinking"]
    info = shown["model_info"]
    assert info["general.architecture"] == "llama" and info["llama.context_length"] == 4096
    assert shown["parameters"] == f'{"stop":<30} "<|end|>"' and shown["modified_at"] == listed["modified_at"]
    for body in ({"name": "tiny:latest", "verbose": True, "system": ""}, {}):
        assert client.post("/api/show", json=body).json() == shown
    assert "not found" in refused(client.post("/api/show", json={"model": "x"}), 404)
    assert "differ" in refused(client.post("/api/show", json={"model": "x", "name": "y"}))


def test_who_is_there(running: tuple[InProcess, ScriptedCore], client: httpx.Client) -> None:
    assert (client.get("/").text, client.head("/").status_code) == ("Ollama is running", 200)
    assert client.head("/api/version").status_code == client.head("/api/tags").status_code == 200
    assert re.fullmatch(r"\d+\.\d+\.\d+", client.get("/api/version").json()["version"])
    lines = dialect_lines(running[0].app)
    assert [line.split(":")[0].split()[-1] for line in lines] == list(SPOKEN)
    assert lines[2].split()[1:3] == ["/api/chat", "/api/generate"] and "{" not in "".join(lines)


def test_what_one_model_cannot(client: httpx.Client) -> None:
    for method, name in (
        ("POST", "pull"),
        ("POST", "push"),
        ("POST", "create"),
        ("POST", "copy"),
        ("DELETE", "delete"),
    ):
        message = refused(client.request(method, f"/api/{name}", json={"model": "x"}))
        assert "this server serves one model, 'tiny'" in message
    assert "one model" in refused(client.post("/api/blobs/sha256:00", content=b"x"))
    for name in ("embed", "embeddings"):
        assert "no output 'embed'" in refused(client.post(f"/api/{name}", json={"model": "tiny"}))


def test_errors_by_status(core: ScriptedCore, client: httpx.Client) -> None:
    refused(client.get("/api/nope"), 404)
    refused(client.get(CHAT), 405)
    bad = client.post(CHAT, content="{", headers={"x-request-id": "r1"})
    assert "not JSON" in refused(bad) and bad.headers["x-request-id"] == "r1"
    broken = FinishReason("abort", message="it broke", status_code=500)
    core.texts = [broken] * 2
    assert refused(post(client, stream=False), 500) == "it broke"
    assert post(client).text == '{"error":"it broke"}\n'


def test_refusals_before_the_body(tmp_path: Path) -> None:
    """A wrong key, a full queue, the end of the server."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    path = make_spoken_checkpoint(tmp_path, SPECIAL)
    options: dict[str, Any] = {"chat_template": str(template), "api_key": "secret", "max_queued_requests": 0}
    with scripted(path, **options) as (server, core), unkept(server.url) as client:
        assert "wrong or missing" in refused(post(client), 401)
        client.headers["authorization"] = "Bearer secret"
        core.texts = ["Hello"]
        assert answer(client)["done_reason"] == "stop"
        core.info = replace(core.info, max_running_requests=0)
        full = post(client)
        assert "the queue is full" in refused(full, 503) and full.headers["retry-after"]
        server.gate.draining = True
        assert "shutting down" in refused(post(client, GENERATE), 503)


def test_a_model_that_never_learned_to_chat(tmp_path: Path) -> None:
    """Without a chat template, a prompt is continued as it is; thinking and calls are not to be had."""
    with scripted(make_spoken_checkpoint(tmp_path, [])) as (server, core), httpx.Client(base_url=server.url) as client:
        core.texts = [" in Paris", " today"]
        first = answer(client, GENERATE)
        assert first["response"] == " in Paris"
        answer(client, GENERATE, prompt=" is", context=first["context"])
        assert core.prompts == ["the weather", "the weather in Paris<|end|> is"]
        assert client.post("/api/show", json={}).json()["capabilities"] == ["completion"]
        assert "'tiny' does not support thinking" in refused(post(client, think=True))
        assert "'tiny' does not support thinking" in refused(post(client, GENERATE, think="low"))
        for fields in ({"path": CHAT}, {"path": GENERATE, "system": "x"}):
            assert "no chat template" in refused(post(client, **fields))


def test_filling_in(tmp_path: Path) -> None:
    special = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"]
    with (
        scripted(make_spoken_checkpoint(tmp_path, special)) as (server, core),
        httpx.Client(base_url=server.url) as client,
    ):
        core.texts = ["a + b<|file_sep|>more", "x"]
        filled = answer(client, GENERATE, prompt="return ", suffix="<|fim_middle|>\n", options={"num_predict": 30})
        assert answer(client, GENERATE, prompt="", suffix="}")["response"] == "x"
        assert "insert" in client.post("/api/show", json={}).json()["capabilities"]
    assert core.prompts[0] == "<|fim_prefix|>return <|fim_suffix|><|fim_middle|>\n<|fim_middle|>"
    assert core.prompts[1] == "<|fim_prefix|><|fim_suffix|>}<|fim_middle|>"
    assert filled["done_reason"] == "stop" and "context" not in filled
