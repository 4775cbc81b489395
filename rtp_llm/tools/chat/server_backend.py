"""The chat backend of an OpenAI-compatible server."""

import argparse
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import fields
from typing import Any

from rtp_llm.srt.configs.options import ServerArgsError
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.tools.chat.conversation import ContextFull, Message, Piece, Usage
from rtp_llm.tools.http_client import ServerError, api_url, served_models, stream_json

SERVER_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}  # OpenAI's names of sampling parameters
CONTEXT_WORDS = ("context_length", "context length", "maximum context")  # in a server's error, code or message


def server_backend(args: argparse.Namespace, sampling: dict[str, Any]) -> "ServerBackend":
    _refuse_engine_flags(args)
    base_url = api_url(args.url)
    return ServerBackend(base_url, args.api_key, args.model_path or _first_model(base_url, args.api_key), sampling)


def _refuse_engine_flags(args: argparse.Namespace) -> None:
    """Raise for engine flags beside ``--url``; ``--model`` then names one of the server's models."""
    for field in fields(ServerArgs):
        default = "warning" if field.name == "log_level" else field.default
        if field.name not in ("model_path", "api_key") and getattr(args, field.name, default) != default:
            flag = "--" + field.name.replace("_", "-")
            raise ServerArgsError(f"{flag} is for an engine in this process; with --url the server has its own")


def _first_model(base_url: str, api_key: str | None) -> str:
    models = served_models(base_url, api_key)
    if not models:
        raise ServerError(f"{base_url} serves no model")
    return models[0]["id"]


class ServerBackend:
    """Generates through ``/v1/chat/completions`` of a server."""

    def __init__(self, base_url: str, api_key: str | None, model: str, sampling: dict[str, Any]) -> None:
        self._base_url = base_url
        self._api_key = api_key
        self._request = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **{SERVER_NAMES.get(name, name): value for name, value in sampling.items()},
        }

    def __call__(self, messages: list[Message]) -> Generator[Piece | Usage, None, None]:
        request = self._request | {"messages": messages}
        finish_reason = None
        usage: dict[str, Any] = {}
        try:
            with closing(stream_json(f"{self._base_url}/chat/completions", request, self._api_key)) as chunks:
                for chunk in chunks:
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices") or []:
                        yield from _pieces(choice.get("delta") or {})
                        finish_reason = choice.get("finish_reason") or finish_reason
        except ServerError as error:
            if error.status in (400, 413) and any(words in str(error).lower() for words in CONTEXT_WORDS):
                raise ContextFull(str(error)) from error
            raise
        if finish_reason is None:
            raise ServerError("the server ended the answer without saying why (no finish_reason)")
        details = usage.get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens")
        yield Usage(finish_reason, usage.get("prompt_tokens"), usage.get("completion_tokens"), cached)


def _pieces(delta: dict[str, Any]) -> Iterator[Piece]:
    if thought := delta.get("reasoning_content") or delta.get("reasoning"):
        yield Piece(thought, is_thought=True)
    if text := delta.get("content"):
        yield Piece(text)
