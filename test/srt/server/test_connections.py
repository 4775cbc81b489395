"""Connections whose client is slow, silent or gone, and too many of them."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import httpx
import pytest

from tiny_server import InProcess, in_process, wait_for

pytestmark = pytest.mark.xdist_group("server-in-process")

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LONG = {"prompt": "the cat", "max_tokens": 480, "ignore_eos": True, "stream": True, "logprobs": 20}


@pytest.fixture(scope="module")
def hasty(tiny_checkpoint: str) -> Iterator[InProcess]:
    timeouts = dict.fromkeys(("header_timeout", "body_timeout", "send_timeout", "keep_alive_timeout"), 0.3)
    with in_process(tiny_checkpoint, **timeouts) as running:
        yield running


@pytest.fixture(scope="module")
def narrow(tiny_checkpoint: str) -> Iterator[InProcess]:
    with in_process(tiny_checkpoint, max_connections=3, header_timeout=1000, keep_alive_timeout=1000) as running:
        yield running


def connect(server: InProcess) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=60)
    return connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection, or drops it, which resets it."""
    received = b""
    with suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


def status_and_code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def is_well(server: InProcess) -> bool:
    return httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"", None),
        (b"GET /hea", (408, "request_timeout")),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", (408, "request_timeout")),
        (POST + b"Content-Length: 100\r\n\r\n", (408, "request_timeout")),
        (POST + b"Content-Length: 100\r\n\r\n{", (408, "request_timeout")),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", (408, "request_timeout")),
        (b"nonsense\r\n\r\n", (400, "invalid_http")),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", (400, "invalid_http")),
    ],
)
def test_who_sends_nothing_more_is_let_go(hasty: InProcess, sent: bytes, expected: tuple[int, str] | None) -> None:
    with closing(connect(hasty)) as connection:
        connection.sendall(sent)
        answer = rest(connection)
    assert (status_and_code(answer) if answer else None) == expected
    assert is_well(hasty)


@pytest.mark.parametrize("head", [b"GET /health HTTP/1.1\r\nX: ", POST + b"Content-Length: 1000\r\n\r\n"])
def test_a_byte_now_and_then_is_not_enough(hasty: InProcess, head: bytes) -> None:
    with closing(connect(hasty)) as connection:
        connection.sendall(head)
        connection.settimeout(0.05)
        answer = b""
        for _ in range(1000):  # fifty seconds: far more than the server waits
            try:
                answer += connection.recv(65536)
            except TimeoutError:
                connection.sendall(b"a")
                continue
            connection.settimeout(60)
            answer += rest(connection)
            break
    assert status_and_code(answer) == (408, "request_timeout")


def test_a_connection_between_two_requests(hasty: InProcess) -> None:
    with closing(connect(hasty)) as connection:
        connection.sendall(HEALTH)
        assert rest(connection).startswith(b"HTTP/1.1 200 OK")  # and then it is closed


def test_who_does_not_read_is_let_go(hasty: InProcess) -> None:
    body = json.dumps(LONG).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(hasty.url.rsplit(":", 1)[1])))
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: hasty.uvicorn.num_connections == 1)
        wait_for(lambda: hasty.uvicorn.num_connections == 0, 60)
    wait_for(lambda: not hasty.core.client.num_live)
    assert is_well(hasty)


@pytest.mark.parametrize(
    ("head", "status"), [(b"Content-Length: 100000000\r\n\r\n", 413), (b"Content-Length: 1000\r\nHost: y\r\n\r\n", 400)]
)
def test_a_body_that_is_not_wanted_is_not_read(server: InProcess, head: bytes, status: int) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(POST + head)
        answer = rest(connection)  # ends, though the body has not come
    assert answer.startswith(b"HTTP/1.1 %d" % status)
    assert answer.partition(b"\r\n\r\n")[0].lower().count(b"connection: close") == 1


def test_an_answer_after_the_body_leaves_the_connection_open(server: InProcess) -> None:
    with closing(connect(server)) as connection:
        for _ in range(2):
            connection.sendall(POST + b"Content-Length: 2\r\n\r\n{}")
            answer = b""
            while not answer.endswith(b"}}"):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 400") and b"connection" not in answer.lower()


def test_the_answer_to_a_large_body_arrives(tiny_checkpoint: str) -> None:
    with in_process(tiny_checkpoint, max_body_size=2048, api_key="one") as server:
        for headers, status in (({}, 401), ({"X-Api-Key": "one"}, 413)):
            for _ in range(5):
                response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a" * 10**6}, headers=headers)
                assert response.status_code == status


def test_silent_connections_make_room(narrow: InProcess) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(closing(connect(narrow))) for _ in range(20)]
        for _ in range(5):
            assert is_well(narrow)
        silent[0].settimeout(60)
        assert rest(silent[0]) == b""  # the first is closed
        wait_for(lambda: narrow.uvicorn.num_connections <= 4)


def test_silent_connections_make_room_before_they_speak_tls(tiny_checkpoint: str, certificate: tuple[str, str]) -> None:
    options = {
        "max_connections": 3,
        "header_timeout": 1000.0,
        "ssl_certfile": certificate[0],
        "ssl_keyfile": certificate[1],
    }
    with in_process(tiny_checkpoint, **options) as server, ExitStack() as stack:
        for _ in range(100):  # more than the limit and what is beyond it
            stack.enter_context(closing(connect(server)))
        url = server.url.replace("http:", "https:")
        assert httpx.get(f"{url}/health", verify=False, timeout=60).status_code == 200


def test_connections_with_requests_are_kept(narrow: InProcess) -> None:
    body = json.dumps(LONG | {"n": 16}).encode()  # more than the system keeps for a reader that does not read
    with ExitStack() as stack:
        for _ in range(3):
            busy = stack.enter_context(socket.socket())
            busy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            busy.connect(("127.0.0.1", int(narrow.url.rsplit(":", 1)[1])))
            busy.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: sum(not c.is_idle for c in narrow.uvicorn.server_state.connections) == 3)
        assert is_well(narrow)
        refused = httpx.get(f"{narrow.url}/v1/models")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
    wait_for(lambda: not narrow.core.client.num_live)
    wait_for(lambda: httpx.get(f"{narrow.url}/v1/models").status_code == 200)


def test_without_descriptors_connections_wait(
    server: InProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [OSError(24, "Too many open files")] * 3
    accept = server.loop.sock_accept

    async def fail(listener: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return await accept(listener)

    is_well(server)  # the accept that waits already gets through
    monkeypatch.setattr(server.loop, "sock_accept", fail)
    start_s = time.monotonic()
    assert is_well(server) and is_well(server)
    assert not failures and time.monotonic() - start_s < 30
    assert sum("no connection can be accepted" in record.message for record in caplog.records) <= 1
