"""The ingress before replicas, and the client of an application within the process, without Ray."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from rtp_llm.serve.asgi_client import answer
from rtp_llm.serve.calls import Answer, Call, Head, prompt_of
from rtp_llm.serve.ingress import MAX_TRIES, Ingress, NoReplica, ReplicaLost

STREAM = Head(200, [(b"content-type", b"text/event-stream; charset=utf-8"), (b"connection", b"keep-alive")])
PLAIN = Head(200, [(b"content-type", b"application/json")])


class Replicas:
    """Answers calls by a script: each is a list of pieces and exceptions. Keeps the calls."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.calls: list[Call] = []
        self.closed = 0

    async def ask(self, call: Call) -> Answer:
        self.calls.append(call)
        try:
            for piece in self.scripts.pop(0):
                if isinstance(piece, Exception):
                    raise piece
                await asyncio.sleep(0)
                yield piece
        finally:
            self.closed += 1


def post(replicas: Replicas, body: Any, **options: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Ingress(replicas.ask, **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/completions?a=b", content=json.dumps(body), headers={"x-mine": "1"})

    return asyncio.run(ask())


def test_an_answer_passes_through():
    replicas = Replicas([PLAIN, b'{"a"', b": 1}"])
    response = post(replicas, {"prompt": "hello"})
    assert (response.status_code, response.json()) == (200, {"a": 1})
    [call] = replicas.calls
    assert (call.method, call.path, call.query, call.prompt) == ("POST", "/v1/completions", b"a=b", "hello")
    assert (b"x-mine", b"1") in call.headers and json.loads(call.body) == {"prompt": "hello"}
    assert replicas.closed == 1


def test_a_replica_that_dies_before_it_answers_is_replaced():
    replicas = Replicas([ReplicaLost("killed")], [ReplicaLost("killed")], [PLAIN, b"{}"])
    assert post(replicas, {}).status_code == 200
    assert len(replicas.calls) == 3 and len({id(call) for call in replicas.calls}) == 1


def test_not_for_ever():
    replicas = Replicas(*[[ReplicaLost("killed")]] * MAX_TRIES)
    response = post(replicas, {})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "replicas_lost")


def test_a_stream_that_has_begun_ends_with_an_error_event():
    response = post(Replicas([STREAM, b"data: 1\n\n", ReplicaLost("killed")]), {"stream": True})
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[0] == "1" and json.loads(events[1])["error"]["code"] == "replica_lost"
    assert "connection" not in response.headers


def test_another_answer_that_has_begun_is_broken_off():
    with pytest.raises(ReplicaLost, match="in the midst"):
        post(Replicas([PLAIN, b"{", ReplicaLost("killed")]), {})


def test_no_room():
    response = post(Replicas([NoReplica("all replicas are busy")]), {})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


def test_a_large_body_is_refused():
    replicas = Replicas()
    response = post(replicas, {"prompt": "x" * 100}, max_body_bytes=50)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large") and not replicas.calls


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"prompt": ["a ", "b"]}, "a b"),
        ({"prompt": [1, 2]}, "1 2 "),
        ({"text": "t"}, "t"),
        ({"system": "s", "messages": [{"role": "user", "content": "hi"}]}, "suserhi"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, "userhi"),
        ({"instructions": "i", "input": "x"}, "ix"),
        ({"rid": "x"}, "/p"),
        ([], "/p"),
    ],
)
def test_prompts(body: Any, prompt: str):
    assert prompt_of("/p", json.dumps(body).encode()) == prompt


def test_without_a_body():
    assert prompt_of("/health", b"") == "/health"


def asked(app: Callable[..., Any], body: bytes = b"") -> list[Any]:
    async def ask() -> list[Any]:
        return [piece async for piece in answer(app, Call("POST", "/p", b"q=1", [(b"a", b"b")], body, ""))]

    return asyncio.run(ask())


def test_an_application_is_asked_within_the_process():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        told = {"path": request.url.path, "q": request.query_params["q"], "a": request.headers["a"]}
        await JSONResponse(told | {"body": (await request.body()).decode()}, 201)(scope, receive, send)

    head, body = asked(app, b"xyz")
    assert head.status == 201 and json.loads(body) == {"path": "/p", "q": "1", "a": "b", "body": "xyz"}


def test_what_an_application_raises_is_raised():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("it is broken")

    with pytest.raises(ValueError, match="it is broken"):
        asked(app)


def test_who_stops_reading_has_hung_up():
    ended = []

    async def count() -> Any:
        try:
            for number in range(1_000_000):
                yield f"data: {number}\n\n"
        finally:
            ended.append(number)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await StreamingResponse(count())(scope, receive, send)

    async def read_two() -> None:
        pieces = answer(app, Call("GET", "/", b"", [], b"", ""))
        assert [await anext(pieces) for _ in range(3)][1:] == [b"data: 0\n\n", b"data: 1\n\n"]
        await pieces.aclose()
        for _ in range(100):
            await asyncio.sleep(0)

    asyncio.run(read_two())
    assert ended and ended[0] < 100
