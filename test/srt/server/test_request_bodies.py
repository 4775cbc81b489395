"""What all request bodies have in common: null, values that ask for nothing, types at the edge, the field to blame."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from rtp_llm.srt.entrypoints.edge import MAX_CONTAINERS, MAX_ITEMS, check_json
from rtp_llm.srt.entrypoints.llama_cpp.protocol import LlamaCompletionRequest
from rtp_llm.srt.entrypoints.native import AbortBody, DetokenizeBody, GenerateBody, TokenizeBody
from rtp_llm.srt.entrypoints.neutral import (
    CHAT,
    GENERATE,
    HINTS,
    LLAMA_CPP,
    OPENAI,
    RESPONSES,
    SAMPLING_PARAMS,
    TOKENIZE,
)
from rtp_llm.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest, StreamOptions
from rtp_llm.srt.entrypoints.openai.responses.protocol import ResponsesRequest
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams
from tiny_server import InProcess, in_process

pytestmark = pytest.mark.xdist_group("server-in-process")

JSON_HEADER = {"Content-Type": "application/json"}
connection: httpx.Client
CHATS, TEXTS, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MINIMAL: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    CHATS: (ChatCompletionRequest, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}),
    TEXTS: (CompletionRequest, {"prompt": "hi", "max_tokens": 1}),
    RESPONSE: (ResponsesRequest, {"input": "hi", "max_output_tokens": 1}),
    "/generate": (GenerateBody, {"text": "hi", "sampling_params": {"max_new_tokens": 1}}),
    "/completion": (LlamaCompletionRequest, {"prompt": "hi", "n_predict": 1}),
    "/tokenize": (TokenizeBody, {"prompt": "hi"}),
    "/detokenize": (DetokenizeBody, {"tokens": [1]}),
    "/abort_request": (AbortBody, {"abort_all": True}),
}
OBJECTS = ("chat_template_kwargs", "sampling_params", "metadata", "json_schema")  # any names are right in these
FIELDS = [(path, name) for path, (body, _) in MINIMAL.items() for name in body.model_fields]
UNSUPPORTED = {
    CHATS: CHAT,
    TEXTS: OPENAI,
    RESPONSE: RESPONSES,
    "/generate": GENERATE,
    "/tokenize": TOKENIZE,
    "/completion": LLAMA_CPP,
}


@pytest.fixture(scope="module", autouse=True)
def _connection() -> Iterator[None]:
    """One client for all requests: making one takes longer than most of them."""
    global connection
    with httpx.Client(timeout=60, headers=JSON_HEADER) as connection:
        yield


def post(server: InProcess, path: str, body: Any) -> httpx.Response:
    return connection.post(f"{server.url}{path}", content=json.dumps(body))


def blamed(response: httpx.Response) -> str | None:
    assert response.status_code == 400, response.text
    return response.json()["error"]["param"]


@pytest.mark.parametrize("path", MINIMAL)
def test_null_is_the_same_as_leaving_a_field_out(server: InProcess, path: str) -> None:
    body, minimal = MINIMAL[path]
    nulls = {name: None for name in [*body.model_fields, *UNSUPPORTED.get(path, ()), *HINTS]}
    assert post(server, path, nulls | minimal).status_code == 200


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (CHATS, {"stream": True, "stream_options": dict.fromkeys(StreamOptions.model_fields)}),
        (CHATS, {"messages": [{"role": "user", "name": None, "content": [{"type": "text", "text": "a", "x": None}]}]}),
        ("/generate", {"sampling_params": dict.fromkeys(SamplingParams.__dataclass_fields__)}),
        ("/generate", {"text": ["a", "b"], "sampling_params": [{"top_k": None}, {"regex": None}]}),
        ("/tokenize", {"prompt": None, "messages": [{"role": "user", "content": "a", "tool_calls": None}]}),
    ],
)
def test_null_within_objects(server: InProcess, path: str, options: dict[str, Any]) -> None:
    assert post(server, path, MINIMAL[path][1] | options).status_code == 200


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_a_wrong_value_is_blamed_on_its_field(server: InProcess, path: str, name: str) -> None:
    wrong = {"no": {"such": "value"}} if name not in OBJECTS else 7
    body = MINIMAL[path][1] | {name: wrong}
    if name.endswith("_data"):
        body[name] = 7
    assert blamed(post(server, path, body)) == name


@pytest.mark.parametrize(
    ("path", "options", "param"),
    [
        (CHATS, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (CHATS, {"audio": {"voice": "x"}}, "audio"),
        (CHATS, {"reasoning_effort": "high"}, "reasoning_effort"),
        (CHATS, {"top_logprobs": 2}, "top_logprobs"),
        (CHATS, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHATS, {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        (TEXTS, {"best_of": 3}, "best_of"),
        (TEXTS, {"suffix": "end"}, "suffix"),
        (TEXTS, {"prompt": ["a"] * 2049}, "prompt"),
        ("/generate", {"lora_path": "x"}, "lora_path"),
        ("/generate", {"sampling_params": {"stop_regex": "a+"}}, "stop_regex"),
        ("/tokenize", {"text": "a"}, "text"),
        ("/abort_request", {"rid": "a"}, "rid"),
        (CHATS, {"top_p": 1.5}, "top_p"),
        (RESPONSE, {"background": True}, "background"),
        (CHATS, {"temprature": 1}, "temprature"),
    ],
)
def test_the_field_to_blame(server: InProcess, path: str, options: dict[str, Any], param: str) -> None:
    assert blamed(post(server, path, MINIMAL[path][1] | options)) == param


def test_values_that_ask_for_nothing_are_taken(server: InProcess) -> None:
    for i in range(max(len(values) for names in UNSUPPORTED.values() for values in names.values()) + 5):
        for path, names in UNSUPPORTED.items():
            options = {name: (False, "", [], {}, "none", *others)[: i + 1][-1] for name, others in names.items()}
            response = post(server, path, MINIMAL[path][1] | options)
            assert response.status_code == 200, (options, response.text)
    for value in (False, "", [], {}, "none"):
        params = {"max_new_tokens": 1} | dict.fromkeys(SAMPLING_PARAMS, value)
        assert post(server, "/generate", {"text": "a", "sampling_params": params}).status_code == 200


@pytest.mark.parametrize("value", [True, 7, "x", ["x"], {"x": 1}])
@pytest.mark.parametrize("path", UNSUPPORTED)
def test_values_that_ask_for_something_are_refused(server: InProcess, path: str, value: Any) -> None:
    for name, others in UNSUPPORTED[path].items():
        if value not in others:
            assert blamed(post(server, path, MINIMAL[path][1] | {name: value})) == name


@pytest.mark.parametrize(
    "options",
    [
        {"store": True},
        {"service_tier": "flex"},
        {"verbosity": "low"},
        {"prediction": {"type": "content", "content": "x"}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "x"}}]}]},
        {"messages": [{"role": "user", "content": "a", "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_hints_are_taken(server: InProcess, options: dict[str, Any]) -> None:
    assert post(server, CHATS, MINIMAL[CHATS][1] | options).status_code == 200


def test_variables_that_the_template_does_not_use(server: InProcess) -> None:
    for name, status in (("enable_thinking", 200), ("suffix", 200), ("messages", 400), ("tools", 400)):
        variables = {"chat_template_kwargs": {name: "x"}}
        assert post(server, CHATS, MINIMAL[CHATS][1] | variables).status_code == status


def test_strict_requests(tiny_checkpoint: str) -> None:
    body = MINIMAL[CHATS][1]
    with in_process(tiny_checkpoint, strict_requests=True) as strict:
        for options in ({"store": True}, {"lora_path": ""}, {"stop_regex": ""}):
            assert blamed(post(strict, CHATS, body | options)) == next(iter(options))
        for options in ({"chat_template_kwargs": {"enable_thinking": False}}, {"verbosity": "low"}):
            assert blamed(post(strict, CHATS, body | options)) == next(iter(options))
        taken = {"store": False, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
        assert post(strict, CHATS, body | taken | {"suffix": None}).status_code == 200


def test_priorities(server: InProcess, tiny_checkpoint: str) -> None:
    """In every body; 0 is always taken."""
    with in_process(tiny_checkpoint, schedule_policy="priority") as prioritized:
        for path in ("/generate", TEXTS, CHATS):
            body = MINIMAL[path][1]
            for value in (0, None):
                assert post(server, path, body | {"priority": value}).status_code == 200
            assert blamed(post(server, path, body | {"priority": 5})) == "priority"
            for value in (5, -5):
                assert post(prioritized, path, body | {"priority": value}).status_code == 200
            for value in (1.5, "1", True):
                assert blamed(post(prioritized, path, body | {"priority": value})) == "priority"


BENCH_BODIES = [
    (  # SGLang's bench_serving, backend sglang
        "/generate",
        {
            "text": "hi",
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 2, "ignore_eos": True},
            "stream": True,
            "lora_path": None,
            "return_logprob": False,
            "return_routed_experts": False,
            "logprob_start_len": -1,
        },
    ),
    (TEXTS, {"model": "tiny", "prompt": "hi", "best_of": 1, "max_tokens": 2, "stream": True, "ignore_eos": True}),
    (  # vLLM's bench serve, backend openai
        TEXTS,
        {
            "model": "tiny",
            "prompt": "hi",
            "repetition_penalty": 1.0,
            "max_tokens": 2,
            "logprobs": None,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
]


@pytest.mark.parametrize(("path", "body"), BENCH_BODIES)
def test_bodies_of_bench_clients(server: InProcess, path: str, body: dict[str, Any]) -> None:
    assert post(server, path, body).status_code == 200


@pytest.mark.parametrize("path", MINIMAL)
@pytest.mark.parametrize("bad", ["\ud83d", 2**64, -(2**63) - 1, float("1e400")])
def test_what_cannot_be_carried_is_refused_wherever_it_stands(server: InProcess, path: str, bad: Any) -> None:
    body, minimal = MINIMAL[path]
    for name in body.model_fields:
        for value in (bad, [{"a": bad}]):
            content = json.dumps(minimal | {name: value}).replace("Infinity", "1e400")
            assert blamed(connection.post(f"{server.url}{path}", content=content)) == name


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        (
            {"messages": [{"content": ["a", {"text": "\ud800"}]}]},
            "messages[0].content[1].text is not valid",
            "messages",
        ),
        ({"stop": ["ok", "\ud83d"]}, "stop[1] is not valid Unicode: character 0", "stop"),
        ({"a": {"\ud800": 1}}, "a name in a is not valid Unicode", "a"),
        ({"top_k": 2**64}, "top_k is 18446744073709551616, an integer that does not fit", "top_k"),
        ({"prompt": [1, 2**70]}, "prompt is 1180591620717411303424", "prompt"),
        ({"prompt": [{}] * (MAX_ITEMS + 1)}, f"a list of {MAX_ITEMS + 1} items; at most", "prompt"),
        ({"messages": [[]] * (MAX_ITEMS + 1)}, "at most", "messages"),
        ({"a": [[[]] * 4000] * 20}, f"more than {MAX_CONTAINERS} lists and objects", "a"),
    ],
)
def test_the_edge_names_the_place(body: Any, words: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_json(body)
    assert words in str(caught.value) and caught.value.param == param


def test_the_edge_takes_long_lists_of_ids_and_all_of_unicode() -> None:
    check_json({"prompt": list(range(100_000)), "text": "\x00é東🙂", "big": 2**64 - 1, "small": -(2**63), "f": 1e308})


def test_top_p_0_is_the_most_probable_token(server: InProcess) -> None:
    def ids(**options: Any) -> list[int]:
        params = {"max_new_tokens": 8, "ignore_eos": True, "seed": 3, **options}
        return post(server, "/generate", {"text": "the", "sampling_params": params}).json()["output_ids"]

    assert ids(top_p=0) == ids(temperature=0)


def test_add_special_tokens_of_a_text_completion(server: InProcess) -> None:
    body = MINIMAL[TEXTS][1]
    assert post(server, TEXTS, body | {"add_special_tokens": False}).status_code == 200
