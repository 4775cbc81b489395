"""The good clients of a soak, whose answers are known."""

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import aiohttp

from benchmark.soak_workload import GoodRequest

GOOD_TIMEOUT_S = 180.0  # of one try
MAX_TRIES = 60
DEFAULT_RETRY_S = 5.0


@dataclass(slots=True)
class GoodCounts:
    sent: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: int = 0  # with 503, each time
    broken: int = 0  # by the killing of the HTTP process, each time
    streamed: int = 0
    with_image: int = 0
    over_a_death: int = 0  # right, though the core died meanwhile


class GoodClients:
    """Sends good requests, tries again when told to, and compares each answer with the known one.

    Attributes:
        may_break: the HTTP process is being killed: broken connections are tried again.
        num_deaths: of the core so far; whoever kills it counts.
    """

    def __init__(self, base_url: str) -> None:
        self._url = base_url
        self.known: dict[int, str] = {}
        self.counts = GoodCounts()
        self.num_live = 0
        self.may_break = False
        self.num_deaths = 0
        self._breaks = 0

    def begin_breaking(self) -> None:
        self.may_break, self._breaks = True, self._breaks + 1

    def end_breaking(self) -> None:
        self.may_break = False

    async def learn(self, requests: Sequence[GoodRequest]) -> None:
        """Asks each alone; what it gets is right from now on."""
        async with self._session() as session:
            for request in requests:
                status, text, _ = await self._try(session, request, stream=False)
                if status != 200 or text is None:
                    raise RuntimeError(f"good request {request.number} got {status}: {text}")
                self.known[request.number] = text

    async def run(self, requests: Sequence[GoodRequest], speed: float, end_s: float) -> None:
        """Replays the trace, over and over, until ``end_s`` (monotonic); returns when all are answered.

        The trace's last arrival is followed by its first after the mean time between two.
        """
        round_s = requests[-1].arrival_s * (1 + 1 / len(requests))
        start_s, tasks = time.monotonic(), set()
        async with self._session() as session:
            for count, request in _repeated(requests):
                at_s = start_s + (count * round_s + request.arrival_s) / speed
                if at_s >= end_s:
                    break
                await asyncio.sleep(max(0.0, at_s - time.monotonic()))
                task = asyncio.create_task(self._one(session, request, stream=(count + request.number) % 2 == 0))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)

    def _session(self) -> aiohttp.ClientSession:
        """Each request on a connection of its own: one that is kept may be closed just as it is used again."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=GOOD_TIMEOUT_S))

    async def _one(self, session: aiohttp.ClientSession, request: GoodRequest, stream: bool) -> None:
        self.counts.sent += 1
        self.counts.streamed += stream
        self.counts.with_image += request.has_image
        self.num_live += 1
        try:
            await self._until_answered(session, request, stream)
        finally:
            self.num_live -= 1

    async def _until_answered(self, session: aiohttp.ClientSession, request: GoodRequest, stream: bool) -> None:
        for _ in range(MAX_TRIES):
            deaths, breaks = self.num_deaths, self._breaks
            may_break = self.may_break
            try:
                status, text, retry_s = await self._try(session, request, stream)
            except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
                if not (may_break or self.may_break or breaks != self._breaks):
                    self._wrong(request, stream, f"broke off: {type(error).__name__}: {error}")
                    return
                self.counts.broken += 1
                await asyncio.sleep(1 + random.random())
                continue
            if status == 503:
                self.counts.refused += 1
                await asyncio.sleep(retry_s * (1 + random.random() / 2))
            elif status != 200 or text != self.known[request.number]:
                self._wrong(request, stream, f"got {status}, {text!r}, not {self.known[request.number]!r}")
                return
            else:
                self.counts.right += 1
                self.counts.over_a_death += deaths != self.num_deaths
                return
        self._wrong(request, stream, f"was refused {MAX_TRIES} times")

    def _wrong(self, request: GoodRequest, stream: bool, problem: str) -> None:
        self.counts.wrong.append(f"request {request.number} ({request.path}, stream={stream}) {problem}")

    async def _try(
        self, session: aiohttp.ClientSession, request: GoodRequest, stream: bool
    ) -> tuple[int, str | None, float]:
        """(status, text, seconds to wait before the next try). Raises ValueError for an answer that breaks off."""
        headers = {"Content-Type": "application/json"}
        async with session.post(self._url + request.path, data=request.content(stream), headers=headers) as response:
            content = await response.read()
            if response.status == 503:
                told = response.headers.get("Retry-After", "")
                if not told.isdecimal():
                    raise ValueError("a 503 without Retry-After")
                return 503, None, float(told)
            if response.status != 200:
                return response.status, content.decode(errors="replace")[:500], DEFAULT_RETRY_S
            return 200, text_of(request.path, content, stream), 0.0


def text_of(path: str, content: bytes, stream: bool) -> str:
    """An answer's text. Raises ValueError if it is not whole, or an error within a stream."""
    if stream:
        parts = content.decode().split("\n\n")
        if parts[-2:] != ["data: [DONE]", ""]:
            raise ValueError(f"a stream that ends {content[-200:]!r}")
        values = [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
        if errors := [value for value in values if "error" in value]:
            raise ValueError(f"an error within a stream: {errors[0]}")
    else:
        values = [json.loads(content)]
    if path == "/generate":
        return values[-1]["text"]
    pieces = []
    for choice in (choice for value in values for choice in value["choices"]):
        source = choice.get("message") or choice.get("delta") or choice
        pieces.append(source.get("content") or source.get("text") or "")
    return "".join(pieces)


def _repeated(requests: Sequence[GoodRequest]) -> Iterator[tuple[int, GoodRequest]]:
    count = 0
    while True:
        for request in requests:
            yield count, request
        count += 1
