"""The layer between uvicorn and the routes: access, request bodies, and disconnected clients."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any, NoReturn, Self, TypeVar
from uuid import uuid4

import msgspec
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rtp_llm.srt.entrypoints.access import OPEN_PATHS, Access
from rtp_llm.srt.entrypoints.connections import REFUSED
from rtp_llm.srt.entrypoints.dialects import REQUEST_ID, request_id_headers, spoken, takes_any_type
from rtp_llm.srt.entrypoints.edge import check_json
from rtp_llm.srt.entrypoints.errors import ApiError, invalid, unavailable
from rtp_llm.srt.entrypoints.frontend import LiveCall
from rtp_llm.srt.entrypoints.json_size import check_json_size
from rtp_llm.srt.entrypoints.neutral import strict_requests
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.srt.utils.workers import Workers

T = TypeVar("T")

MAX_REQUEST_ID_CHARS = 128
CLIENT_CLOSED_REQUEST = 499  # for logs: the client has gone
JSON_TYPE = "application/json"
DONE = b"data: [DONE]\n\n"
LARGE_BODY = 256 * 1024  # bytes
MAX_LARGE_BODIES = 16


class Gate:
    """The outermost application: checks access, counts open requests, and answers 503 while the model is loading.

    Attributes:
        app: the application behind it; None while the model is being loaded.
        draining: open requests may finish, new ones are refused.
    """

    def __init__(self, access: Access) -> None:
        self.app: ASGIApp | None = None
        self.draining = False
        self._access = access
        self._num_inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is spoken here, not {scope['type']}")
        self._num_inside += 1
        self._empty.clear()
        send = _with_request_id(scope, send)
        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await spoken(refusal, scope["path"]).response()(scope, receive, send)
            elif self.app is not None:
                await self.app(scope, receive, send)
        finally:
            self._num_inside -= 1
            if not self._num_inside:
                self._empty.set()

    def _refusal(self, scope: Scope) -> ApiError | None:
        refused = self._access.refusal(scope)
        if refused is not None:
            return refused
        if scope.get("state", {}).get(REFUSED) and scope["path"] not in OPEN_PATHS:
            return unavailable("there are too many connections", "too_many_connections")
        if self.draining:
            return unavailable("the server is shutting down", "shutting_down")
        if self.app is None:
            return unavailable("the model is being loaded", "not_ready")
        return None

    async def wait_empty(self, timeout_s: float) -> bool:
        """Wait for all requests to end; return whether they did within the time."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


def _with_request_id(scope: Scope, send: Send) -> Send:
    """Name each answer in ``X-Request-Id``, and in what its dialect has for it: as the client named its request, if
    that is printable and short."""
    given = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
    is_sane = 0 < len(given) <= MAX_REQUEST_ID_CHARS and all(32 < byte < 127 for byte in given)
    request_id = given if is_sane else uuid4().hex.encode()
    named = [(name, request_id) for name in request_id_headers(scope["path"])]

    async def send_named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *named]}
        await send(message)

    return send_named


class Bodies:
    """Bytes of all bodies being read or handled, at most ``MAX_LARGE_BODIES`` times ``max_body_size``.

    Args:
        max_body_size: bytes of the largest body.
    """

    def __init__(self, max_body_size: int) -> None:
        self.max_body_size = max_body_size
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        if self.num_bytes + num_bytes > MAX_LARGE_BODIES * self.max_body_size:
            raise unavailable("too many large bodies are being read", "too_many_bodies")
        self.num_bytes += num_bytes


class StrictRequest(Request):
    """A request whose body is strict JSON (RFC 8259) in UTF-8, and not too large. Leaving its context releases the
    body's bytes in ``Bodies``."""

    _num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.app.state.bodies.num_bytes -= self._num_bytes

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            bodies: Bodies = self.app.state.bodies
            limit = bodies.max_body_size
            length = self.headers.get("content-length", "")
            if length.isdecimal() and int(length) > limit:
                raise _too_large(limit)
            chunks = []
            async for chunk in self.stream():
                if self._num_bytes + len(chunk) > limit:
                    raise _too_large(limit)
                bodies.add(len(chunk))
                self._num_bytes += len(chunk)
                chunks.append(chunk)
            self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Any:
        """Return the body, checked by ``edge.check_json``. A large one is parsed on another thread, after its number of
        values has been checked."""
        body = await self.body()
        try:
            if len(body) <= LARGE_BODY:
                return self._checked(body)
            workers: Workers = self.app.state.workers
            return await workers.run(partial(self._checked, body, is_large=True))
        except InvalidRequest as error:
            raise invalid(error) from None

    def _checked(self, body: bytes, is_large: bool = False) -> Any:
        if is_large:
            check_json_size(body)
        value = self._parsed(body)
        check_json(value)
        return value

    def _parsed(self, body: bytes) -> Any:
        try:
            return json.loads(body.decode(), parse_constant=_no_constant)
        except UnicodeDecodeError as error:
            raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}") from None
        except RecursionError:
            raise ApiError(400, "the body is not acceptable JSON: it is nested too deeply") from None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than the {limit} bytes that this server takes", code="body_too_large")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


class StrictRoute(APIRoute):
    """A route that reads its body through StrictRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        takes_body = self.body_field is not None

        async def handle_strictly(request: Request) -> Response:
            scope, kind = request.scope, request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if takes_body and kind != JSON_TYPE:
                if not takes_any_type(scope["path"]):
                    raise ApiError(415, f"the body must be JSON: send Content-Type: application/json, not {kind!a}")
                scope = _with_json_type(scope)
            strict_requests.set(request.app.state.strict_requests)
            try:
                with StrictRequest(scope, request.receive) as strict:
                    return await handle(strict)
            except ClientDisconnect:  # before the body was complete
                return Response(status_code=CLIENT_CLOSED_REQUEST)

        return handle_strictly


def _with_json_type(scope: Scope) -> Scope:
    """Return the scope of the same request, whose body is declared to be JSON."""
    others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", JSON_TYPE.encode())]}


class JSON(Response):
    """A JSON response of any value that msgspec can encode."""

    media_type = JSON_TYPE

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


# Line ends in Unicode that JSON does not escape: clients may split a stream of text at them.
LINE_ENDS = {b"\xc2\x85": b"\\u0085", b"\xe2\x80\xa8": b"\\u2028", b"\xe2\x80\xa9": b"\\u2029"}


def event(value: Any, name: str | None = None) -> bytes:
    """Return a server-sent event, its data one line by ASCII and by Unicode. ``name``: the event's type."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + line(value) + b"\n"


def line(value: Any) -> bytes:
    """Return JSON, and a line end, which is the only one by ASCII and by Unicode."""
    content = msgspec.json.encode(value)
    if not content.isascii():
        for character, escape in LINE_ENDS.items():
            content = content.replace(character, escape)
    return content + b"\n"


class EventStream(Response):
    """A call's server-sent events, or another stream, and ``end``. If the client disconnects, the call ends at once."""

    def __init__(
        self,
        call: LiveCall,
        events: AsyncGenerator[bytes, None],
        end: bytes = DONE,
        media_type: str = "text/event-stream",
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type=media_type)
        del self.headers["content-length"]
        self._call = call
        self._events = events
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._call:
            await unless_disconnected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for part in events:
                await send(_part(part, more=True))
        await send(_part(self._end, more=False))


def _part(body: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of ``work``; if the client disconnects first, cancel it and return None."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            return None
        return worker.result()
    finally:
        watcher.cancel()
        worker.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    """Wait until the client has disconnected; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
