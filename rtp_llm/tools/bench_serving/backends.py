"""The three APIs to generate with: their requests and their events."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rtp_llm.tools.bench_serving.errors import BrokenResponse, RequestFailed, error_message

END_OF_STREAM = "[DONE]"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for a backend: a prompt of ids or of text, and how much to generate."""

    prompt: list[int] | str
    output_len: int
    model: str
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """The content of one event. Counts are totals so far, and None if the event has none.

    ``text``: of this event, or the whole text so far if ``cumulative``. ``has_tokens``: the event carries generated
    tokens, not only a role, usage or an ending.
    """

    text: str = ""
    cumulative: bool = False
    has_tokens: bool = False
    finished: bool = False
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """An API to generate with: its path, whether it takes ids, a request's body, and the reader of an event."""

    name: str
    path: str
    takes_ids: bool
    body: Callable[[Ask], dict[str, Any]]
    read: Callable[[dict[str, Any]], Chunk]
    aliases: tuple[str, ...] = field(default=())


def read_event(backend: Backend, data: str) -> Chunk:
    """Return the content of an event. Raise RequestFailed if it is an error, or malformed."""
    try:
        event = json.loads(data)
    except ValueError:
        raise BrokenResponse(f"an event is not JSON: {data[:200]!r}") from None
    if not isinstance(event, dict):
        raise BrokenResponse(f"an event must be a JSON object, not {data[:200]!r}")
    if event.get("error"):
        raise RequestFailed(f"the server ended the stream with an error: {error_message(event)}")
    try:
        return backend.read(event)
    except (AttributeError, LookupError, TypeError):
        raise BrokenResponse(f"an event is not one of {backend.path}: {data[:200]!r}") from None


def _native_body(ask: Ask) -> dict[str, Any]:
    params: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": ask.output_len}
    if ask.ignore_eos:
        params["ignore_eos"] = True
    prompt = {"text" if isinstance(ask.prompt, str) else "input_ids": ask.prompt}
    return prompt | {"sampling_params": params, "stream": True}


def _read_native(event: dict[str, Any]) -> Chunk:
    meta = event["meta_info"]
    finish = meta.get("finish_reason")
    if finish and finish["type"] == "abort":
        raise RequestFailed(f"the server ended the request: {finish.get('message') or 'without saying why'}")
    return Chunk(
        text=event.get("text") or "",
        cumulative=True,
        has_tokens=meta["completion_tokens"] > 0,
        finished=bool(finish),
        prompt_tokens=_count(meta.get("prompt_tokens")),
        cached_tokens=_count(meta.get("cached_tokens")),
        completion_tokens=_count(meta["completion_tokens"]),
    )


def _openai_body(ask: Ask) -> dict[str, Any]:
    body: dict[str, Any] = {"model": ask.model, "max_tokens": ask.output_len, "temperature": 0.0}
    if ask.ignore_eos:
        body["ignore_eos"] = True
    return body | {"stream": True, "stream_options": {"include_usage": True}}


def _completions_body(ask: Ask) -> dict[str, Any]:
    return _openai_body(ask) | {"prompt": ask.prompt}


def _chat_body(ask: Ask) -> dict[str, Any]:
    return _openai_body(ask) | {"messages": [{"role": "user", "content": ask.prompt}]}


def _read_completion(event: dict[str, Any]) -> Chunk:
    """Read an event. With an empty text it carries a token without text yet (half a character), or is the end."""
    choices = event.get("choices") or []
    finished = any(choice.get("finish_reason") for choice in choices)
    text = "".join(choice.get("text") or "" for choice in choices)
    has_tokens = bool(text) or (bool(choices) and not finished)
    return Chunk(text, False, has_tokens, finished, *_usage(event))


def _read_chat(event: dict[str, Any]) -> Chunk:
    choices = event.get("choices") or []
    deltas = [choice.get("delta") or {} for choice in choices]
    text = "".join((delta.get("reasoning_content") or "") + (delta.get("content") or "") for delta in deltas)
    has_tokens = bool(text) or any(delta.get("tool_calls") or delta.get("reasoning") for delta in deltas)
    finished = any(choice.get("finish_reason") for choice in choices)
    return Chunk(text, False, has_tokens, finished, *_usage(event))


def _usage(event: dict[str, Any]) -> tuple[int | None, int | None, int | None]:
    """Return tokens of the prompt, cached ones of these, and generated ones: the last fields of a Chunk."""
    usage = event.get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return _count(usage.get("prompt_tokens")), _count(cached), _count(usage.get("completion_tokens"))


def _count(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and value >= 0):
        return value
    raise TypeError(f"{value!r} is not a number of tokens")


NATIVE = Backend("rtp-llm", "/generate", True, _native_body, _read_native, ("sglang", "sglang-native"))
COMPLETIONS = Backend(
    "openai", "/v1/completions", True, _completions_body, _read_completion, ("sglang-oai", "vllm", "llama-server")
)
CHAT = Backend("openai-chat", "/v1/chat/completions", False, _chat_body, _read_chat, ("sglang-oai-chat", "vllm-chat"))
BACKENDS = {name: backend for backend in (NATIVE, COMPLETIONS, CHAT) for name in (backend.name, *backend.aliases)}
