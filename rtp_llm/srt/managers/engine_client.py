"""Keeps every live request on the client side of the link, and gives each what the core says about it."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import uuid4

from rtp_llm.srt.messages import AbortRequest, FlushCache, FlushCacheDone, FromCore, GenerateRequest, TokenOutput
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.srt.utils.ipc import ClientEnd


class EngineStopped(RuntimeError):
    """The core has stopped. ``__cause__`` is the exception that stopped it, if one did."""


class FlushResult(NamedTuple):
    """Whether the prefix cache is empty now, and if not, why. As a condition it is its ``success``."""

    success: bool
    message: str

    def __bool__(self) -> bool:
        return self.success


Deliver = Callable[[TokenOutput | EngineStopped], None]


@dataclass(slots=True)
class LiveRequest:
    """A request that the core has not ended, with the ids that came back: all that a resubmission needs."""

    request: GenerateRequest
    deliver: Deliver
    output_ids: list[int] = field(default_factory=list)


class EngineClient:
    """Thread-safe. ``deliver`` callables run in the thread that receives from the core: quick, and never raising.

    Every submitted request ends exactly once: by a TokenOutput with a finish reason, or by EngineStopped.
    """

    def __init__(self, link: ClientEnd) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._live: dict[str, LiveRequest] = {}
        self._flushes: dict[str, Future[FlushResult]] = {}
        self._stopped: EngineStopped | None = None
        link.on_messages(self._receive)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        """Sends ``request``; ``deliver`` gets its outputs. Raises as ``submit_all`` does."""
        self.submit_all([(request, deliver)])

    def submit_all(self, entries: Sequence[tuple[GenerateRequest, Deliver]]) -> None:
        """Sends all of the requests, or none.

        Raises:
            EngineStopped: the core is gone.
            InvalidRequest: two of them, or one and a live request, have the same ``rid``.
        """
        with self._lock:
            self._check_running()
            new: dict[str, LiveRequest] = {}
            for request, deliver in entries:
                if request.rid in self._live or request.rid in new:
                    raise InvalidRequest(f"another running request has the rid {request.rid!r}; choose another", "rid")
                new[request.rid] = LiveRequest(request, deliver)
            self._live |= new
            for request, _ in entries:
                self._link.send(request)

    def abort(self, rid: str | None) -> None:
        """Ends one request, or all if ``rid`` is None. Whoever waits for it gets its end from the core."""
        with self._lock:
            if self._stopped is None and (rid in self._live if rid is not None else self._live):
                self._link.send(AbortRequest(rid))

    def start_flush(self) -> Future[FlushResult]:
        """Asks the core to empty the prefix cache. See FlushResult."""
        future: Future[FlushResult] = Future()
        future.set_running_or_notify_cancel()  # a waiter that gives up must not make set_result() raise in the core
        call_id = uuid4().hex
        with self._lock:
            self._check_running()
            self._flushes[call_id] = future
            self._link.send(FlushCache(call_id))
        return future

    def flush_cache(self) -> FlushResult:
        """Empties the prefix cache, and waits for it."""
        return self.start_flush().result()

    def fail_all(self, cause: BaseException | None, message: str = "the engine core failed") -> None:
        """Ends every pending call, and refuses every later one, with EngineStopped. The first cause stays."""
        with self._lock:
            if self._stopped is None:
                self._stopped = _stopped(message, cause)
            live, self._live = self._live, {}
            flushes, self._flushes = self._flushes, {}
        for entry in live.values():
            entry.deliver(_stopped(message, cause))
        for future in flushes.values():
            future.set_exception(_stopped(message, cause))

    def _check_running(self) -> None:
        if self._stopped is not None:
            raise EngineStopped(*self._stopped.args) from self._stopped.__cause__

    def _receive(self, messages: list[FromCore]) -> None:
        for message in messages:
            if isinstance(message, FlushCacheDone):
                self._finish_flush(message)
            else:
                self._deliver(message)

    def _deliver(self, output: TokenOutput) -> None:
        with self._lock:
            entry = self._live.get(output.rid)
            if entry is None:
                return  # ended here while the core's last words were under way
            entry.output_ids += output.token_ids
            if output.finish_reason is not None:
                del self._live[output.rid]
        entry.deliver(output)

    def _finish_flush(self, message: FlushCacheDone) -> None:
        with self._lock:
            future = self._flushes.pop(message.call_id, None)
        if future is not None:
            future.set_result(FlushResult(message.success, message.message))


def _stopped(message: str, cause: BaseException | None) -> EngineStopped:
    """A fresh exception for each waiter, since raising one object in several threads would mix their tracebacks."""
    error = EngineStopped(message if cause is None else f"{message}: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
