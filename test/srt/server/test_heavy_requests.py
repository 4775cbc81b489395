"""Requests that mean much work: it is done beside the event loop, within its time, and never keeps the server."""

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from rtp_llm.srt.entrypoints import asgi
from rtp_llm.srt.entrypoints.json_size import MAX_VALUES
from tiny_server import InProcess, in_process, make_checkpoint, own_process, wait_for

pytestmark = pytest.mark.xdist_group("server-in-process")

JSON_HEADER = {"Content-Type": "application/json"}
CHATS = "/v1/chat/completions"
# Goes on for ever where a message says so.
LOOPING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
    "{% if 'loop' in m['content'] %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def chat(text: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 1} | options


@pytest.fixture(scope="module")
def looping(tiny_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("template") / "looping.jinja"
    path.write_text(LOOPING)
    return str(path)


@pytest.fixture(scope="module")
def patient(tiny_checkpoint: str, looping: str) -> Iterator[InProcess]:
    with in_process(tiny_checkpoint, chat_template=looping, template_timeout=0.2) as running:
        yield running


def test_a_template_that_does_not_end_costs_its_request_alone(patient: InProcess) -> None:
    for _ in range(3):
        response = httpx.post(f"{patient.url}{CHATS}", json=chat("loop"), timeout=60)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "messages"), response.text
        assert "has not ended within 0.2 s" in error["message"] and "--template-timeout" in error["message"]
        assert httpx.post(f"{patient.url}{CHATS}", json=chat("hi"), timeout=60).status_code == 200


def test_many_of_them_at_once(patient: InProcess) -> None:
    async def ask() -> list[int]:
        async with httpx.AsyncClient(timeout=60) as client:
            texts = ["loop"] * 12 + ["hi"] * 4
            return [
                response.status_code
                for response in await asyncio.gather(
                    *(client.post(f"{patient.url}{CHATS}", json=chat(text)) for text in texts)
                )
            ]

    statuses = asyncio.run(ask())
    assert set(statuses[:12]) <= {400, 503} and set(statuses[12:]) <= {200, 400, 503}  # 400: the others took its time
    wait_for(lambda: httpx.post(f"{patient.url}{CHATS}", json=chat("hi"), timeout=60).status_code == 200)


def test_a_template_that_does_not_end_does_not_keep_the_server(looping: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model")
    flags = ("--chat-template", looping, "--template-timeout", "1000", "--shutdown-timeout", "1")
    with own_process(tmp_path, checkpoint, *flags) as server:
        server.wait_ready()
        threading.Thread(target=_ask_in_vain, args=(server.url,), daemon=True).start()
        time.sleep(1)  # for the template to begin; the answers below hold at any time
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0, server.log.read_text()


def _ask_in_vain(url: str) -> None:
    with suppress(httpx.HTTPError):
        httpx.post(f"{url}{CHATS}", json=chat("loop"), timeout=120)


def test_a_large_body_is_counted_before_it_is_parsed(server: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi.StrictRequest, "_parsed", lambda *_: pytest.fail("it was parsed"))
    for body in (b'{"prompt": [' + b"0," * (MAX_VALUES + 1) + b"0]}", b'{"messages": [' + b"[]," * 10**6 + b"[]]}"):
        response = httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON_HEADER, timeout=60)
        error = response.json()["error"]
        assert (response.status_code, "the body holds more than" in error["message"]) == (400, True), response.text


def test_a_large_body_is_read_as_a_small_one(server: InProcess) -> None:
    padding = {"user": "x" * 2 * asgi.LARGE_BODY}
    url, body = f"{server.url}/v1/completions", {"prompt": "the cat", "max_tokens": 4, "temperature": 0}
    answers = [httpx.post(url, json=body | more, timeout=60).json() for more in ({}, padding)]
    assert answers[0]["choices"] == answers[1]["choices"]
    wrong = json.dumps({"prompt": "a", "user": "x" * 2 * asgi.LARGE_BODY}).encode()[:-1]
    response = httpx.post(f"{server.url}/v1/completions", content=wrong, headers=JSON_HEADER, timeout=60)
    assert (response.status_code, "not JSON" in response.json()["error"]["message"]) == (400, True)


def test_bodies_have_one_budget(tiny_checkpoint: str) -> None:
    size = 2048
    with in_process(tiny_checkpoint, max_body_size=size) as small, ExitStack() as stack:
        bodies = small.app.state.bodies
        port = int(small.url.rsplit(":", 1)[1])
        for _ in range(asgi.MAX_LARGE_BODIES):  # of each all but a byte has come
            held = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {size}"
            held.sendall(head.encode() + b"\r\n\r\n" + b"x" * (size - 1))
        wait_for(lambda: bodies.num_bytes == asgi.MAX_LARGE_BODIES * (size - 1))
        refused = httpx.post(f"{small.url}/generate", json={"text": "a" * 100}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_bodies")
        stack.close()
        wait_for(lambda: bodies.num_bytes == 0)
        assert httpx.post(f"{small.url}/tokenize", json={"text": "a" * 100}, timeout=60).status_code == 200
