"""The load generator, against a small server in this process whose delays are known."""

import asyncio
import itertools
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from rtp_llm.tools.bench_serving.async_http import BadAddress, BrokenResponse, HttpClient, SseDecoder
from rtp_llm.tools.bench_serving.backends import BACKENDS, CHAT, COMPLETIONS, NATIVE, RequestFailed, read_event
from rtp_llm.tools.bench_serving.benchmark import run_benchmark, workload
from rtp_llm.tools.bench_serving.command import main
from rtp_llm.tools.bench_serving.options import DATASET_OPTIONS, BenchArgs, BenchError
from rtp_llm.tools.bench_serving.results import Observation, figures, table
from rtp_llm.tools.bench_serving.workloads import (
    BenchRequest,
    Piece,
    Source,
    Vocabulary,
    WorkloadError,
    azure_requests,
    load_tokenizer,
    mooncake_requests,
    random_requests,
    shared_prefix_requests,
    with_arrivals,
)

FIRST_S, NEXT_S = 0.06, 0.02  # the server's delays
SLACK_S = 0.04  # what a busy machine may add to a mean


@dataclass
class FakeServer:
    """Speaks all three APIs. ``answer`` may replace what is sent for the number-th request (from 0)."""

    answer: Callable[[int, dict[str, Any]], bytes | None] = lambda number, body: None
    usage: bool = True
    cached_tokens: int = 3
    key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    num_running: int = 0
    most_running: int = 0
    num_connections: int = 0
    url: str = ""

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)

    def _run(self, started: threading.Event) -> None:
        async def serve() -> None:
            self._stopping = asyncio.Event()
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=500)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            started.set()
            await self._stopping.wait()
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)

        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(serve())

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next((line.split(":")[1] for line in head.split("\r\n") if line.startswith("Content-Le")), "0")
                body = await reader.readexactly(int(length))
                await self._reply(head, json.loads(body) if body else {}, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _reply(self, head: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        path = head.split()[1]
        self.paths.append(path)
        if self.key is not None and f"Authorization: Bearer {self.key}" not in head:
            writer.write(plain(401, b'{"error": {"message": "wrong key", "type": "authentication_error"}}'))
        elif path == "/v1/models":
            writer.write(plain(200, b'{"data": [{"id": "fake"}]}'))
        elif path == "/flush_cache":
            writer.write(plain(200, b"flushed"))
        else:
            await self._generate(path, body, writer)

    async def _generate(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        number = len(self.bodies)
        self.bodies.append(body)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            if (instead := self.answer(number, body)) is not None:
                writer.write(instead.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                writer.close()
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            num_tokens = body.get("max_tokens") or body["sampling_params"]["max_new_tokens"]
            for i in range(1, num_tokens + 1):
                await asyncio.sleep(FIRST_S if i == 1 else NEXT_S)
                writer.write(chunk(self._event(path, i, num_tokens)))
            if path != "/generate" and self.usage:
                details = {"prompt_tokens_details": {"cached_tokens": self.cached_tokens}}
                usage = {"prompt_tokens": 10, "completion_tokens": num_tokens} | details
                writer.write(chunk({"choices": [], "usage": usage}))
            writer.write(chunk("[DONE]") + b"0\r\n\r\n")
        finally:
            self.num_running -= 1

    def _event(self, path: str, i: int, num_tokens: int) -> dict[str, Any]:
        reason = "length" if i == num_tokens else None
        if path == "/generate":
            finish = reason and {"type": "length", "length": num_tokens}
            meta = {"prompt_tokens": 10, "cached_tokens": self.cached_tokens, "completion_tokens": i}
            return {"text": "ab" * i, "output_ids": [7] * i, "meta_info": meta | {"finish_reason": finish}}
        if path == "/v1/completions":
            return {"choices": [{"index": 0, "text": "ab", "finish_reason": reason}]}
        return {"choices": [{"index": 0, "delta": {"content": "ab"}, "finish_reason": reason}]}


def chunk(event: Any) -> bytes:
    data = event if isinstance(event, str) else json.dumps(event)
    part = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(part), part)


def plain(status: int, body: bytes, kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} Word\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    fake.start()
    yield fake
    fake.stop()


def bench(server: FakeServer, **options: Any) -> dict[str, Any]:
    defaults = {"backend": "openai", "vocab_size": 100, "random_input_len": 10, "random_output_len": 5}
    defaults |= {"random_range_ratio": 1.0, "num_prompts": 6, "warmup_requests": 0}
    if options.get("dataset_name", "random") != "random":
        defaults = {name: value for name, value in defaults.items() if not name.startswith("random")}
    return run_benchmark(BenchArgs(base_url=server.url, **defaults | options))


# The figures


@pytest.mark.parametrize("backend", ["openai", "rtp-llm"])
def test_the_figures_are_the_servers_delays(server: FakeServer, backend: str) -> None:
    result = bench(server, backend=backend, num_prompts=6, max_concurrency=2)
    e2e_s = FIRST_S + 4 * NEXT_S
    assert (result["completed"], result["failed"], result["errors"], result["ended_early"]) == (6, 0, {}, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (60, 30)
    assert (result["cached_tokens"], result["cache_hit_rate"]) == (18, pytest.approx(0.3))
    for name, expected_s in {"ttft": FIRST_S, "tpot": NEXT_S, "itl": NEXT_S, "e2e_latency": e2e_s}.items():
        for part in ("mean", "median"):
            value_s = result[f"{part}_{name}_ms"] / 1000
            assert expected_s - 0.003 < value_s < expected_s + SLACK_S, name
        assert result[f"median_{name}_ms"] <= result[f"p90_{name}_ms"] <= result[f"p99_{name}_ms"]
    assert 3 * e2e_s - 0.01 < result["duration"] < 3 * e2e_s + 6 * SLACK_S
    assert result["output_throughput"] == pytest.approx(30 / result["duration"])
    assert result["request_throughput"] == pytest.approx(6 / result["duration"])
    assert result["total_throughput"] == pytest.approx(90 / result["duration"])
    assert 1.4 < result["concurrency"] <= 2.0
    assert server.most_running == 2
    assert server.num_connections <= 3  # one for the question after the model, and then they are kept


def test_tokens_are_counted_where_usage_does_not_tell_them(server: FakeServer) -> None:
    server.usage = False
    result = bench(server, num_prompts=2)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (20, 10)
    assert (result["cached_tokens"], result["cache_hit_rate"]) == (None, None)
    assert result["requests_without_usage"] == 2
    assert "2 requests came without usage" in table("t", "w", result)


def test_everything_at_once_is_concurrent(server: FakeServer) -> None:
    result = bench(server, num_prompts=40)
    assert server.most_running == 40
    assert result["duration"] < 5 * (FIRST_S + 4 * NEXT_S)


def test_a_rate_is_kept(server: FakeServer) -> None:
    result = bench(server, num_prompts=30, request_rate=60, random_output_len=1)
    arrivals = [request.arrival_s or 0 for request in with_arrivals([request_of(1)] * 30, 60, 1)]
    assert arrivals[-1] <= result["duration"] < arrivals[-1] + 0.5
    assert 1 <= server.most_running < 30


def test_the_percentiles_and_the_spread() -> None:
    seen = []
    for i in range(101):
        item = Observation(4, 2, start_s=0.0, finished=True)
        item.first_token_s, item.last_token_s, item.num_seen = 0.001 * i, 0.001 * i + 0.01, 2
        seen.append(item)
    result = figures(seen, 1.0, 0.5, ignore_eos=True)
    assert [result[f"{part}_ttft_ms"] for part in ("mean", "median", "p90", "p99", "max")] == pytest.approx(
        [50, 50, 90, 99, 100]
    )
    assert result["mean_tpot_ms"] == pytest.approx(10)
    assert result["mean_itl_ms"] is None
    assert all(len(line) <= 80 for line in table("title", "what", result).splitlines())


def test_tokens_that_come_together_share_their_time() -> None:
    seen = Observation(4, 6)
    for total, now_s in [(1, 1.0), (3, 1.2), (3, 1.3), (6, 1.5)]:
        event = {"text": "x" * total, "meta_info": {"completion_tokens": total, "finish_reason": None}}
        seen.add(read_event(NATIVE, json.dumps(event)), now_s)
    assert seen.gaps_s == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1])
    assert (seen.output_tokens, seen.texts) == (6, ["xxxxxx"])


def test_usage_with_the_last_token_does_not_spread_its_gap() -> None:
    seen = Observation(4, 3)
    for now_s, extra in [(1.0, {}), (1.1, {}), (1.3, {"usage": {"prompt_tokens": 9, "completion_tokens": 3}})]:
        seen.add(read_event(COMPLETIONS, json.dumps({"choices": [{"text": "x"}]} | extra)), now_s)
    assert seen.gaps_s == pytest.approx([0.1, 0.2])
    assert (seen.input_tokens, seen.output_tokens) == (9, 3)


def test_roles_and_endings_are_no_tokens() -> None:
    seen = Observation(4, 1)
    seen.add(read_event(CHAT, '{"choices": [{"delta": {"role": "assistant", "content": ""}}]}'), 1.0)
    assert seen.first_token_s is None
    seen.add(read_event(CHAT, '{"choices": [{"delta": {"reasoning_content": "hm"}}]}'), 2.0)
    seen.add(read_event(CHAT, '{"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": null}'), 3.0)
    assert (seen.first_token_s, seen.num_seen, seen.finished) == (2.0, 1, True)


# What is sent


def test_requests_say_what_was_asked_for(server: FakeServer) -> None:
    bench(server, num_prompts=2, extra_request_body='{"top_p": 0.5, "temperature": 1}')
    first, second = server.bodies
    assert len(first["prompt"]) == 10
    assert all(0 <= index < 100 for index in first["prompt"])
    assert first["prompt"] != second["prompt"]
    assert (first["model"], first["max_tokens"], first["ignore_eos"], first["stream"]) == ("fake", 5, True, True)
    assert (first["top_p"], first["temperature"], first["stream_options"]) == (0.5, 1, {"include_usage": True})
    bench(server, backend="sglang", num_prompts=1, disable_ignore_eos=True, model="m")
    assert server.bodies[-1]["sampling_params"] == {"temperature": 0.0, "max_new_tokens": 5}
    assert server.paths[-1] == "/generate"


def test_a_seed_gives_the_same_prompts(server: FakeServer) -> None:
    for seed in (1, 1, 2):
        bench(server, num_prompts=3, seed=seed, random_range_ratio=0.0, max_concurrency=1)
    prompts = [body["prompt"] for body in server.bodies]
    assert prompts[:3] == prompts[3:6] != prompts[6:]
    assert len({len(prompt) for prompt in prompts}) > 1


def test_shared_prefixes_are_shared(server: FakeServer) -> None:
    sizes = {"gsp_num_groups": 3, "gsp_prompts_per_group": 4, "gsp_system_prompt_len": 20, "gsp_question_len": 6}
    bench(server, dataset_name="generated-shared-prefix", gsp_output_len=1, num_prompts=None, **sizes)
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == 12
    prefixes = [prompt[:20] for prompt in prompts]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [4, 4, 4]
    assert {len(prompt) for prompt in prompts} == {26}


def test_warm_up_comes_first_with_other_tokens_and_then_the_flush(server: FakeServer) -> None:
    result = bench(server, num_prompts=2, warmup_requests=3, flush_cache=True)
    assert server.paths == ["/v1/models", *["/v1/completions"] * 3, "/flush_cache", *["/v1/completions"] * 2]
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == 5
    assert result["completed"] == 2


def test_the_key_is_sent_and_not_written(server: FakeServer, tmp_path: Path) -> None:
    server.key = "hush"
    with pytest.raises(BenchError, match="HTTP 401: wrong key"):
        bench(server)
    bench(server, api_key="hush", num_prompts=1, output_file=str(tmp_path / "out.jsonl"))
    assert "hush" not in (tmp_path / "out.jsonl").read_text()


def test_text_has_about_the_asked_length(server: FakeServer, data_dir: Path) -> None:
    name = str(data_dir / "tokenizers/qwen3-tokenizer")
    tokenizer = load_tokenizer(name)
    bench(server, backend="openai-chat", tokenizer=name, vocab_size=None, random_input_len=200, num_prompts=1)
    [message] = server.bodies[0]["messages"]
    assert abs(len(tokenizer.encode(message["content"]).ids) - 200) <= 2
    bench(server, text_prompts=True, tokenizer=name, vocab_size=None, random_input_len=50, num_prompts=1)
    assert abs(len(tokenizer.encode(server.bodies[1]["prompt"]).ids) - 50) <= 2


@pytest.mark.parametrize(
    "name", ["tokenizers/qwen3-tokenizer", "tokenizers/llama3.1-tokenizer", "models/stories260K-hf"]
)
def test_vocabularies_leave_special_tokens_out(data_dir: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(data_dir / name))
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    piece = Piece(Source.OWN, 0, 5000)
    assert not set(vocabulary.ids([piece], 1)) & set(tokenizer.get_added_tokens_decoder())
    text = vocabulary.text([piece], 1)
    assert abs(len(tokenizer.encode(text, add_special_tokens=False).ids) - 5000) < 250


# What goes wrong


def test_failures_are_counted_with_their_reasons(server: FakeServer) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    answers = {
        1: plain(500, b'{"error": {"message": "out of luck", "code": 500}}'),
        2: plain(200, b"<html>", "text/html"),
        3: head + b'data: {"choices": [{"text": "a"}]}\n\n',
        4: head + b'data: {"error": {"message": "the core died"}}\n\n',
        5: head + b"data: {nonsense\n\n",
        6: b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        7: b"",
        8: head.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n") + chunk({"choices": [{"text": "a"}]}),
        9: head + b'data: {"choices": 7}\n\n',
        10: plain(503, b"busy"),
    }
    server.answer = lambda number, body: answers.get(number)
    result = bench(server, num_prompts=12, max_concurrency=1)
    assert (result["completed"], result["failed"]) == (2, 10)
    reasons = "\n".join(result["errors"])
    for words in (
        "HTTP 500: out of luck",
        "expected an event stream, but the server sent text/html: '<html>'",
        "the stream ended before the answer was complete",
        "ended the stream with an error: the core died",
        "an event is not JSON: '{nonsense'",
        "expected an HTTP/1.1 response",
        "closed the connection before it answered",
        "closed the connection in the middle of its answer",
        "an event is not one of /v1/completions",
        "HTTP 503: busy",
    ):
        assert words in reasons
    assert result["total_output_tokens"] == 10
    assert "1 of 10 failed requests: HTTP 500: out of luck" in table("t", "w", result)


def test_an_aborted_request_has_failed() -> None:
    finish = {"type": "abort", "message": "the core died twice"}
    event = {"text": "", "meta_info": {"completion_tokens": 2, "finish_reason": finish}}
    with pytest.raises(RequestFailed, match="the core died twice"):
        read_event(NATIVE, json.dumps(event))


def test_a_silent_server_times_out(server: FakeServer) -> None:
    result = bench(server, num_prompts=2, request_timeout=0.1, random_output_len=50)
    assert result["errors"] == {"no complete answer within 0.1 s": 2}
    assert result["mean_ttft_ms"] is None


def test_answers_that_end_early_are_told(server: FakeServer) -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 1}}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    server.answer = lambda number, body: head + b'data: {"choices": [{"text": "a"}]}\n\n' + usage
    assert bench(server, num_prompts=2)["ended_early"] == 2
    assert bench(server, num_prompts=2, disable_ignore_eos=True)["ended_early"] == 0


def test_what_an_observer_raises_ends_the_request_only(server: FakeServer) -> None:
    def refuse(data: str, now_s: float) -> None:
        raise KeyError(data)

    async def run() -> None:
        client = HttpClient(server.url)
        body = json.dumps({"max_tokens": 50}).encode()
        try:
            with pytest.raises(KeyError, match="choices"):
                await client.stream("/v1/completions", body, refuse)
            assert await client.request_json("GET", "/v1/models") == {"data": [{"id": "fake"}]}
        finally:
            await client.close()

    asyncio.run(run())
    assert server.num_connections == 2  # that of the stream, which was not read to its end, is not used again


def test_no_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(BenchError, match=r"cannot reach 127\.0\.0\.1"):
            run_benchmark(BenchArgs(base_url=url, vocab_size=9))


@pytest.mark.parametrize(
    "url", ["127.0.0.1:30000", "ftp://a", "http://", "http://a/?b=c", "http://user:pass@a", "http://a:x", "http://[a"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(BadAddress, match="must be like"):
        HttpClient(url)


BROKEN = "expected an HTTP/1.1 response, but the server's is broken"
BEFORE, MIDDLE = "closed the connection before it answered", "closed the connection in the middle of its answer"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (b"HTTP/2 200 OK\r\n\r\n", BROKEN),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", BROKEN),
        (b"x" * 70000, BROKEN),
        (b"HTTP/1.1 2", BEFORE),
        (STREAM_HEAD + b"Content-Length: 9\r\n\r\ndata", MIDDLE),
        (STREAM_HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\ndata", MIDDLE),
        (STREAM_HEAD + b"\r\ndata: \xff\n\n", "an event is not UTF-8"),
        (b"HTTP/1.1 307 Elsewhere\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", "HTTP 307"),
    ],
)
def test_broken_responses(server: FakeServer, response: bytes, words: str) -> None:
    server.answer = lambda number, body: response
    [reason] = bench(server, num_prompts=1)["errors"]
    assert words in reason


# The stream


STREAM = '\ufeffdata: {"a": 1}\n\n: comment\r\n\r\nevent: x\rdata:one\rdata: two\r\rdata:  ü€\r\n\r\ndata\n\ndata: lost'
EVENTS = ['{"a": 1}', "one\ntwo", " ü€", ""]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_events_in_pieces(size: int) -> None:
    decoder, stream = SseDecoder(), STREAM.encode()
    parts = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert [event for part in parts for event in decoder.feed(part)] == EVENTS
    with pytest.raises(BrokenResponse, match="not UTF-8"):
        SseDecoder().feed(b"data: \xff\n\n")


# The data sets


def request_of(num_tokens: int) -> BenchRequest:
    return BenchRequest((Piece(Source.OWN, 0, num_tokens),), 1)


def test_random_lengths() -> None:
    requests = random_requests(2000, 100, 50, 0.5, seed=3)
    assert {request.prompt_len for request in requests} == set(range(50, 101))
    assert {request.output_len for request in requests} == set(range(25, 51))
    assert {request.output_len for request in random_requests(500, 100, 8, 0.0, seed=3)} == set(range(1, 9))


def test_shared_prefix_shape() -> None:
    requests = shared_prefix_requests(2, 3, 10, 4, 5, seed=1)
    assert sorted(request.pieces[0].number for request in requests) == [0, 0, 0, 1, 1, 1]
    assert len({request.pieces[1] for request in requests}) == 6
    assert requests != sorted(requests, key=lambda request: request.pieces[1].number)


def test_poisson_arrivals() -> None:
    times = [request.arrival_s or 0.0 for request in with_arrivals([request_of(1)] * 4000, 50, seed=1)]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert times[0] == 0
    assert mean == pytest.approx(0.02, rel=0.1)
    assert deviation == pytest.approx(mean, rel=0.1)  # as it is for exponential gaps
    assert {request.arrival_s for request in with_arrivals([request_of(1)] * 3, math.inf, seed=1)} == {0.0}


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:15:46.6805900,374,44\r
2023-11-16 18:15:50.6805900,396,109\r
"""


def test_azure_traces(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE, newline="")
    first, second = azure_requests(path, scale=1, speed=1)
    assert (first.prompt_len, first.output_len, first.arrival_s) == (374, 44, 0)
    assert (second.prompt_len, second.output_len, second.arrival_s) == (396, 109, 4)
    assert first.pieces[0] != second.pieces[0]
    scaled = azure_requests(path, scale=16, speed=8)[1]
    assert (scaled.prompt_len, scaled.output_len, scaled.arrival_s) == (25, 7, 0.5)


def mooncake_file(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mooncake_row(timestamp: int, num_tokens: int, hash_ids: list[int]) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": num_tokens, "output_length": 20, "hash_ids": hash_ids}


@pytest.mark.parametrize("scale", [1, 16, 10, 700])
def test_equal_hashes_become_equal_tokens(tmp_path: Path, scale: float) -> None:
    rows = [
        mooncake_row(0, 1500, [0, 1, 2]),
        mooncake_row(500, 1400, [0, 1, 3]),
        mooncake_row(3000, 1024, [0, 4]),
    ]
    requests = mooncake_requests(mooncake_file(tmp_path, *rows), scale, speed=2)
    assert [request.arrival_s for request in requests] == [0, 0.25, 1.5]
    assert [request.prompt_len for request in requests] == [math.ceil(size / scale) for size in (1500, 1400, 1024)]
    vocabulary = Vocabulary.from_size(1000)
    first, second, third = (vocabulary.ids(request.pieces, seed=1) for request in requests)
    one, two = math.ceil(512 / scale), math.ceil(1024 / scale)
    assert first[:two] == second[:two]
    assert first[:one] == third[:one]
    if scale < 100:
        assert first[two : two + 10] != second[two : two + 10]
        assert first[one : one + 10] != third[one : one + 10]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (mooncake_row(0, 1500, [0, 1]), "line 2: 2 hash_ids do not cover 1500 tokens"),
        (mooncake_row(0, 0, []), "line 2: a length of 0 tokens"),
        ({"timestamp": 0}, "line 2: 'input_length' is missing"),
    ],
)
def test_traces_that_are_wrong(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        mooncake_requests(mooncake_file(tmp_path, mooncake_row(0, 1, [0]), row), 1, 1)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46.68,5\n")
    with pytest.raises(WorkloadError, match="line 2: 'GeneratedTokens' is missing"):
        azure_requests(path, 1, 1)
    path.write_text("")
    with pytest.raises(WorkloadError, match="has no requests"):
        azure_requests(path, 1, 1)
    with pytest.raises(BenchError, match="No such file"):
        run_benchmark(BenchArgs(dataset_name="azure", dataset_path=str(tmp_path / "none")))


def test_a_trace_is_replayed(server: FakeServer, tmp_path: Path) -> None:
    path = mooncake_file(tmp_path, *[mooncake_row(i * 1000, 512, [i]) for i in range(4)])
    options = {"dataset_name": "mooncake", "dataset_path": str(path), "trace_scale_lengths": 20, "trace_speed": 5}
    result = bench(server, **options)
    assert (result["completed"], result["request_rate"]) == (4, "trace")
    assert 0.6 + FIRST_S <= result["duration"] < 0.6 + FIRST_S + 0.5
    del options["trace_speed"]
    assert bench(server, **options, request_rate=math.inf)["duration"] < 0.5
    with pytest.raises(BenchError, match="no request of the trace has at most 9 tokens"):
        bench(server, **options, trace_context_len=9)


def test_the_real_traces(data_dir: Path) -> None:
    azure = azure_requests(data_dir / "traces/azure/AzureLLMInferenceTrace_conv.csv", 1, 1)
    assert (len(azure), azure[0].prompt_len, azure[1].arrival_s) == (19366, 374, pytest.approx(4.314579))
    assert azure[-1].arrival_s == pytest.approx(3501.7, abs=0.1)
    path = data_dir / "traces/mooncake/conversation_trace.jsonl"
    mooncake = mooncake_requests(path, 16, 1)
    assert len(mooncake) == 12031
    assert [request.prompt_len for request in mooncake[:2]] == [423, 458]  # of 6758 and 7322
    assert {request.pieces[0] for request in mooncake[:5]} == {Piece(Source.BLOCK, 0, 32)}
    args = BenchArgs(dataset_name="mooncake", dataset_path=str(path), trace_scale_lengths=16, trace_context_len=512)
    assert 0 < len(workload(args)) < 12031


# The command line


def test_the_table_and_the_record(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.jsonl"
    flags = f"--backend vllm --base-url {server.url}/v1/ --vocab-size 50 --num-prompts 3 --random-input-len 4"
    flags += f" --random-output-len 3 --random-range-ratio 1 --output-file {path}"
    assert main(flags.split()) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert all(len(line) <= 80 for line in output.out.splitlines())
    for words in (
        "Serving benchmark",
        "Time to first token (ms)",
        "/v1/completions at http",
        "model fake",
        "all at once",
    ):
        assert words in output.out
    server.answer = lambda number, body: plain(500, b"no") if number > 5 else None
    assert main([*flags.split(), "--output-details", "--warmup-requests", "0"]) == 1
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["backend"], first["num_prompts"], first["random_input_len"], first["completed"]) == ("vllm", 3, 4, 3)
    assert (first["base_url"], first["request_rate"], first["model"]) == (server.url, "inf", "fake")
    assert "gsp_num_groups" not in first
    assert "itls" not in first
    assert second["failed"] == 1
    assert sorted(len(gaps) for gaps in second["itls"]) == [0, 2, 2]
    assert sorted(second["generated_texts"]) == ["", "ababab", "ababab"]
    assert second["request_errors"].count("HTTP 500: no") == 1


def test_no_option_has_the_name_of_a_figure() -> None:
    assert not {item.name for item in fields(BenchArgs)} & set(figures([Observation(1, 1)], 1.0, 0.0, True))


@pytest.mark.parametrize("name", [name for name in BACKENDS])
def test_every_spelling_of_a_backend(name: str) -> None:
    assert BenchArgs(backend=name).api in (NATIVE, COMPLETIONS, CHAT)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "triton"}, "--backend cannot be 'triton'"),
        ({"request_rate": 0.0}, "--request-rate must be at least"),
        ({"request_rate": math.nan}, "--request-rate must be at least"),
        ({"random_range_ratio": 1.5}, "at most 1"),
        ({"gsp_num_groups": 3}, "--gsp-num-groups belongs to --dataset-name generated-shared-prefix, not random"),
        ({"dataset_name": "azure"}, "--dataset-name azure needs --dataset-path"),
        ({"dataset_path": "x"}, "--dataset-path belongs to --dataset-name mooncake"),
        (
            {"dataset_name": "azure", "dataset_path": "x", "trace_speed": 2.0, "request_rate": 1.0},
            "--trace-speed would do nothing",
        ),
        ({"extra_request_body": "{"}, "not JSON"),
        ({"extra_request_body": "[1]"}, "must be a JSON object"),
        ({"base_url": "http://a", "port": 5}, "either --base-url"),
        ({"output_details": True}, "needs --output-file"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BenchError, match=words):
        BenchArgs(**options)


def test_errors_are_one_line(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--base-url", server.url, "--backend", "openai"]
    assert main([*flags, "--tokenizer", "/nowhere/at/all"]) == 2
    assert main([*flags, "--backend", "openai-chat", "--vocab-size", "9"]) == 2
    assert main([*flags, "--seed", "-1"]) == 2
    server.answer = lambda number, body: plain(400, b'{"error": {"message": "ignore_eos is unknown"}}')
    assert main([*flags, "--vocab-size", "9"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "--tokenizer" in lines[0]
    assert "prompts of text need a tokenizer" in lines[1]
    assert "--seed must be at least 0" in lines[2]
    assert lines[3] == "bench_serving: error: a warm-up request failed: HTTP 400: ignore_eos is unknown"
    assert len(lines) == 4


def test_defaults_that_the_help_tells_are_true() -> None:
    helps = {item.name: item.metadata["help"] for item in fields(BenchArgs)}
    for options in DATASET_OPTIONS.values():
        for name, value in options.items():
            if value is not None:
                assert f"unset: {value:g}" in helps[name]


def test_a_tokenizer_without_words_is_told() -> None:
    vocabulary = Vocabulary.from_tokenizer(Tokenizer(WordLevel({"字": 0}, unk_token="字")))
    with pytest.raises(WorkloadError, match="words of plain letters"):
        vocabulary.text([Piece(Source.OWN, 0, 3)], 1)
