"""The server within this process: errors of all kinds, the native endpoints, and streams as they are on the wire."""

import asyncio
import json
import random
import socket
import time
from itertools import pairwise
from typing import Any

import httpx
import pytest

from tiny_server import InProcess, in_process, wait_for, words

pytestmark = pytest.mark.xdist_group("server-in-process")

JSON_HEADER = {"Content-Type": "application/json"}
LONG = {"prompt": "the cat", "max_tokens": 480, "ignore_eos": True, "stream": True}


def post(server: InProcess, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60, **options)


def wire(path: str, body: Any) -> bytes:
    """A request as it is sent."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return head.encode() + b"\r\n\r\n" + content


def port_of(server: InProcess) -> int:
    return int(server.url.rsplit(":", 1)[1])


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def is_clean(server: InProcess) -> bool:
    """Nothing runs, and no memory is held but by the prefix cache."""
    scheduler = server.core.core.scheduler
    return scheduler.idle and not server.core.client.num_live and scheduler.memory.usage() == 0


# Errors


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 400, "the request body is missing"),
        (b"{", 400, "not JSON: Expecting"),
        (b'{"prompt": NaN}', 400, "NaN is not a JSON value"),
        (b'{"temperature": Infinity}', 400, "Infinity is not a JSON value"),
        (b'{"temperature": 1e999, "prompt": "a"}', 400, "temperature"),
        (b'{"prompt": "\xff"}', 400, "not UTF-8: invalid start byte at byte 12"),
        (b'{"prompt": "\\ud800"}', 400, "prompt"),
        (b'{"\\ud800": 1, "prompt": "a"}', 400, "a name of a field is not valid Unicode"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"prompt": 1' + b"0" * 5000 + b"}", 400, "not JSON"),
        (b"[]", 400, "dictionary"),
        (b"3", 400, "dictionary"),
        (b'{"prompt": "a", "n": "1"}', 400, "n: Input should be a valid integer"),
        (b'{"prompt": "a", "n": true}', 400, "n: Input should be a valid integer"),
        (b'{"prompt": "a", "stream": 1}', 400, "stream: Input should be a valid boolean"),
        (b'{"prompt": {"a": 1}}', 400, "prompt"),
        (b'{"prompt": [-1]}', 400, "prompt"),
        (b'{"prompt": []}', 400, "prompt is empty"),
        (b'{"prompt": "a", "stream_options": {"include_usage": true}}', 400, "only for stream=true"),
        (b'{"prompt": "a", "seed": 18446744073709551616}', 400, "seed"),
        (b'{"prompt": "a", "max_tokens": -1}', 400, "max_tokens"),
        (b'{"prompt": "a", "stop": [""]}', 400, "stop[0] must be a non-empty string"),
        (b'{"prompt": "a", "model": "other"}', 404, "there is no model 'other' here"),
    ],
)
def test_bad_bodies(server: InProcess, content: bytes, status: int, words: str) -> None:
    response = httpx.post(f"{server.url}/v1/completions", content=content, headers=JSON_HEADER)
    assert (response.status_code, words in error_of(response)["message"]) == (status, True), response.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages.0.role is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0] is an image, and this model takes text only",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]}]},
            "messages[0].content[0] is audio, and this model takes text only",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "the form of this model's tool calls is not known",
        ),
        ({"audio": {"voice": "x"}}, "audio is not supported"),
        ({"modalities": ["text", "audio"]}, "modalities is not supported"),
        ({"top_logprobs": 2}, "top_logprobs is only for logprobs=true"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"max_tokens": 511}, "max_tokens is 511, but the prompt of"),
        ({"max_completion_tokens": 511}, "max_completion_tokens is 511, but the prompt of"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "set only one"),
        ({"chat_template_kwargs": {"messages": 1}}, "cannot set 'messages'"),
        ({"chat_template_kwargs": {"self": 1}}, "cannot set 'self'"),
    ],
)
def test_bad_chats(server: InProcess, options: dict[str, Any], words: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]} | options
    response = post(server, "/v1/chat/completions", body)
    assert (response.status_code, words in error_of(response)["message"]) == (400, True), response.text


def test_neutral_values_are_accepted(server: InProcess) -> None:
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "user": "me"}
    nothing = {
        "audio": None,
        "service_tier": "auto",
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "top_p": None,
    }
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} | neutral | nothing
    assert post(server, "/v1/chat/completions", body).status_code == 200


def test_places_that_do_not_exist(server: InProcess) -> None:
    missing = httpx.get(f"{server.url}/v2/x")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
    wrong = httpx.get(f"{server.url}/v1/completions")
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
    form = httpx.post(f"{server.url}/v1/completions", data={"prompt": "a"})
    assert (form.status_code, "application/json" in error_of(form)["message"]) == (415, True)


def test_keys_bodies_and_queues_have_limits(tiny_checkpoint: str) -> None:
    options = {"api_key": "sécret", "max_body_size": 2048, "max_running_requests": 2, "max_queued_requests": 1}
    with in_process(tiny_checkpoint, **options) as server:
        key = {"Authorization": "Bearer sécret".encode()}
        assert httpx.get(f"{server.url}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "sécret".encode()}):
            refused = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{server.url}/v1/models", headers=key).status_code == 200

        body = json.dumps({"prompt": "a" * 3000}).encode()
        for content in (body, iter([body[:1500], body[1500:]])):
            large = httpx.post(f"{server.url}/v1/completions", content=content, headers=key | JSON_HEADER)
            assert (large.status_code, error_of(large)["code"]) == (413, "body_too_large")

        four = {"prompt": "a", "n": 4, "temperature": 1.0}
        full = post(server, "/v1/completions", four, headers=key)
        assert (full.status_code, error_of(full)["code"], full.headers["retry-after"]) == (503, "queue_full", "5")
        assert post(server, "/v1/completions", four | {"n": 3}, headers=key).status_code == 200
        assert "sécret" not in httpx.get(f"{server.url}/server_info", headers=key).text


def test_a_core_that_is_not_ready(server: InProcess) -> None:
    server.core.is_ready = False
    try:
        for response in (httpx.get(f"{server.url}/health"), post(server, "/v1/completions", {"prompt": "a"})):
            assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
            assert response.headers["retry-after"]
    finally:
        server.core.is_ready = True


def test_a_bug_is_no_secret_told(server: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(server.core.client, "submit_all", break_down)
    response = post(server, "/v1/completions", {"prompt": "a"})
    assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
    assert "secret" not in response.text


# Native endpoints


def test_generate(server: InProcess) -> None:
    params = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    one = post(server, "/generate", {"text": "the cat", "sampling_params": params}).json()
    assert set(one) == {"text", "output_ids", "meta_info"} and one["meta_info"]["completion_tokens"] == 4
    both = post(server, "/generate", {"text": ["the cat", "a dog"], "sampling_params": [params, params]}).json()
    assert both[0]["text"] == one["text"] and len(both) == 2
    options = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    ids = post(server, "/tokenize", {"prompt": "the cat"}).json()["tokens"]
    told = post(server, "/generate", {"input_ids": ids, "sampling_params": params} | options).json()
    meta = told["meta_info"]
    assert told["text"] == one["text"]
    assert (len(meta["input_token_logprobs"]), len(meta["output_top_logprobs"])) == (len(ids), 4)
    assert post(server, "/generate", {"text": "a"}).json()["meta_info"]["completion_tokens"] <= 128


def test_generate_streams(server: InProcess) -> None:
    body = {
        "text": ["the cat", "a dog"],
        "sampling_params": {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True},
    }
    whole = post(server, "/generate", body).json()
    lines = post(server, "/generate", body | {"stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    for i in (0, 1):
        mine = [item for item in events if item["index"] == i]
        assert all(b["text"].startswith(a["text"]) for a, b in pairwise(mine))
        assert mine[-1]["text"] == whole[i]["text"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "give either text or input_ids; neither is given"),
        ({"text": "a", "input_ids": [1]}, "both"),
        ({"text": "a", "sampling_params": {"max_tokens": 1}}, "unknown sampling parameter 'max_tokens'"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 1000}}, "max_new_tokens is 1000"),
        ({"text": ["a", "b"], "rid": "x"}, "rid must be a list of 2 names"),
        ({"text": "a", "image_data": "x"}, "the model takes text only"),
        ({"text": "a", "top_logprobs_num": 2}, "set return_logprob"),
    ],
)
def test_bad_generates(server: InProcess, body: dict[str, Any], words: str) -> None:
    response = post(server, "/generate", body)
    assert (response.status_code, words in error_of(response)["message"]) == (400, True), response.text


def test_tokens(server: InProcess) -> None:
    text = "the cat größer 東京 🙂"
    answer = post(server, "/tokenize", {"prompt": text}).json()
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 512
    assert post(server, "/detokenize", {"tokens": answer["tokens"]}).json()["text"] == text
    chat = post(server, "/tokenize", {"messages": [{"role": "user", "content": "the cat"}]}).json()
    shown = post(server, "/detokenize", {"tokens": chat["tokens"], "skip_special_tokens": False}).json()
    assert shown["prompt"] == "<|user|>the cat<|end|><|assistant|>"
    for body in ({}, {"prompt": "a", "text": "b"}):
        assert "give one of prompt, text, content and messages" in error_of(post(server, "/tokenize", body))["message"]
    assert "outside the vocabulary" in error_of(post(server, "/detokenize", {"tokens": [99999]}))["message"]


def test_information(server: InProcess) -> None:
    assert httpx.get(f"{server.url}/health_generate").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/model_info").json()["context_length"] == 512
    assert httpx.get(f"{server.url}/server_info").json()["max_total_tokens"] == 4096
    wait_for(lambda: is_clean(server))
    assert post(server, "/flush_cache", None).json()["success"]
    assert error_of(post(server, "/abort_request", {}))["message"] == "give either rid or abort_all=true"


def test_metrics(server: InProcess) -> None:
    def value(name: str) -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"rtp_llm:{name}{{"))

    names = ("num_requests_total", "generation_tokens_total", "prompt_tokens_total", "num_aborted_requests_total")
    before = [value(name) for name in names]
    body = {"input_ids": [40, 41], "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}
    post(server, "/generate", body)
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [1, 3, 2, 0]
    for gauge in ("num_running_reqs", "num_queue_reqs", "token_usage", "cache_hit_rate", "gen_throughput"):
        assert value(gauge) >= 0
    assert value("max_total_num_tokens") == value("num_pages") == 4096
    wait_for(lambda: server.core.core.scheduler.idle)
    shares = [value(f"kv_{kind}_tokens") for kind in ("used", "evictable", "available")]
    assert sum(shares) == 4096 and min(shares[1:]) > 0
    for name in ("num_retracted_reqs", "utilization", "startup_time_seconds", "evicted_tokens_total", "mamba_usage"):
        assert value(name) >= 0
    assert value("request_time_per_output_token_seconds_count") > 0
    assert value("time_to_first_token_seconds_count") > 0
    assert value("queue_time_seconds_count") == value("num_requests_total") and value("queue_time_seconds_sum") > 0


def test_each_request_counts_once_however_it_ends(server: InProcess) -> None:
    def counts() -> list[float]:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        names = ("num_requests_total", "e2e_request_latency_seconds_count", "num_aborted_requests_total")
        return [float(line.split()[-1]) for name in names for line in lines if line.startswith(f"rtp_llm:{name}{{")]

    before = counts()
    greedy = {"prompt": "the cat", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    text = post(server, "/v1/completions", greedy).json()["choices"][0]["text"]
    stopped = post(server, "/v1/completions", greedy | {"stop": text[4:6]})
    assert stopped.json()["choices"][0]["finish_reason"] == "stop"
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"rid": "told-to-end"}) as response:
        lines = response.iter_lines()
        next(lines)
        post(server, "/abort_request", {"rid": "told-to-end"})
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    with socket.create_connection(("127.0.0.1", port_of(server))) as connection:
        connection.sendall(wire("/v1/completions", LONG))
        wait_for(lambda: server.core.client.num_live)
    wait_for(lambda: is_clean(server))
    time.sleep(0.1)  # the core's answer to the abort
    assert [now - old for now, old in zip(counts(), before, strict=True)] == [4, 4, 2]


# Who may ask, and by which path


@pytest.mark.parametrize("given", ["abc-1", "x" * 128, None, "x" * 129, "a b"])
@pytest.mark.parametrize("path", ["/health", "/nowhere", "/v1/models"])
def test_answers_are_named(server: InProcess, path: str, given: str | None) -> None:
    response = httpx.get(f"{server.url}{path}", headers={} if given is None else {"X-Request-Id": given})
    [name] = response.headers.get_list("x-request-id")
    is_taken = given is not None and len(given) <= 128 and " " not in given
    assert name == given if is_taken else len(name) == 32


@pytest.mark.parametrize(
    ("path", "same"),
    [
        ("/models", "/v1/models"),
        ("/get_model_info", "/model_info"),
        ("/ready", "/health"),
        ("/ping", "/health"),
    ],
)
def test_other_paths_to_the_same(server: InProcess, path: str, same: str) -> None:
    assert httpx.get(f"{server.url}{path}").json() == httpx.get(f"{server.url}{same}").json()


def test_other_paths_of_posts(server: InProcess) -> None:
    assert post(server, "/completions", {"prompt": "a", "max_tokens": 1}).json()["object"] == "text_completion"
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    assert post(server, "/chat/completions", chat).json()["object"] == "chat.completion"
    tokens = post(server, "/v1/tokenize", {"prompt": "the cat"}).json()["tokens"]
    assert post(server, "/v1/detokenize", {"tokens": tokens}).json()["text"] == "the cat"
    assert httpx.get(f"{server.url}/version").json().keys() == {"version"}
    assert httpx.get(f"{server.url}/get_server_info").json()["max_total_tokens"] == 4096


def test_keys_and_pages_of_other_origins(tiny_checkpoint: str) -> None:
    page = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    with in_process(tiny_checkpoint, api_key="secret", allowed_origins=["https://page.example"]) as guarded:
        models = f"{guarded.url}/v1/models"
        assert httpx.options(models, headers=page).status_code == 200
        refused = httpx.get(models, headers=page)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page["Origin"])
        assert "access-control-allow-origin" not in httpx.get(models, headers={"Origin": "https://other"}).headers
        for key, status in (("secret", 200), ("wrong", 401), ("", 401)):
            assert httpx.get(models, headers={"X-Api-Key": key}).status_code == status
        assert httpx.get(models, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert [httpx.get(guarded.url + path).status_code for path in ("/health", "/ready", "/ping")] == [200] * 3
        assert [httpx.get(guarded.url + path).status_code for path in ("/models", "/version")] == [401] * 2


def test_names_of_the_model(tiny_checkpoint: str) -> None:
    def asked(server: InProcess, name: str) -> httpx.Response:
        return post(server, "/v1/completions", {"prompt": "a", "max_tokens": 1, "model": name})

    with in_process(tiny_checkpoint, served_model_name=["one", "two"]) as named:
        assert [model["id"] for model in httpx.get(f"{named.url}/v1/models").json()["data"]] == ["one", "two"]
        assert httpx.get(f"{named.url}/v1/models/two").json()["id"] == "two"
        assert [asked(named, name).json()["model"] for name in ("one", "two")] == ["one", "one"]
        refused = asked(named, "three")
        assert refused.status_code == 404 and "this server has 'one' and 'two'" in error_of(refused)["message"]
    with in_process(tiny_checkpoint, accept_any_model_name=True) as any_name:
        assert asked(any_name, "gpt-4").json()["model"] == "tiny"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "cat " * 600}),
        ("/v1/completions", {"prompt": ["a", "cat " * 600]}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 512}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "cat " * 600}]}),
        ("/generate", {"text": "cat " * 600}),
        ("/generate", {"input_ids": [[40], [40] * 513]}),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 512}}),
    ],
)
def test_an_overflow_is_told_in_words_that_clients_know(server: InProcess, path: str, body: dict[str, Any]) -> None:
    error = error_of(post(server, path, body))
    assert "This model's maximum context length is 512 tokens" in error["message"]
    assert error["code"] == "context_length_exceeded"


# Streams on the wire


def test_the_form_of_a_stream(server: InProcess) -> None:
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"max_tokens": 5}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        parts = "".join(response.iter_text()).split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(part.removeprefix("data: "))["object"] == "text_completion" for part in parts[:-2])


def test_characters_stay_whole(server: InProcess) -> None:
    """Half of the random model's tokens are parts of characters: none of these ever leaves before it is certain."""
    body = LONG | {"temperature": 1.5, "seed": 4, "max_tokens": 200}
    whole = post(server, "/v1/completions", body | {"stream": False}).json()["choices"][0]["text"]
    events = post(server, "/v1/completions", body).text.split("\n\n")[:-2]
    text = "".join(json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events)
    assert text == whole


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_ends_the_request(server: InProcess, path: str, stream: bool) -> None:
    native = {"text": "a", "sampling_params": {"max_new_tokens": 480, "ignore_eos": True}}
    body = (native if path == "/generate" else LONG) | {"stream": stream}
    wait_for(lambda: is_clean(server))
    generated = server.core.core.scheduler.stats.generated_tokens
    with socket.create_connection(("127.0.0.1", port_of(server))) as connection:
        connection.sendall(wire(path, body))
        wait_for(lambda: server.core.client.num_live)
    wait_for(lambda: is_clean(server))
    assert server.core.core.scheduler.stats.generated_tokens - generated < 480
    server.core.core.scheduler.check_integrity()


def test_a_reader_that_stops_does_not_slow_others(server: InProcess) -> None:
    body = {"input_ids": [40], "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}, "stream": True}
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port_of(server)))
        slow.sendall(wire("/generate", body | {"return_logprob": True, "top_logprobs_num": 20}))
        wait_for(lambda: server.core.client.num_live)
        answer = post(server, "/v1/completions", LONG | {"stream": False, "max_tokens": 50})
        assert answer.json()["usage"]["completion_tokens"] == 50
        wait_for(lambda: not server.core.client.num_live, 60)  # the core is done with it, though nobody reads
        received = b""
        slow.settimeout(30)
        while not received.endswith(b"0\r\n\r\n"):
            received += slow.recv(65536)
    assert b'"completion_tokens":500' in received and b"data: [DONE]" in received


@pytest.mark.slow
def test_two_hundred_streams_with_hang_ups(server: InProcess) -> None:
    """One in three hangs up somewhere: all others complete, and all memory comes back."""
    draw = random.Random(0)
    plans = [(words(draw.randrange(1, 60), seed), draw.randrange(8, 60), draw.random() < 0.3) for seed in range(200)]

    async def stream(client: httpx.AsyncClient, prompt: str, length: int, leaves: bool) -> int:
        body = {"prompt": prompt, "max_tokens": length, "ignore_eos": True, "stream": True, "temperature": 1.0}
        body["stream_options"] = {"include_usage": True}
        last = ""
        async with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            count = 0
            async for line in response.aiter_lines():
                count += line.startswith("data: {")
                last = line if line.startswith("data: {") else last
                if leaves and count >= length // 4:
                    return -1
        return json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"]

    async def run() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            return await asyncio.gather(*(stream(client, *plan) for plan in plans))

    start_s = time.perf_counter()
    counts = asyncio.run(run())
    for count, (_, length, leaves) in zip(counts, plans, strict=True):
        assert count == length or (leaves and count == -1)  # under load, a stream may end in few large events
    assert -1 in counts
    wait_for(lambda: is_clean(server))
    server.core.core.scheduler.check_integrity()
    assert post(server, "/flush_cache", None).json()["success"]
    assert time.perf_counter() - start_s < 120
