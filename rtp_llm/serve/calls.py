"""A request on its way from the ingress to a replica, and its answer on its way back. Plain data."""

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

MAX_PROMPT_CHARS = 16_384  # that routing looks at


@dataclass(frozen=True, slots=True)
class Call:
    """An HTTP request with its whole body. ``prompt``: what a router compares with those of earlier calls."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    prompt: str


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer; its body follows in pieces."""

    status: int
    headers: list[tuple[bytes, bytes]]


Answer = AsyncGenerator[Head | bytes, None]  # one Head, then the body


def prompt_of(path: str, body: bytes) -> str:
    """Return the text that a body's prompt begins with, in any dialect; the path if it has none."""
    try:
        given = json.loads(body)
    except ValueError:
        return path
    if not isinstance(given, dict):
        return path
    parts: list[str] = []
    for name in ("instructions", "system", "messages", "prompt", "text", "input_ids", "input", "query"):
        if name in given:
            _collect(given[name], parts)
    return "".join(parts)[:MAX_PROMPT_CHARS] or path


def _collect(value: Any, parts: list[str]) -> None:
    """Append the texts of messages, contents and lists, and token ids as text."""
    if isinstance(value, str):
        parts.append(value)
    elif isinstance(value, int):
        parts.append(f"{value} ")
    elif isinstance(value, list):
        for item in value[:MAX_PROMPT_CHARS]:
            _collect(item, parts)
    elif isinstance(value, dict):
        for name in ("role", "content", "text"):
            _collect(value.get(name), parts)
