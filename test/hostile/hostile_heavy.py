"""Single requests that ask for more work than any should get: by name, each sent once, not drawn."""

import json
from collections.abc import Callable
from typing import Any

from hostile_media import data_uri, gif, png, webp, webp_lossy
from hostile_wire import HangUp, Pause, Plan, Send, request

MIB = 1 << 20


def _post(path: str, body: Any) -> Plan:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Plan((Send(request("POST", path, raw)),))


def _left(plan: Plan) -> Plan:
    """By a client that hangs up after a second: what it asked for must not go on."""
    return Plan((*plan.steps, Pause(1.0), HangUp()), (), must_answer=False)


def _completion(**body: Any) -> Plan:
    return _post("/v1/completions", {"max_tokens": 1} | body)


def _pictures(data: bytes, count: int) -> Plan:
    part = {"type": "image_url", "image_url": {"url": data_uri(data)}}
    return _post("/v1/chat/completions", {"messages": [{"role": "user", "content": [part] * count}], "max_tokens": 1})


def _messages(count: int, text: str) -> Plan:
    return _post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}] * count, "max_tokens": 1})


HEAVY: dict[str, Callable[[], Plan]] = {
    "a text of 1 MiB of one letter": lambda: _completion(prompt="a" * MIB),
    "a text of 4 MiB of words": lambda: _completion(prompt="the cat " * (MIB // 2)),
    "a text of 20 MiB of one letter": lambda: _completion(prompt="a" * (20 * MIB)),
    "a text of 20 MiB, left": lambda: _left(_completion(prompt="a" * (20 * MIB))),
    "a message of 8 MiB": lambda: _messages(1, "hello world " * 700_000),
    "a text of 8 MiB to tokenize": lambda: _post("/tokenize", {"prompt": "the cat " * MIB}),
    "a million ids": lambda: _completion(prompt=[7] * 1_000_000),
    "a million ids to generate": lambda: _post("/generate", {"input_ids": [7] * 1_000_000}),
    "four million ids to detokenize": lambda: _post("/detokenize", {"tokens": [7] * 4_000_000}),
    "4,000 messages": lambda: _messages(4000, "a"),
    "60,000 messages": lambda: _messages(60_000, "a"),
    "half a million lists in each other": lambda: _post(
        "/tokenize", b'{"prompt":' + b"[" * 500_000 + b"]" * 500_000 + b"}"
    ),
    "a million objects": lambda: _post("/v1/completions", b'{"prompt":[' + b",".join([b"{}"] * 1_000_000) + b"]}"),
    "half a million fields": lambda: _completion(prompt="a", **{f"k{i}": 1 for i in range(500_000)}),
    "200,000 biases": lambda: _completion(prompt="a", logit_bias={str(i): 1 for i in range(200_000)}),
    "integers of 4,300 digits": lambda: _post(
        "/v1/completions", b'{"prompt":[' + b",".join([b"1" * 4300] * 4000) + b"]}"
    ),
    "2,000 prompts": lambda: _completion(prompt=["a"] * 2000),
    "4,096 texts": lambda: _post("/generate", {"text": ["a"] * 4096, "sampling_params": {"max_new_tokens": 1}}),
    "128 choices of 2,000 prompts, left": lambda: _left(_completion(prompt=["a"] * 2000, n=128, temperature=1)),
    "128 choices": lambda: _completion(prompt="a", n=128, temperature=1, max_tokens=8),
    "30 lossless pictures of 16383 x 4880": lambda: _pictures(webp(16383, 4880), 30),
    "30 lossy pictures of 16383 x 4880": lambda: _pictures(webp_lossy(16383, 4880), 30),
    "30 pictures of 4000 x 4000": lambda: _pictures(gif(4000, 4000, 1), 30),
    "30 pictures of 8000 x 8000 without pixels": lambda: _pictures(png(8000, 8000, b""), 30),
}
