"""The client side of the link: keeps every live request, and delivers the core's outputs to it."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol
from uuid import uuid4

from rtp_llm.srt.messages import (
    AbortRequest,
    CoreStats,
    FinishReason,
    FlushCache,
    FlushCacheDone,
    FromCore,
    GenerateRequest,
    TokenOutput,
)
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.srt.utils.ipc import ClientEnd, MessageError

logger = logging.getLogger(__name__)


class EngineStopped(RuntimeError):
    """The core has stopped. ``__cause__`` is the exception that stopped it, if one did."""


class FlushResult(NamedTuple):
    """Whether the prefix cache is empty now, and if not, why. Its truth value is ``success``."""

    success: bool
    message: str

    def __bool__(self) -> bool:
        return self.success


ABORTED = FinishReason("abort", message="the request was aborted", status_code=499)
KILLER = FinishReason(
    "abort", message="the engine core died twice while it was computing this request", status_code=500
)

Deliver = Callable[[TokenOutput | EngineStopped], None]
Ended = tuple["LiveRequest", TokenOutput]


@dataclass(slots=True)
class LiveRequest:
    """A request that the core has not ended, with its outputs so far: all that a resubmission needs."""

    request: GenerateRequest
    deliver: Deliver
    output_ids: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    cached_tokens: int | None = None  # the first core's count: a restarted core's is not reported
    queue_time_s: float = 0.0  # likewise
    num_retractions: int = 0
    earlier_retractions: int = 0  # in cores that died
    deaths: int = 0  # of cores that were running it, since it last made progress
    aborted: bool = False
    # Aborted requests of the same rid whose end the core has not sent yet: until then it may read their media.
    predecessors: list["LiveRequest"] = field(default_factory=list)

    def take(self, output: TokenOutput) -> TokenOutput:
        """Note an output, and return it as a core that never died would have sent it."""
        self.output_ids += output.token_ids
        self.num_prompt_logprobs += len(output.prompt_logprobs)
        if self.cached_tokens is None:
            self.cached_tokens, self.queue_time_s = output.cached_tokens, output.queue_time_s
        self.num_retractions = self.earlier_retractions + output.num_retractions
        output.cached_tokens, output.queue_time_s = self.cached_tokens, self.queue_time_s
        output.num_retractions = self.num_retractions
        return output

    def resubmission(self) -> GenerateRequest:
        """Return a request for the remaining tokens: the prompt, then the outputs so far."""
        request = self.request
        self.earlier_retractions = self.num_retractions
        return replace(
            request,
            output_ids=request.output_ids + self.output_ids,
            num_prompt_logprobs=request.num_prompt_logprobs + self.num_prompt_logprobs,
        )


# A request that cores were running when they died, so many times without progress in between, is what killed them.
MAX_DEATHS = 2


class Client(Protocol):
    """What the API asks of the client side of a core, or of several: see EngineClient."""

    @property
    def num_live(self) -> int: ...
    @property
    def num_live_tokens(self) -> int: ...
    def submit(self, request: GenerateRequest, deliver: Deliver) -> None: ...
    def submit_all(self, entries: Sequence[tuple[GenerateRequest, Deliver]]) -> None: ...
    def abort(self, rid: str | None) -> None: ...
    def start_flush(self) -> Future[FlushResult]: ...
    def flush_cache(self) -> FlushResult: ...


class EngineClient:
    """Thread-safe. ``deliver`` callables run in the thread that receives from the core, and must be quick. One that
    raises ends its own request, and is logged.

    Every submitted request ends exactly once: by a TokenOutput with a finish reason, or by EngineStopped. Every live
    request has been sent, or will be sent to a core that is starting.

    A core may die and another take its place: ``detach`` and ``attach``. Requests wait meanwhile, and none is lost. One
    that the dead core was running may have killed it: the next core gets these suspects one after the other, each when
    the one before has made progress, and all others after them, so that a request that kills again is identified.
    """

    def __init__(self, link: ClientEnd | None = None) -> None:
        self.stats = CoreStats()  # the newest
        self._link: ClientEnd | None = None
        self._lock = threading.Lock()
        self._live: dict[str, LiveRequest] = {}
        self._flushes: dict[str, Future[FlushResult]] = {}
        self._probe: str | None = None  # the newest suspect sent, while it has made no progress
        self._unsent: deque[str] = deque()  # requests that wait for its progress, suspects first
        self._stopped: EngineStopped | None = None
        if link is not None:
            self.attach(link)

    def attach(self, link: ClientEnd) -> None:
        """Connect a ready core, which gets every live request."""
        with self._lock:
            self._link = link
            link.on_messages(self._receive)
            self._unsent = deque(sorted(self._live, key=lambda rid: not self._live[rid].deaths))
            self._probe = None
            ended = self._send_unsent()
        self._deliver_ends(ended)

    def detach(self, running: Set[str]) -> None:
        """Disconnect a core that died while it was running these requests. Its link must be closed."""
        with self._lock:
            self._link = None
            flushes, self._flushes = self._flushes, {}
            ended: list[Ended] = []
            for rid in list(self._live):
                entry = self._live[rid]
                entry.deaths += rid in running
                entry.predecessors = []
                if entry.aborted or entry.deaths >= MAX_DEATHS:
                    ended.append(_end(self._live.pop(rid), ABORTED if entry.aborted else KILLER))
        self._deliver_ends(ended)
        for future in flushes.values():
            future.set_result(FlushResult(False, "the engine core was restarted"))

    def _send_unsent(self) -> list[Ended]:
        """Send requests up to the next suspect, beside which no new request may run: it could be blamed wrongly.

        Return those that cannot be sent, which end; the others go on.
        """
        ended: list[Ended] = []
        while self._unsent and self._probe is None and self._link is not None:
            rid = self._unsent.popleft()
            entry = self._live[rid]
            try:
                self._link.send(entry.resubmission())
            except Exception as error:  # of any kind: the other requests must keep their core
                logger.exception("the request %r cannot be sent to the engine core", rid)
                status = 400 if isinstance(error, MessageError) else 500
                reason = FinishReason("abort", message=f"the request cannot be sent: {error}", status_code=status)
                ended.append(_end(self._live.pop(rid), reason))
                continue
            if entry.deaths:
                self._probe = rid
        return ended

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_live_tokens(self) -> int:
        """Tokens of the live requests, prompts and outputs so far, those of waiting ones included."""
        with self._lock:
            entries = list(self._live.values())
        return sum(len(e.request.prompt_ids) + len(e.request.output_ids) + len(e.output_ids) for e in entries)

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        """Send ``request``; ``deliver`` gets its outputs. Raise as ``submit_all`` does."""
        self.submit_all([(request, deliver)])

    def submit_all(self, entries: Sequence[tuple[GenerateRequest, Deliver]]) -> None:
        """Send all of the requests, or none: after an error none of them is live.

        Raises:
            EngineStopped: the core is gone.
            InvalidRequest: two of them, or one and a live request, have the same ``rid``, or one cannot be sent.
        """
        with self._lock:
            self._check_running()
            new = self._new_entries(entries)
            now, later = list(new.values()), []
            if self._link is None:
                now = []
            elif self._probe is not None:
                now = [entry for entry in now if entry.predecessors]  # whose end will come under the same rid
                later = [rid for rid, entry in new.items() if not entry.predecessors]
            if self._link is not None:
                try:
                    self._link.send_all([entry.request for entry in now])
                except MessageError as error:
                    raise InvalidRequest(f"the request cannot be sent to the engine core: {error}") from error
            replaced = [self._live[rid] for rid in new if rid in self._live]
            self._live |= new
            self._unsent.extend(later)
        self._deliver_ends([_end(entry, ABORTED) for entry in replaced])

    def _new_entries(self, entries: Sequence[tuple[GenerateRequest, Deliver]]) -> dict[str, LiveRequest]:
        new: dict[str, LiveRequest] = {}
        for request, deliver in entries:
            old = self._live.get(request.rid)
            if request.rid in new or (old is not None and not old.aborted):
                raise InvalidRequest(f"another running request has the rid {request.rid!r}; choose another", "rid")
            new[request.rid] = LiveRequest(request, deliver, predecessors=[*old.predecessors, old] if old else [])
        return new

    def abort(self, rid: str | None) -> None:
        """End one request, or all if ``rid`` is None. Its end comes from the core."""
        with self._lock:
            entries = list(self._live.values()) if rid is None else [self._live[rid]] if rid in self._live else []
            for entry in entries:
                entry.aborted = True
            unsent = [entry for entry in entries if self._link is None or entry.request.rid in self._unsent]
            for entry in unsent:
                del self._live[entry.request.rid]
            self._unsent = deque(rid for rid in self._unsent if rid in self._live)
            if self._link is not None and len(unsent) < len(entries):
                self._link.send(AbortRequest(rid))
        self._deliver_ends([_end(entry, ABORTED) for entry in unsent])

    def start_flush(self) -> Future[FlushResult]:
        """Ask the core to empty the prefix cache. See FlushResult."""
        future: Future[FlushResult] = Future()
        future.set_running_or_notify_cancel()  # a cancelled waiter must not make set_result() raise in the core
        call_id = uuid4().hex
        with self._lock:
            self._check_running()
            if self._link is None:
                future.set_result(FlushResult(False, "the engine core is being restarted"))
            else:
                self._link.send(FlushCache(call_id))
                self._flushes[call_id] = future
        return future

    def flush_cache(self) -> FlushResult:
        """Empty the prefix cache, and wait for the result."""
        return self.start_flush().result()

    def fail_all(self, cause: BaseException | None, message: str = "the engine core failed") -> None:
        """End every pending call, and refuse every later one, with EngineStopped. The first cause stays."""
        with self._lock:
            if self._stopped is None:
                self._stopped = _stopped(message, cause)
            live, self._live = self._live, {}
            self._unsent.clear()
            flushes, self._flushes = self._flushes, {}
        for entry in live.values():
            self._deliver_to(entry, _stopped(message, cause))
        for future in flushes.values():
            future.set_exception(_stopped(message, cause))

    def _check_running(self) -> None:
        if self._stopped is not None:
            raise EngineStopped(*self._stopped.args) from self._stopped.__cause__

    def _receive(self, messages: list[FromCore]) -> None:
        for message in messages:
            if isinstance(message, FlushCacheDone):
                self._finish_flush(message)
            elif isinstance(message, CoreStats):
                self.stats = message
            else:
                self._deliver(message)

    def _deliver(self, output: TokenOutput) -> None:
        with self._lock:
            ended: list[Ended] = []
            if output.rid == self._probe and (output.token_ids or output.finish_reason is not None):
                self._probe = None
                ended = self._send_unsent()
            entry = self._live.get(output.rid)  # None: ended here while the core's last outputs were on their way
            if entry is not None and entry.predecessors:  # in the order of submission, each with one end
                if output.finish_reason is not None:
                    entry.predecessors.pop(0)
                entry = None
            if entry is not None:
                output = entry.take(output)
                if output.finish_reason is not None:
                    del self._live[output.rid]
                if output.token_ids or output.finish_reason is not None:
                    entry.deaths = 0
        if entry is not None:
            self._deliver_to(entry, output)
        self._deliver_ends(ended)

    def _deliver_ends(self, ended: Sequence[Ended]) -> None:
        for entry, output in ended:
            self._deliver_to(entry, output)

    def _deliver_to(self, entry: LiveRequest, output: TokenOutput | EngineStopped) -> None:
        """Deliver an output to its request; if that raises, abort the request."""
        try:
            entry.deliver(output)
        except Exception:
            logger.exception("an output of the request %r could not be delivered; it is aborted", entry.request.rid)
            if self._live.get(entry.request.rid) is entry:
                self.abort(entry.request.rid)

    def _finish_flush(self, message: FlushCacheDone) -> None:
        with self._lock:
            future = self._flushes.pop(message.call_id, None)
        if future is not None:
            future.set_result(FlushResult(message.success, message.message))


def _end(entry: LiveRequest, reason: FinishReason) -> Ended:
    return entry, entry.take(TokenOutput(entry.request.rid, finish_reason=reason))


def _stopped(message: str, cause: BaseException | None) -> EngineStopped:
    """Return a new exception for each waiter: raising one object in several threads would mix their tracebacks."""
    error = EngineStopped(message if cause is None else f"{message}: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
