"""The hostile clients of a soak, of many kinds."""

import asyncio
import contextlib
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from hostile_media import bombs, data_uri, forbidden_sources, png
from hostile_requests import Generator
from hostile_wire import NotHTTP, perform

HOSTILE_TIMEOUT_S = 60.0
SKIPPED_KINDS = ("good", "pipelined")  # good requests have clients of their own


class HostileClients:
    """All kinds at once, each again and again. ``statuses``: kind -> how often each status came ("none": no answer).

    Args:
        generator: of the fuzzer; its requests come as one of the kinds.
        scale: how many of each kind are there at once, relative to what stands in ``run``.
    """

    def __init__(self, address: tuple[str, int], generator: Generator, seed: int, scale: float) -> None:
        self._address = address
        self._generator = generator
        self._draw = random.Random(seed)
        self._scale = scale
        self._end_s = 0.0
        self.statuses: dict[str, Counter[str]] = {}
        self._bombs = list(bombs().values())
        self._sources = forbidden_sources(address[1])
        self._large_png = png(4000, 3000)  # 12 million pixels, which are decoded, in 50 KB

    async def run(self, end_s: float) -> None:
        """Until ``end_s`` (monotonic)."""
        self._end_s = end_s
        kinds: list[tuple[str, Callable[[], Coroutine[Any, Any, str]], int, float]] = [
            # name, what one client does, clients at once, mean seconds between two of a client's requests
            ("slow head", self._slow_head, 8, 1.0),
            ("slow body", self._slow_body, 8, 1.0),
            ("idle connection", self._idle, 16, 1.0),
            ("hang-up", self._hang_up, 2, 1.0),
            ("reader that stops", self._stopped_reader, 2, 5.0),
            ("bomb", self._bomb, 1, 2.0),
            ("large picture", self._large_picture, 1, 10.0),
            ("forbidden source", self._forbidden, 1, 4.0),
            ("giant body", self._giant, 1, 20.0),
            ("large body", self._large, 1, 15.0),
            ("fuzz", self._fuzz, 2, 1.0),
        ]
        tasks = [
            asyncio.create_task(self._again(name, act, mean_s))
            for name, act, count, mean_s in kinds
            for _ in range(max(1, round(count * self._scale)))
        ]
        tasks.append(asyncio.create_task(self._floods()))
        await asyncio.gather(*tasks)

    def _count(self, kind: str, status: str) -> None:
        self.statuses.setdefault(kind, Counter())[status] += 1

    async def _again(self, name: str, act: Callable[[], Coroutine[Any, Any, str]], mean_s: float) -> None:
        while (left_s := self._end_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, self._draw.expovariate(1 / mean_s)))
            try:
                self._count(name, await act())
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                self._count(name, "none")

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(*self._address, limit=1 << 16)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _slow_head(self) -> str:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Filler: " + b"a" * 200
        return await self._drip(b"", head)

    async def _slow_body(self) -> str:
        return await self._drip(_head("/v1/completions", 500), b'{"prompt": "' + b"a" * 400)

    async def _drip(self, at_once: bytes, rest: bytes) -> str:
        """A byte each second for as long as the server bears it, a minute at most."""
        async with self._connected() as (reader, writer):
            writer.write(at_once)
            answer = asyncio.create_task(_status(reader))
            for i in range(len(rest)):
                if answer.done() or i > HOSTILE_TIMEOUT_S or time.monotonic() > self._end_s:
                    break
                writer.write(rest[i : i + 1])
                await asyncio.wait((answer,), timeout=1.0)
            return await _result_or_cancel(answer, "kept waiting")

    async def _idle(self) -> str:
        async with self._connected() as (reader, _):
            wait_s = min(120.0, max(0.0, self._end_s - time.monotonic()))
            try:
                return await asyncio.wait_for(_status(reader), wait_s)
            except TimeoutError:
                return "kept waiting"

    async def _hang_up(self) -> str:
        """At any point: within the head or the body, before an answer, within a stream."""
        body = json.dumps({"prompt": "one two three", "max_tokens": 300, "ignore_eos": True, "stream": True}).encode()
        whole = _head("/v1/completions", len(body)) + body
        cut = self._draw.choice((self._draw.randrange(len(whole)), len(whole), len(whole)))
        async with self._connected() as (reader, writer):
            writer.write(whole[:cut])
            await writer.drain()
            if cut == len(whole):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.readexactly(self._draw.randrange(1, 20_000)), self._draw.random())
            if self._draw.random() < 0.5:
                connection: socket.socket = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return "left"

    async def _stopped_reader(self) -> str:
        """Asks for a long stream and reads nothing of it for half a minute."""
        options = {"return_logprob": True, "top_logprobs_num": 10, "stream": True}
        params = {"max_new_tokens": 400, "ignore_eos": True}
        body = json.dumps({"text": "one two", "sampling_params": params} | options).encode()
        async with self._connected() as (_, writer):
            writer.write(_head("/generate", len(body)) + body)
            await writer.drain()
            await asyncio.sleep(min(30.0, max(0.0, self._end_s - time.monotonic())))
        return "left"

    async def _bomb(self) -> str:
        kind = self._draw.choice(("image", "image", "video"))
        return await self._ask_about(kind, data_uri(self._draw.choice(self._bombs)), self._draw.choice((1, 1, 4)))

    async def _large_picture(self) -> str:
        return await self._ask_about("image", data_uri(self._large_png), 1)

    async def _forbidden(self) -> str:
        return await self._ask_about("image", self._draw.choice(self._sources), 1)

    async def _ask_about(self, kind: str, source: str, count: int) -> str:
        part = {"type": f"{kind}_url", f"{kind}_url": {"url": source}}
        body = {"messages": [{"role": "user", "content": [part] * count}], "max_tokens": 2}
        return await self._post("/v1/chat/completions", json.dumps(body).encode())

    async def _giant(self) -> str:
        """A body beyond every limit, as fast as it goes."""
        return await self._post("/v1/completions", b'{"prompt": "' + b"a" * (48 << 20) + b'"}')

    async def _large(self) -> str:
        """Bodies of megabytes, within the limit, that are hard to read or to use."""
        make = self._draw.choice(
            (
                lambda: json.dumps({"prompt": "the cat " * (1 << 19)}),
                lambda: json.dumps({"prompt": [7] * 1_000_000}),
                lambda: json.dumps({"messages": [{"role": "user", "content": "a"}] * 60_000}),
                lambda: '{"prompt": ' + "[" * 500_000 + "]" * 500_000 + "}",
                lambda: json.dumps({"prompt": ["a"] * 2000, "max_tokens": 1}),
                lambda: json.dumps({"logit_bias": {str(i): 1 for i in range(200_000)}, "prompt": "a"}),
            )
        )
        path = "/v1/chat/completions" if b"messages" in (body := make().encode())[:20] else "/v1/completions"
        return await self._post(path, body)

    async def _fuzz(self) -> str:
        """One of the fuzzer's requests, from a thread: its sockets block."""
        while True:
            case = self._generator.case(self._draw.randrange(1 << 40))
            if case.kind not in SKIPPED_KINDS and not case.may_abort:
                break
        try:
            outcome = await asyncio.to_thread(perform, self._address, case.plan, HOSTILE_TIMEOUT_S)
        except NotHTTP:
            return "no HTTP"
        return str(outcome.answers[0].status) if outcome.answers else "none"

    async def _floods(self) -> None:
        """Now and then more requests at once than may run and wait together; half of them leave before the answer."""
        while (left_s := self._end_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, 30.0 + 30.0 * self._draw.random()))
            if time.monotonic() < self._end_s:
                await asyncio.gather(*(self._flood_one(i) for i in range(round(150 * self._scale))))

    async def _flood_one(self, number: int) -> None:
        body = {"prompt": f"flood {number}", "max_tokens": 32, "ignore_eos": True}
        patience_s = HOSTILE_TIMEOUT_S if number % 2 else 0.5
        try:
            status = await asyncio.wait_for(self._post("/v1/completions", json.dumps(body).encode()), patience_s)
        except TimeoutError:
            status = "left"
        except (OSError, asyncio.IncompleteReadError):
            status = "none"
        self._count("flood", status)

    async def _post(self, path: str, body: bytes) -> str:
        """The answer's status, "none" if the connection ends without one."""
        async with self._connected() as (reader, writer):
            answer = asyncio.create_task(_status(reader))
            writer.write(_head(path, len(body)) + body)
            sending = asyncio.create_task(writer.drain())
            try:
                await asyncio.wait((answer, sending), timeout=HOSTILE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait((answer,), timeout=HOSTILE_TIMEOUT_S)
                return await _result_or_cancel(answer, "no answer in time")
            finally:
                sending.cancel()
                await asyncio.gather(sending, answer, return_exceptions=True)


def _head(path: str, size: int) -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {size}",
        "Connection: close",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


async def _status(reader: asyncio.StreamReader) -> str:
    """Read the status from the answer's first line. Raises OSError if the connection ends before."""
    line = await reader.readline()
    if not line:
        return "closed"
    parts = line.split()
    if len(parts) < 2 or not line.startswith(b"HTTP/1."):
        return "no HTTP"
    while await reader.read(1 << 16):
        pass
    return parts[1].decode()


async def _result_or_cancel(task: "asyncio.Task[str]", otherwise: str) -> str:
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return otherwise
