"""A small HTTP/1.1 client for load generation: one JSON request, and an answer whose events are told as they arrive.

The client shares its machine with the server under test more often than not, so what it costs per event falsifies the
measurement. Everything here is done inside ``asyncio.Protocol.data_received``, without a task switch per event, and
the time of an event is that of its bytes' arrival. docs/benchmarking.md compares its cost with other clients'.
"""

import asyncio
import json
import re
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

MAX_HEAD_BYTES = 64 * 1024
MAX_SHOWN_CHARS = 300
LINE_END = re.compile(rb"\r\n|\r|\n")

OnEvent = Callable[[str, float], None]  # (an event's data, time.perf_counter() when its last byte arrived)
OnBody = Callable[[bytes, float], None]


class RequestFailed(Exception):
    """A request without a complete answer; the message says why."""


class BrokenResponse(RequestFailed):
    """What came is not the HTTP, or not the event stream, that it should be."""


class ConnectionLost(RequestFailed):
    """The server closed the connection in the middle, or (``unanswered``) before the first byte of an answer."""

    def __init__(self, unanswered: bool) -> None:
        when = "before it answered" if unanswered else "in the middle of its answer"
        super().__init__(f"the server closed the connection {when}")
        self.unanswered = unanswered


class HttpClient:
    """Requests to one server. Connections are kept and used again; there is no limit on their number.

    Args:
        base_url: ``http://host:port`` or ``https://...``, perhaps with a path that all paths are appended to.
        api_key: sent as a bearer token.
        timeout_s: seconds until a request without a complete answer fails, connecting included.

    Raises:
        ValueError: ``base_url`` is not such an address.
    """

    def __init__(self, base_url: str, api_key: str | None = None, timeout_s: float = 3600.0) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment or "@" in url.netloc:
            raise ValueError(f"the server's address must be like http://127.0.0.1:30000, not {base_url!r}")
        self.timeout_s = timeout_s
        self._host = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._prefix = url.path.rstrip("/")
        headers = [f"Host: {url.netloc}", "User-Agent: rtp-llm-bench", "Accept-Encoding: identity"]
        if api_key is not None:
            headers.append(f"Authorization: Bearer {api_key}")
        self._headers = "\r\n".join(headers)
        self._idle: list[Connection] = []

    async def request_json(self, method: str, path: str, body: bytes | None = None) -> Any:
        """The JSON value that the server answers with.

        Raises:
            RequestFailed: the status is not 200, the body is not JSON, or no answer came.
        """
        content = bytearray()
        parser = await self._exchange(method, path, body, lambda part, now: content.extend(part))
        if parser.status != 200:
            raise _status_error(parser.status, content)
        try:
            return json.loads(content)
        except ValueError:
            raise BrokenResponse(f"{path} must answer with JSON, but sent {_shown(content)}") from None

    async def request(self, method: str, path: str) -> None:
        """As ``request_json``, for an answer of which only the status matters."""
        content = bytearray()
        parser = await self._exchange(method, path, None, lambda part, now: content.extend(part))
        if parser.status != 200:
            raise _status_error(parser.status, content)

    async def stream(self, path: str, body: bytes, on_event: OnEvent) -> None:
        """Posts ``body`` and calls ``on_event`` for each server-sent event, in the event loop, until the stream ends.

        What ``on_event`` raises ends the request and is raised here.

        Raises:
            RequestFailed: another status than 200, something else than an event stream, or a broken one.
        """
        decoder = SseDecoder()
        other = bytearray()  # a body that is no event stream: usually an error in words
        parser = ResponseParser()

        def on_body(part: bytes, now: float) -> None:
            if parser.status == 200 and parser.content_type == "text/event-stream":
                for data in decoder.feed(part):
                    on_event(data, now)
            else:
                other.extend(part)

        await self._exchange("POST", path, body, on_body, parser)
        if parser.status != 200:
            raise _status_error(parser.status, other)
        if parser.content_type != "text/event-stream":
            raise BrokenResponse(f"expected an event stream, but the server sent {parser.content_type}: {_shown(other)}")

    def close(self) -> None:
        """Closes the connections that nobody uses."""
        while self._idle:
            self._idle.pop().abort()

    async def _exchange(
        self, method: str, path: str, body: bytes | None, on_body: OnBody, parser: "ResponseParser | None" = None
    ) -> "ResponseParser":
        parser = parser or ResponseParser()
        message = self._message(method, path, body)
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._send(message, parser, on_body)
        except TimeoutError:
            raise RequestFailed(f"no complete answer within {self.timeout_s:g} s") from None
        except OSError as error:
            raise RequestFailed(f"cannot reach {self._host}:{self._port}: {error.strerror or error}") from None
        return parser

    async def _send(self, message: bytes, parser: "ResponseParser", on_body: OnBody) -> None:
        """On a kept connection if there is one. The server may have closed that meanwhile: then on the next."""
        while True:
            kept = self._take_idle()
            connection = kept or await self._connect()
            try:
                await connection.exchange(message, parser, on_body)
            except ConnectionLost as error:
                if kept is None or not error.unanswered:
                    raise
            except BaseException:
                connection.abort()
                raise
            else:
                self._keep(connection, parser)
                return

    def _take_idle(self) -> "Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        return None

    def _keep(self, connection: "Connection", parser: "ResponseParser") -> None:
        if parser.keep_alive and not connection.closed:
            self._idle.append(connection)
        else:
            connection.abort()

    async def _connect(self) -> "Connection":
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        return connection

    def _message(self, method: str, path: str, body: bytes | None) -> bytes:
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}\r\n"
        if method == "POST":
            head += f"Content-Type: application/json\r\nContent-Length: {len(body or b'')}\r\n"
        return f"{head}\r\n".encode() + (body or b"")


class Connection(asyncio.Protocol):
    """One connection, which carries one exchange at a time."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._parser = ResponseParser()
        self._on_body: OnBody | None = None
        self._finished: asyncio.Future[None] | None = None

    async def exchange(self, message: bytes, parser: "ResponseParser", on_body: OnBody) -> None:
        """Sends a request and returns when the answer is complete; ``parser`` then knows its status.

        Raises:
            ConnectionLost: the server hung up. BrokenResponse: it does not talk HTTP. And what ``on_body`` raises.
        """
        if self._transport is None or self.closed:
            raise ConnectionLost(unanswered=True)
        self._parser, self._on_body = parser, on_body
        self._finished = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        try:
            await self._finished
        finally:
            self._on_body = self._finished = None

    def abort(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._on_body is None:  # nothing was asked: whatever this is, the connection is of no more use
            self.abort()
            return
        try:
            if body := self._parser.feed(data):
                self._on_body(body, now)
        except Exception as error:  # raised again in the task that waits
            self._finish(error)
        else:
            if self._parser.finished:
                self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._finished is not None and not self._finished.done():
            try:
                self._parser.end()
            except RequestFailed as error:
                self._finish(error)
            else:
                self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        if self._finished is None or self._finished.done():
            return
        if error is None:
            self._finished.set_result(None)
        else:
            self._finished.set_exception(error)


class ResponseParser:
    """Reads one HTTP/1.1 response (RFC 9112) from pieces of any size, and gives back its body's bytes.

    Knows bodies of a given length, chunked ones, and those that end with the connection; interim 1xx responses are
    skipped.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}  # names in lower case
        self.finished = False
        self._buffer = bytearray()
        self._remaining = 0  # bytes still to come of a body with a length, or of a chunk
        self._started = False
        self._version = b""
        self._advance: Callable[[list[bytes]], bool] = self._read_head

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "something without a type").partition(";")[0].strip().lower()

    @property
    def keep_alive(self) -> bool:
        """Whether another request may follow on the connection."""
        wish = self.headers.get("connection", "").lower()
        persistent = "close" not in wish and (self._version == b"HTTP/1.1" or "keep-alive" in wish)
        return self.finished and persistent and not self._buffer and self._advance != self._read_to_end

    def feed(self, data: bytes) -> bytes:
        """The body's bytes among ``data``. Raises BrokenResponse."""
        self._started = True
        self._buffer += data
        body: list[bytes] = []
        while not self.finished and self._advance(body):
            pass
        return b"".join(body)

    def end(self) -> None:
        """The connection is closed. Raises ConnectionLost unless that completes the response."""
        if self._advance == self._read_to_end:
            self.finished = True
        if not self.finished:
            raise ConnectionLost(unanswered=not self._started)

    def _read_head(self, body: list[bytes]) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise BrokenResponse(f"the response's head is longer than {MAX_HEAD_BYTES} bytes")
            return False
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        self._version, self.status = _status_line(lines[0])
        self.headers = dict(_header(line) for line in lines[1:])
        if self.status >= 200:
            self._start_body()
        return True

    def _start_body(self) -> None:
        if self.status in (204, 304):
            self.finished = True
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._advance = self._read_chunk_size
        elif "content-length" in self.headers:
            self._remaining = _number(self.headers["content-length"].encode(), 10, "content-length")
            self._advance = self._read_length
            self.finished = self._remaining == 0
        else:
            self._advance = self._read_to_end

    def _read_length(self, body: list[bytes]) -> bool:
        self._take(body)
        self.finished = self._remaining == 0
        return False

    def _read_to_end(self, body: list[bytes]) -> bool:
        body.append(bytes(self._buffer))
        self._buffer.clear()
        return False

    def _read_chunk_size(self, body: list[bytes]) -> bool:
        line = self._take_line()
        if line is None:
            return False
        self._remaining = _number(line.partition(b";")[0].strip(), 16, "chunk size")
        self._advance = self._read_chunk if self._remaining else self._read_trailer
        return True

    def _read_chunk(self, body: list[bytes]) -> bool:
        self._take(body)
        if self._remaining or len(self._buffer) < 2:
            return False
        if self._buffer[:2] != b"\r\n":
            raise BrokenResponse("a chunk of the response is longer than its announced size")
        del self._buffer[:2]
        self._advance = self._read_chunk_size
        return True

    def _read_trailer(self, body: list[bytes]) -> bool:
        line = self._take_line()
        self.finished = line == b""
        return line is not None

    def _take(self, body: list[bytes]) -> None:
        part = bytes(self._buffer[: self._remaining])
        if part:
            body.append(part)
        del self._buffer[: len(part)]
        self._remaining -= len(part)

    def _take_line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise BrokenResponse("the response has a chunk without a size")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line


class SseDecoder:
    """Server-sent events (WHATWG HTML, section 9.2) from pieces of any size: gives the data of complete events.

    Comments and fields other than ``data`` are skipped, several data lines are joined by a line feed, and an event
    that the stream breaks off is never given.
    """

    def __init__(self) -> None:
        self._line = b""  # the beginning of a line whose end has not come yet
        self._after_cr = False  # a line feed that comes next belongs to the line that is already ended
        self._at_start = True
        self._data: list[bytes] = []

    def feed(self, part: bytes) -> list[str]:
        """The data of each event that ``part`` completes. Raises BrokenResponse if one is not UTF-8."""
        if self._after_cr and part:
            part = part.removeprefix(b"\n")
            self._after_cr = False
        self._after_cr = self._after_cr or part.endswith(b"\r")
        lines = LINE_END.split(part)
        lines[0] = self._line + lines[0]
        self._line = lines.pop()
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take(self, line: bytes) -> str | None:
        if self._at_start:
            line, self._at_start = line.removeprefix(b"\xef\xbb\xbf"), False
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        if not self._data:
            return None
        data, self._data = b"\n".join(self._data), []
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise BrokenResponse(f"an event is not UTF-8: {_shown(data)}") from None


def error_message(value: Any) -> str:
    """What an error object of the OpenAI shape, or of another, says."""
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            return error_message(value[key])
    return value if isinstance(value, str) else json.dumps(value)


def _status_error(status: int, content: bytes | bytearray) -> RequestFailed:
    try:
        message = error_message(json.loads(content))
    except ValueError:
        message = content.decode(errors="replace")
    return RequestFailed(f"HTTP {status}: {_shorten(message)}")


def _status_line(line: bytes) -> tuple[bytes, int]:
    match = re.fullmatch(rb"(HTTP/1\.[01]) (\d{3})(?: .*)?", line)
    if match is None:
        raise BrokenResponse(f"expected an HTTP/1.1 response, but the server sent {_shown(line)}")
    return match[1], int(match[2])


def _header(line: bytes) -> tuple[str, str]:
    name, colon, value = line.decode("latin-1").partition(":")
    if not colon:
        raise BrokenResponse(f"the response has a header without a colon: {_shown(line)}")
    return name.strip().lower(), value.strip()


def _number(text: bytes, base: int, what: str) -> int:
    if not re.fullmatch(rb"[0-9]+" if base == 10 else rb"[0-9a-fA-F]+", text):
        raise BrokenResponse(f"the response's {what} is not a number: {_shown(text)}")
    return int(text, base)


def _shown(content: bytes | bytearray) -> str:
    return repr(_shorten(content.decode(errors="replace")))


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."
