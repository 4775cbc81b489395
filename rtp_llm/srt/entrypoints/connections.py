"""Connections to the HTTP server: accepted while there is room, and closed when their client is too slow.

uvicorn speaks HTTP, without these limits. Each connection is in one phase, which has a deadline:

    waiting for a request's headers   --header-timeout, from the connection or the request's first byte on
    reading a request's body          --body-timeout, longer for large bodies (MIN_BODY_RATE)
    computing, or streaming           none; but a client must take what is written within --send-timeout
    between two requests              --keep-alive-timeout
"""

import asyncio
import errno
import heapq
import json
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from uuid import uuid4

import h11
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.entrypoints.errors import ApiError

logger = logging.getLogger(__name__)

MIN_BODY_RATE = 16 * 1024  # bytes a second: a body that comes as fast may take longer than its timeout
LINGER_S = 2.0  # for the client to read the answer to a request whose body is not read
LINGER_BYTES = 256 * 1024
SPARE_CONNECTIONS = 64  # beyond the limit: answered 503, except for /health
OTHER_DESCRIPTORS = 128  # files and sockets of this process that are not connections
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
RETRY_ACCEPT_S = 0.2
WARN_EVERY_S = 10.0
CLOSE = (b"connection", b"close")
REFUSED = "is_refused"  # in a scope's state: the connection is beyond the limit


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds for each phase of a connection, and how many connections there may be."""

    header_s: float
    body_s: float
    send_s: float
    keep_alive_s: float
    max_connections: int

    @classmethod
    def from_server_args(cls, args: ServerArgs) -> "Limits":
        limit = min(args.max_connections, max(_descriptors() - OTHER_DESCRIPTORS - SPARE_CONNECTIONS, 1))
        if limit < args.max_connections:
            logger.warning("at most %d connections: this process may open no more files (ulimit -n)", limit)
        return cls(args.header_timeout, args.body_timeout, args.send_timeout, args.keep_alive_timeout, limit)


def _descriptors() -> int:
    """Raise the limit of open files as far as the system allows, and return it."""
    try:
        import resource
    except ImportError:  # not on this system
        return 2**16
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return 2**16 if soft == resource.RLIM_INFINITY else soft


class Uvicorn(uvicorn.Server):
    """uvicorn with our own connections, and without its signal handlers."""

    def __init__(self, app: ASGIApp, args: ServerArgs) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            lifespan="off",
            http=H11Protocol,
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=args.keep_alive_timeout,  # type: ignore[arg-type]  # it goes to loop.call_later
        )
        super().__init__(config)
        self.limits = Limits.from_server_args(args)
        self._tls = tls_context(args)
        self._accepting: list[asyncio.Task[None]] = []
        self._opening: dict[asyncio.Task[None], None] = {}  # connections in their TLS handshake, oldest first

    @contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self._accepting = [asyncio.create_task(self._accept(listener)) for listener in sockets or []]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):  # whose client takes nothing any more
            if connection.transport is not None:
                connection.transport.abort()

    async def _accept(self, listener: socket.socket) -> None:
        """Accept connections while there is room; others wait in the system's queue."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        warned_s = -WARN_EVERY_S
        while True:
            try:
                await self._room()
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:
                if listener.fileno() < 0:
                    return
                if error.errno not in NO_DESCRIPTORS:  # the client has gone already
                    continue
                self._drop_idle()
                if time.monotonic() - warned_s > WARN_EVERY_S:
                    warned_s = time.monotonic()
                    logger.warning("no connection can be accepted: %s", error.strerror)
                await asyncio.sleep(RETRY_ACCEPT_S)
                continue
            opening = loop.create_task(self._open(accepted))
            self._opening[opening] = None
            opening.add_done_callback(partial(self._opened, accepted))

    @property
    def num_connections(self) -> int:
        return len(self.server_state.connections) + len(self._opening)

    async def _room(self) -> None:
        """Wait until one more connection is allowed, closing idle ones to make room."""
        if self.num_connections >= self.limits.max_connections:
            self._drop_idle(self.num_connections - self.limits.max_connections + 1)
        while self.num_connections >= self.limits.max_connections + SPARE_CONNECTIONS:
            await asyncio.sleep(RETRY_ACCEPT_S)
            self._drop_idle()

    def _drop_idle(self, count: int = 1) -> None:
        """Close the connections that have waited longest for a request, if there are any."""
        connections = [item for item in self.server_state.connections if isinstance(item, Connection)]
        idle = [connection for connection in connections if connection.is_idle]
        for connection in heapq.nsmallest(count, idle, key=lambda connection: connection.idle_since_s):
            connection.drop()
        if self._tls is not None and len(idle) < count:
            for opening in list(self._opening)[: count - len(idle)]:
                opening.cancel()

    async def _open(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        is_refused = len(self.server_state.connections) >= self.limits.max_connections
        timeouts = {"ssl_handshake_timeout": self.limits.header_s} if self._tls is not None else {}
        with suppress(OSError, TimeoutError):  # ssl.SSLError is one: clients that do not speak TLS are dropped
            await loop.connect_accepted_socket(
                lambda: Connection(self.config, self.server_state, {REFUSED: is_refused}, self.limits, loop),
                accepted,
                ssl=self._tls,
                **timeouts,
            )

    def _opened(self, accepted: socket.socket, opening: asyncio.Task[None]) -> None:
        del self._opening[opening]
        if opening.cancelled():  # perhaps before it began
            accepted.close()


def tls_context(args: ServerArgs) -> ssl.SSLContext | None:
    """Return the context of ``--ssl-certfile`` and ``--ssl-keyfile``. Raise ValueError if they cannot be used."""
    if args.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, args.ssl_keyfile_password or "")
    except (OSError, ssl.SSLError) as error:
        raise ValueError(
            f"--ssl-certfile {args.ssl_certfile} and --ssl-keyfile {args.ssl_keyfile} cannot be used: "
            f"{getattr(error, 'reason', None) or error.strerror or error}; they must be a certificate and its key in "
            "PEM, and --ssl-keyfile-password the key's password, if it has one"
        ) from error
    return context


class _Closing:
    """A transport that is closed by ``close`` alone."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write, self.is_closing = transport.write, transport.is_closing
        self.close = close


class Connection(H11Protocol):
    """One connection, and the deadline of the phase that it is in."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        limits: Limits,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self.app = cast("Any", self._saying_that_it_closes(self.app))
        self._limits = limits
        self._phase: tuple[str, Any] = ("", None)
        self._phase_s = 0.0  # start of the phase
        self._num_bytes = 0  # received in the phase
        self._deadline: asyncio.TimerHandle | None = None
        self._send_deadline: asyncio.TimerHandle | None = None
        self._is_lingering = False
        self._has_spoken = False
        self.idle_since_s = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether it only waits for a request."""
        return not self._is_lingering and (self.cycle is None or self.cycle.response_complete)

    def drop(self) -> None:
        self.transport.abort()

    # Incoming

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.idle_since_s = self.loop.time()
        self._enter()

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if self._is_lingering:
            if self._num_bytes > LINGER_BYTES:
                self.drop()
            return
        self._has_spoken = True
        super().data_received(data)
        self._enter()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for deadline in (self._deadline, self._send_deadline):
            if deadline is not None:
                deadline.cancel()

    def _enter(self) -> None:
        """Begin a phase, if it differs from the current one."""
        if self._is_lingering:
            return
        if self.transport.is_closing():
            phase: tuple[str, Any] = ("closing", None)
        elif self.is_idle:
            is_between = self.timeout_keep_alive_task is not None
            phase = ("between" if is_between else "header", self.cycle)
        else:
            phase = ("body" if self.cycle.more_body else "answer", self.cycle)
        if phase == self._phase:
            return
        self._phase, self._phase_s, self._num_bytes = phase, self.loop.time(), 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        timeouts_s = {"header": self._limits.header_s, "body": self._limits.body_s, "closing": self._limits.send_s}
        if phase[0] in timeouts_s:
            self._deadline = self.loop.call_later(timeouts_s[phase[0]], self._on_deadline)

    def _on_deadline(self) -> None:
        phase = self._phase[0]
        if phase == "closing" or (phase == "header" and not self._has_spoken):
            self.drop()
            return
        if phase == "body":
            timeout_s = self._limits.body_s + self._num_bytes / MIN_BODY_RATE
            left_s = self._phase_s + timeout_s - self.loop.time()
            if self.flow.read_paused:  # the server has paused reading
                left_s = self._limits.body_s
            if left_s > 0:
                self._deadline = self.loop.call_later(left_s, self._on_deadline)
                return
        what, flag = {"header": ("headers", "--header-timeout"), "body": ("body", "--body-timeout")}[phase]
        self._refuse(ApiError(408, f"the request's {what} did not come in time ({flag})", code="request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answer by itself and close, if no answer has begun."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = json.dumps(error.body).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(content)).encode()),
                (b"x-request-id", uuid4().hex.encode()),
                CLOSE,
            ]
            events = (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=content),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self._linger()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP; uvicorn calls this."""
        self._refuse(ApiError(400, "the request is not valid HTTP/1.1", code="invalid_http"))

    # Outgoing

    def _saying_that_it_closes(self, app: Any) -> ASGIApp:
        """Return an application whose answers say that the connection closes, if a request's body has not come."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            cycle = self.cycle

            async def send_told(message: Message) -> None:
                if message["type"] == "http.response.start" and cycle.more_body:
                    cycle.transport = cast("asyncio.Transport", _Closing(self.transport, self._linger))
                    message = {**message, "headers": [*message.get("headers", ()), CLOSE]}
                await send(message)

            await app(scope, receive, send_told)

        return answer

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.idle_since_s = self.loop.time()
        if self.cycle.response_complete and self.cycle.more_body:  # answered before its body had come: it is not read
            self._linger()
        else:
            self._enter()

    def _linger(self) -> None:
        """Close after the client has had time to read the answer: closing with unread data would discard it."""
        self._is_lingering = True
        self._num_bytes = 0
        self._unset_keepalive_if_required()
        if self._deadline is not None:
            self._deadline.cancel()
        if self.transport.is_closing():
            self._deadline = self.loop.call_later(self._limits.send_s, self.drop)
            return
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            with suppress(OSError):  # the client has gone already
                self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER_S, self.drop)

    def eof_received(self) -> None:
        """Return None: asyncio closes the connection when the client writes no more."""

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._enter()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_deadline = self.loop.call_later(self._limits.send_s, self.drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None
