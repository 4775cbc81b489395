"""Takes HTTP requests for replicas, and asks another one where one dies before its answer has begun."""

import json
import logging
from collections.abc import Callable
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from rtp_llm.serve.calls import Answer, Call, Head, prompt_of
from rtp_llm.srt.entrypoints.errors import TYPES

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 * 2**20
MAX_TRIES = 4
HOP_BY_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer"}


class ReplicaLost(Exception):
    """The replica that was asked died, or cannot be reached."""


class NoReplica(Exception):
    """No replica can take the request now."""


class Ingress:
    """An ASGI application.

    Args:
        ask: asks some replica. Its answer may raise ReplicaLost: at any time, or NoReplica: before it begins.
        max_body_bytes: of the largest body; larger ones are refused.
    """

    def __init__(self, ask: Callable[[Call], Answer], max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._ask = ask
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is spoken here, not {scope['type']}")
        body = await self._body(Request(scope, receive))
        if body is None:
            text = f"the body is larger than the {self._max_body_bytes} bytes that this server takes"
            await _error(413, text, "body_too_large")(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name not in HOP_BY_HOP]
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        call = Call(scope["method"], path, scope["query_string"], headers, body, prompt_of(path, body))
        for attempt in range(1, MAX_TRIES + 1):
            answered = _Answered(send)
            try:
                await answered.forward(self._ask(call))
                return
            except NoReplica as error:
                await _error(503, str(error), "overloaded", {"retry-after": "1"})(scope, receive, send)
                return
            except ReplicaLost as error:
                logger.warning("a replica was lost at attempt %d of %d: %s", attempt, MAX_TRIES, error)
                if answered.has_begun:
                    await answered.end_broken()
                    return
        await _error(503, f"{MAX_TRIES} replicas died while they were asked", "replicas_lost")(scope, receive, send)

    async def _body(self, request: Request) -> bytes | None:
        """Return the whole body; None if it is too large."""
        chunks, size = [], 0
        async for chunk in request.stream():
            chunks.append(chunk)
            size += len(chunk)
            if size > self._max_body_bytes:
                return None
        return b"".join(chunks)


class _Answered:
    """An answer as far as it has been sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_stream = False
        self.has_begun = False

    async def forward(self, answer: Answer) -> None:
        async with aclosing(answer) as pieces:
            async for piece in pieces:
                if isinstance(piece, Head):
                    await self._begin(piece)
                else:
                    await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, head: Head) -> None:
        headers = [(name, value) for name, value in head.headers if name.lower() not in HOP_BY_HOP]
        kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
        self._is_stream = kind.startswith(b"text/event-stream")
        self.has_begun = True
        await self._send({"type": "http.response.start", "status": head.status, "headers": headers})

    async def end_broken(self) -> None:
        """End an answer that cannot go on: a stream of events by an error, another by closing the connection.

        Raises:
            ReplicaLost: it is no stream; the server closes the connection, since the answer is not complete.
        """
        if not self._is_stream:
            raise ReplicaLost("the replica died in the midst of its answer")
        error = _body("the replica that was answering died: ask again", "replica_lost", 500)
        event = b"data: " + json.dumps(error).encode() + b"\n\n"
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _body(message: str, code: str, status: int) -> dict[str, dict[str, str | None]]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "internal_server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _error(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(_body(message, code, status), status, headers)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            await send({"type": "lifespan.shutdown.complete"})
            return
