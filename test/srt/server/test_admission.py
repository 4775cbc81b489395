"""How much one request may ask for, and how much all may: asked before any work is done for it."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rtp_llm.srt.managers.engine_client import EngineClient
from rtp_llm.srt.managers.tokenizer_manager import TokenizerManager
from tiny_server import InProcess, in_process

pytestmark = pytest.mark.xdist_group("server-in-process")

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 1.0}
LISTS = [{"n": 2, "max_new_tokens": 1}, {"n": 3, "max_new_tokens": 1}]


@pytest.fixture(scope="module")
def small(tiny_checkpoint: str) -> Iterator[InProcess]:
    """Takes four sequences of one request, and five of all."""
    with in_process(
        tiny_checkpoint, max_running_requests=2, max_queued_requests=3, max_sequences_per_request=4
    ) as running:
        yield running


def post(server: InProcess, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


@pytest.mark.parametrize(
    ("path", "body", "param", "told"),
    [
        ("/v1/chat/completions", CHAT | {"n": 5}, "n", "5 sequences"),
        ("/v1/completions", {"prompt": "a", "n": 5}, "n", "5 sequences"),
        ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2}, "prompt", "6 sequences"),
        ("/v1/completions", {"prompt": [[1], [2], [3], [4], [5]]}, "prompt", "5 sequences"),
        ("/generate", {"text": "a", "sampling_params": {"n": 4096}}, "text", "4096 sequences"),
        ("/generate", {"text": ["a"] * 5}, "text", "5 sequences"),
        ("/generate", {"input_ids": [[1]] * 3, "sampling_params": {"n": 2}}, "input_ids", "6 sequences"),
        ("/generate", {"text": ["a", "b"], "sampling_params": LISTS}, "text", "5 sequences"),
    ],
)
def test_sequences_of_a_request(small: InProcess, path: str, body: dict[str, Any], param: str, told: str) -> None:
    response = post(small, path, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "too_many_sequences")
    assert told in error["message"] and "--max-sequences-per-request" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT | {"n": 4}),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 1, "temperature": 1.0}),
        ("/generate", {"text": ["a"] * 4, "sampling_params": {"max_new_tokens": 1}}),
    ],
)
def test_as_many_as_are_allowed(small: InProcess, path: str, body: dict[str, Any]) -> None:
    response = post(small, path, body)
    answer = response.json()
    assert response.status_code == 200, response.text
    assert len(answer if isinstance(answer, list) else answer["choices"]) == 4


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT | {"n": 3}),
        ("/v1/completions", {"prompt": ["a", "b", "c"]}),
        ("/generate", {"text": "a", "sampling_params": {"n": 3}}),
    ],
)
def test_a_full_queue_refuses_before_any_work(
    small: InProcess, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineClient, "num_live", 3)
    for name in ("encode", "requests"):
        monkeypatch.setattr(TokenizerManager, name, lambda *_: pytest.fail("work was done for it"))
    response = post(small, path, body)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full"), response.text
    assert "3 sequences run or wait, this request has 3, and at most 5" in response.json()["error"]["message"]
    assert response.headers["retry-after"]
    monkeypatch.undo()
    assert post(small, path, body).status_code == 200
