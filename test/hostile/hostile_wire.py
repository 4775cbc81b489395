"""HTTP as bytes: what is sent is said byte by byte, and what comes back is read without mercy.

No HTTP library would send half of this. A ``Plan`` is what one client does on one connection; ``perform`` does it.
"""

import contextlib
import json
import socket
import struct
import time
from dataclasses import dataclass, field

MAX_HEAD_BYTES = 1 << 20  # of an answer
MAX_BODY_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Send:
    data: bytes


@dataclass(frozen=True, slots=True)
class Pause:
    seconds: float


@dataclass(frozen=True, slots=True)
class ReadSome:
    """At most so many bytes of the answer, and then whatever comes next in the plan."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class HangUp:
    """``reset``: by a RST, as a client that is killed; else as one that closes."""

    reset: bool = False


@dataclass(frozen=True, slots=True)
class CloseWriting:
    """Says that no more is to come, and goes on reading."""


Step = Send | Pause | ReadSome | HangUp | CloseWriting


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps on one connection, and then as many answers as ``methods`` are read, in their order.

    Attributes:
        must_answer: what is sent are whole requests, so that a connection that closes without a word is a defect.
    """

    steps: tuple[Step, ...]
    methods: tuple[str, ...] = ("POST",)
    must_answer: bool = True

    @property
    def hangs_up(self) -> bool:
        return any(isinstance(step, HangUp) for step in self.steps)

    @property
    def sent(self) -> bytes:
        return b"".join(step.data for step in self.steps if isinstance(step, Send))


@dataclass(slots=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def is_json(self) -> bool:
        return (self.header("content-type") or "").partition(";")[0].strip() == "application/json"

    @property
    def is_stream(self) -> bool:
        return (self.header("content-type") or "").startswith("text/event-stream") or self.is_lines

    @property
    def is_lines(self) -> bool:
        """Whether it is a stream in Ollama's form."""
        return (self.header("content-type") or "") == "application/x-ndjson"


@dataclass(slots=True)
class Outcome:
    """What a plan led to. ``problem``: why there are fewer answers than asked for."""

    answers: list[Answer] = field(default_factory=list)
    problem: str | None = None
    timed_out: bool = False
    elapsed_s: float = 0.0


class NotHTTP(Exception):
    """What came back is no answer by the rules of RFC 9112."""


class Closed(Exception):
    """The server closed the connection, within an answer or before one."""


def request(
    method: str,
    target: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    content_type: str | None = "application/json",
) -> bytes:
    """A request as it should be, whose connection closes after its answer unless ``headers`` say otherwise."""
    fields = {"Host": "127.0.0.1", "Connection": "close"}
    if body is not None:
        fields |= {"Content-Length": str(len(body))} | ({"Content-Type": content_type} if content_type else {})
    lines = [f"{method} {target} HTTP/1.1", *(f"{k}: {v}" for k, v in (fields | (headers or {})).items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b"")


def json_request(method: str, target: str, body: object, headers: dict[str, str] | None = None) -> bytes:
    return request(method, target, json.dumps(body).encode(), headers)


def perform(address: tuple[str, int], plan: Plan, timeout_s: float) -> Outcome:
    """Does what the plan says, within the time, and returns what came of it. Raises NotHTTP."""
    outcome, start_s = Outcome(), time.monotonic()
    try:
        with socket.create_connection(address, timeout=timeout_s) as connection:
            _perform(connection, plan, outcome, start_s + timeout_s)
    except TimeoutError:
        outcome.problem, outcome.timed_out = f"no end after {timeout_s:g} s", True
    except (Closed, ConnectionError) as error:
        outcome.problem = f"{type(error).__name__}: {error}"
    outcome.elapsed_s = time.monotonic() - start_s
    return outcome


def _perform(connection: socket.socket, plan: Plan, outcome: Outcome, deadline_s: float) -> None:
    reader = _Reader(connection, deadline_s)
    for step in plan.steps:
        match step:
            case Send(data):
                _send(connection, data, deadline_s)
            case Pause(seconds):
                time.sleep(seconds)
            case ReadSome(num_bytes):
                reader.fill(num_bytes)
            case CloseWriting():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
            case HangUp(reset):
                if reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
    for method in plan.methods:
        answer = reader.answer(method)
        outcome.answers.append(answer)
        if (answer.header("connection") or "").lower() == "close":
            break


def _send(connection: socket.socket, data: bytes, deadline_s: float) -> None:
    """A server may refuse, and close, before all is sent: what it said can be read nevertheless."""
    connection.settimeout(max(0.01, deadline_s - time.monotonic()))
    with contextlib.suppress(ConnectionError):
        connection.sendall(data)


class _Reader:
    def __init__(self, connection: socket.socket, deadline_s: float) -> None:
        self._connection, self._deadline_s = connection, deadline_s
        self._buffer = bytearray()
        self._ended = False

    def fill(self, num_bytes: int) -> bool:
        """Whether so many bytes are there now; fewer only if the connection is closed."""
        while len(self._buffer) < num_bytes and not self._ended:
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._connection.settimeout(left_s)
            data = self._connection.recv(1 << 16)
            self._ended = not data
            self._buffer += data
        return len(self._buffer) >= num_bytes

    def answer(self, method: str) -> Answer:
        status, headers = self._head()
        while status < 200:  # 100 Continue
            status, headers = self._head()
        answer = Answer(status, headers, b"")
        if method != "HEAD" and status not in (204, 304):
            answer.body = self._body(answer)
        return answer

    def _head(self) -> tuple[int, list[tuple[str, str]]]:
        head = self._until(b"\r\n\r\n").decode("latin-1")
        first, *lines = head.split("\r\n")
        version, _, rest = first.partition(" ")
        if version not in ("HTTP/1.1", "HTTP/1.0") or not (rest[:3].isdecimal() and rest[3:4] in ("", " ")):
            raise NotHTTP(f"the answer begins {first[:80]!r}")
        headers = []
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise NotHTTP(f"a header line is {line[:80]!r}")
            headers.append((name.lower(), value.strip()))
        return int(rest[:3]), headers

    def _body(self, answer: Answer) -> bytes:
        if (answer.header("transfer-encoding") or "").lower() == "chunked":
            return self._chunks()
        length = answer.header("content-length")
        if length is None:
            return self._rest()
        if not length.isdecimal():
            raise NotHTTP(f"Content-Length is {length!r}")
        return self._exactly(int(length))

    def _chunks(self) -> bytes:
        body = bytearray()
        while True:
            size = int(self._until(b"\r\n").partition(b";")[0], 16)
            body += self._exactly(size)
            if self._exactly(2) != b"\r\n":
                raise NotHTTP("a chunk does not end where it should")
            if size == 0:
                return bytes(body)

    def _until(self, end: bytes) -> bytes:
        looked_at = 0
        while (at := self._buffer.find(end, looked_at)) < 0:
            looked_at = max(0, len(self._buffer) - len(end))
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise NotHTTP("the head of the answer has no end")
            if not self.fill(len(self._buffer) + 1):
                raise Closed(f"after {len(self._buffer)} bytes of an answer's head")
        data = bytes(self._buffer[:at])
        del self._buffer[: at + len(end)]
        return data

    def _exactly(self, size: int) -> bytes:
        if size > MAX_BODY_BYTES:
            raise NotHTTP(f"a part of the body is to have {size} bytes")
        if not self.fill(size):
            raise Closed(f"within an answer's body, after {len(self._buffer)} of {size} bytes")
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _rest(self) -> bytes:
        while self.fill(len(self._buffer) + 1):
            pass
        data = bytes(self._buffer)
        self._buffer.clear()
        return data
