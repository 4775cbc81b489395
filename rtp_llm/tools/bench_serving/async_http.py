"""HTTP for load generation, on aiohttp: JSON requests, and event streams whose events are reported on arrival."""

import json
import re
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.http import HttpProcessingError

from rtp_llm.tools.bench_serving.errors import BrokenResponse, RequestFailed, error_message

KEPT_S = 4.0  # an idle connection; less than the 5 s after which uvicorn and others close it
MAX_SHOWN_CHARS = 300
LINE_END = re.compile(rb"\r\n|\r|\n")

OnEvent = Callable[[str, float], None]  # (an event's data, time.perf_counter() when its last byte was read)


class BadAddress(ValueError):
    """The text is not a server's address."""


class HttpClient:
    """Sends requests to one server, over any number of connections.

    Args:
        base_url: ``http://host:port`` or ``https://...``, perhaps with a path that all paths are appended to.
        api_key: sent as a bearer token.
        timeout_s: seconds until a request without a complete answer fails, connecting included.
        keep_connections: reuse connections. A server may close one just as a request is sent on it, if this process
            gets no CPU time for a while: do not reuse them if every request counts.

    Raises:
        BadAddress: ``base_url`` is not such an address.
    """

    def __init__(
        self, base_url: str, api_key: str | None = None, timeout_s: float = 3600.0, keep_connections: bool = True
    ) -> None:
        if not _is_address(base_url):
            raise BadAddress(f"the server's address must be like http://127.0.0.1:30000, not {base_url!r}")
        self.timeout_s = timeout_s
        self._base_url = base_url.rstrip("/")
        self._reuse: dict[str, Any] = {"keepalive_timeout": KEPT_S} if keep_connections else {"force_close": True}
        self._headers = {"User-Agent": "rtp-llm-bench", "Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def request_json(self, method: str, path: str, body: bytes | None = None) -> Any:
        """Return the JSON value of the server's answer. ``body``, if any, is JSON.

        Raises:
            RequestFailed: the status is not 200, the body is not JSON, or no answer came.
        """
        content = await self.request(method, path, body)
        try:
            return json.loads(content)
        except ValueError:
            raise BrokenResponse(f"{path} must answer with JSON, but sent {_shown(content)}") from None

    async def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Do the same as ``request_json`` for an answer of any type."""
        async with self._exchange(method, path, body) as response:
            return await response.read()

    async def stream(self, path: str, body: bytes, on_event: OnEvent) -> None:
        """Post ``body``, which is JSON, and call ``on_event`` for each server-sent event until the stream ends.

        What ``on_event`` raises ends the request and is raised here.

        Raises:
            RequestFailed: the status is not 200, or the answer is not a valid event stream.
        """
        decoder = SseDecoder()
        async with self._exchange("POST", path, body) as response:
            if (kind := response.content_type) != "text/event-stream":
                content = await response.read()
                raise BrokenResponse(f"expected an event stream, but the server sent {kind}: {_shown(content)}")
            async for part in response.content.iter_any():
                now = time.perf_counter()
                for data in decoder.feed(part):
                    on_event(data, now)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    @cached_property
    def _session(self) -> aiohttp.ClientSession:  # made late, as it belongs to the running event loop
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, **self._reuse),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
        )

    @asynccontextmanager
    async def _exchange(
        self, method: str, path: str, body: bytes | None = None
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        """Yield a response with status 200 and unread body; errors meanwhile become RequestFailed."""
        headers = {"Content-Type": "application/json"} if body is not None else None
        when = "before it answered"
        try:
            async with self._session.request(
                method, self._base_url + path, data=body, headers=headers, allow_redirects=False
            ) as response:
                when = "in the middle of its answer"
                if response.status != 200:
                    raise _status_error(response.status, await response.read())
                yield response
        except TimeoutError:  # first: some of aiohttp's are connection errors as well
            raise RequestFailed(f"no complete answer within {self.timeout_s:g} s") from None
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or error.os_error
            raise RequestFailed(f"cannot reach {error.host}:{error.port}: {reason}") from None
        except (aiohttp.ClientResponseError, HttpProcessingError) as error:
            reason = _shorten(" ".join(error.message.split()))
            raise BrokenResponse(f"expected an HTTP/1.1 response, but the server's is broken: {reason}") from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):
            raise RequestFailed(f"the server closed the connection {when}") from None


class SseDecoder:
    """Server-sent events (WHATWG HTML, section 9.2) from pieces of any size: returns the data of complete events.

    Comments and fields other than ``data`` are skipped, several data lines are joined by a line feed, and an
    incomplete event is dropped.
    """

    def __init__(self) -> None:
        self._line = b""  # the beginning of a line whose end has not come yet
        self._after_cr = False  # a line feed that comes next belongs to the line that is already ended
        self._at_start = True
        self._data: list[bytes] = []

    def feed(self, part: bytes) -> list[str]:
        """Return the data of each event that ``part`` completes. Raise BrokenResponse if one is not UTF-8."""
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


def _is_address(text: str) -> bool:
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:  # brackets or a port that cannot be
        return False
    complete = url.scheme in ("http", "https") and bool(url.hostname) and port != 0
    return complete and not (url.query or url.fragment or "@" in url.netloc)


def _status_error(status: int, content: bytes) -> RequestFailed:
    try:
        message = error_message(json.loads(content))
    except ValueError:
        message = content.decode(errors="replace")
    return RequestFailed(f"HTTP {status}: {_shorten(message)}")


def _shown(content: bytes) -> str:
    return repr(_shorten(content.decode(errors="replace")))


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."
