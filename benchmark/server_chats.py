"""Answers to chats with pictures from a server with OpenAI's /v1/chat/completions: ours, or any other."""

import argparse
import asyncio
import base64
import json
from collections.abc import Callable, Sequence
from typing import Any

from benchmark.evaluation import Chat, Reply
from benchmark.server_answers import ServerAnswers, add_address_options
from rtp_llm.tools.bench_serving.async_http import BrokenResponse, RequestFailed

MAX_AT_ONCE = 16  # pictures are large
SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"II*\x00": "image/tiff",
    b"MM\x00*": "image/tiff",
}


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    add_address_options(parser)
    parser.add_argument(
        "--extra-request-body", type=json_object, default={}, help="JSON object whose entries are added to each request"
    )
    parser.set_defaults(parallel=MAX_AT_ONCE, tokenizer=None)


def json_object(text: str) -> dict[str, Any]:
    """An argument that is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not {text}")
    return value


class ServerChats(ServerAnswers):
    """An Answerer (see benchmark/evaluation.py) for chats, as ServerAnswers is for texts.

    Nobody counts the tokens of pictures beforehand: a question that does not fit is one that the server refuses.
    """

    async def _meet(self) -> None:
        self._gate = asyncio.Semaphore(self._args.parallel)
        self.model = self._args.model or await self._served_model()
        self.context_len = None
        self.counting = "the server, when it is asked"

    def answer(
        self, prompts: Sequence[Chat], max_new_tokens: int, stop: tuple[str, ...], on_done: Callable[[], None]
    ) -> list[Reply]:
        async def all_of_them() -> list[Reply]:
            return await asyncio.gather(*(self._chat(chat, max_new_tokens, stop, on_done) for chat in prompts))

        return self._runner.run(all_of_them())

    async def _chat(self, chat: Chat, max_new_tokens: int, stop: tuple[str, ...], on_done: Callable[[], None]) -> Reply:
        async with self._gate:  # before the body is made, so that only as many as are under way take memory
            body = {
                "model": self.model,
                "messages": [{"role": "user", "content": [content_part(part) for part in chat.parts]}],
                "max_tokens": max_new_tokens,
                "temperature": 0,
            }
            body |= ({"stop": stop} if stop else {}) | self._args.extra_request_body
            try:
                answer = await self._client.request_json("POST", "/v1/chat/completions", json.dumps(body).encode())
                reply = read_chat_completion(answer)
            except RequestFailed as error:
                reply = Reply(error=str(error))
        on_done()
        return reply


def content_part(part: str | bytes) -> dict[str, Any]:
    """A part of a message: text, or a picture in a ``data:`` URI."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    url = f"data:{media_type(part)};base64,{base64.b64encode(part).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def media_type(picture: bytes) -> str:
    """By its first bytes; what it is not known by is left to the server, which reads the content itself."""
    if picture[:4] == b"RIFF" and picture[8:12] == b"WEBP":
        return "image/webp"
    return next((name for start, name in SIGNATURES.items() if picture.startswith(start)), "application/octet-stream")


def read_chat_completion(answer: Any) -> Reply:
    """The reply in an answer of /v1/chat/completions. Raises BrokenResponse if it is none.

    Content is null where a model has only thought until its tokens ran out: an empty text.
    """
    try:
        text = answer["choices"][0]["message"]["content"]
        num_tokens = (answer.get("usage") or {}).get("completion_tokens")
    except (LookupError, TypeError, AttributeError):
        raise BrokenResponse("/v1/chat/completions sent no completion") from None
    if text is not None and not isinstance(text, str):
        raise BrokenResponse(f"a message's content must be a string, not {text!r}")
    return Reply(text or "", num_tokens if isinstance(num_tokens, int) else None)
