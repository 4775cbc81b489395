"""Requests with a grammar, until it is compiled: on a thread of its own, while the core's loop goes on."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from rtp_llm.srt.constrained.backend import GrammarBackend, GrammarError, Matcher
from rtp_llm.srt.constrained.thinking import ThinkingMatcher, ThinkingWatch
from rtp_llm.srt.messages import FinishReason, FromCore, GenerateRequest, TokenOutput
from rtp_llm.srt.request_spec import GrammarSpec

logger = logging.getLogger(__name__)

MAX_CACHED = 32  # compiled grammars that are kept; one that works hard takes some 20 MB
POLL_S = 0.005

Key = tuple[GrammarSpec, tuple[int, ...]]


@dataclass(slots=True)
class _Waiting:
    request: GenerateRequest
    compiled: Future[Matcher | None]  # None: it needs no grammar


class GrammarQueue:
    """Holds requests back until their grammars are compiled. Used by the core's thread alone.

    Args:
        make_backend: called once, on the compiling thread, when the first grammar comes.
        on_compile: called with the rid of a request whose grammar is about to be compiled.
        forces_tokens: see ThinkingMatcher.
    """

    def __init__(
        self,
        make_backend: Callable[[], GrammarBackend],
        on_compile: Callable[[str], None] | None = None,
        forces_tokens: bool = False,
    ) -> None:
        self._forces_tokens = forces_tokens
        self._make_backend = make_backend
        self._on_compile = on_compile
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rtp-llm-grammar")
        self._made: Future[GrammarBackend] | None = None
        self._compiled: OrderedDict[Key, Future[Matcher | None]] = OrderedDict()
        self._waiting: dict[str, _Waiting] = {}
        self.matchers: dict[str, Matcher] = {}  # of the requests that ``ready`` has returned; whoever uses one takes it

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def backend(self) -> GrammarBackend:
        """The back end that has compiled the matchers."""
        assert self._made is not None  # there are no matchers without
        return self._made.result()

    def enter(self, request: GenerateRequest) -> None:
        """Take a request that needs a matcher."""
        spec = request.spec
        if spec.grammar is None:
            made = self._backend()
            self._waiting[request.rid] = _Waiting(request, self._thread.submit(lambda: _nothing_of(made)))
            return
        end_ids = () if spec.params.ignore_eos else spec.eos_token_ids
        self._waiting[request.rid] = _Waiting(request, self._compilation(request.rid, (spec.grammar, end_ids)))

    def abort(self, rid: str | None) -> list[FromCore]:
        """Drop waiting requests, as AbortRequest says; return their ends."""
        rids = list(self._waiting) if rid is None else [rid] if rid in self._waiting else []
        for each in rids:
            del self._waiting[each]
        return [_ended(each, "the request was aborted", 499) for each in rids]

    def ready(self, may_wait: bool) -> tuple[list[GenerateRequest], list[FromCore]]:
        """Return requests whose grammars are compiled, in order of arrival, and the ends of those whose are wrong.

        Args:
            may_wait: wait a moment if none is ready, since there is nothing else to do.
        """
        if may_wait and self._waiting:
            wait([item.compiled for item in self._waiting.values()], POLL_S, return_when="FIRST_COMPLETED")
        requests: list[GenerateRequest] = []
        ends: list[FromCore] = []
        for rid, item in list(self._waiting.items()):
            if not item.compiled.done():
                continue
            del self._waiting[rid]
            error = item.compiled.exception()  # not raised again and again, which would lengthen its traceback
            if error is None:
                try:
                    self.matchers[rid] = self._resumed(item.compiled.result(), item.request)
                except Exception as found:  # the compiler's own fault costs this request alone
                    error = found
            if error is None:
                requests.append(item.request)
            else:
                ends.append(_failed(rid, error))
        return requests, ends

    def shutdown(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compilation(self, rid: str, key: Key) -> Future[Matcher | None]:
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key]
        if self._on_compile is not None:
            self._on_compile(rid)
        made = self._backend()
        self._compiled[key] = self._thread.submit(lambda: made.result().compile(*key))
        result = self._compiled[key]
        if len(self._compiled) > MAX_CACHED:
            self._compiled.popitem(last=False)  # requests that use it have matchers of their own, or its future
        return result

    def _backend(self) -> Future[GrammarBackend]:
        if self._made is None:
            self._made = self._thread.submit(self._make_backend)
        return self._made

    def _resumed(self, compiled: Matcher | None, request: GenerateRequest) -> Matcher:
        """Return a matcher of a request that may have generated tokens before, in a core that died."""
        inner = None if compiled is None else compiled.fork()
        matcher: Matcher | None = inner
        if request.spec.thinking is not None:
            watch = ThinkingWatch(request.spec.thinking, self.backend.token_bytes)
            matcher = ThinkingMatcher(watch, inner, self._forces_tokens)
        assert matcher is not None  # one of both is there
        for token_id in request.output_ids:
            if not matcher.accept(token_id):
                raise GrammarError(f"it does not allow the {len(request.output_ids)} tokens so far: {matcher.error}")
        return matcher


def _nothing_of(made: Future[GrammarBackend]) -> None:
    """Wait until the back end knows what tokens say, or raise what went wrong with it."""
    made.result().token_bytes(0)


def _failed(rid: str, error: BaseException) -> TokenOutput:
    if isinstance(error, GrammarError):
        return _ended(rid, f"the grammar cannot be used: {error}", 400)
    logger.error("the grammar of request %s was not compiled", rid, exc_info=error)
    return _ended(rid, f"the grammar was not compiled: {type(error).__name__}: {error}", 500)


def _ended(rid: str, message: str, status_code: int) -> TokenOutput:
    return TokenOutput(rid, finish_reason=FinishReason("abort", message=message, status_code=status_code))
