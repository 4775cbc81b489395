"""The client side of several cores with the same model: one EngineClient for each, and which one a request goes to."""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from rtp_llm.srt.managers.engine_client import Deliver, EngineClient, EngineStopped, FlushResult
from rtp_llm.srt.managers.prefix_routes import PrefixRoutes, block_hashes
from rtp_llm.srt.messages import CoreInfo, CoreStats, GenerateRequest, TokenOutput


class ReplicaClient:
    """Thread-safe; the interface of EngineClient, whose guarantees hold for each core.

    A request stays with its core: if that dies, it goes on when the core is back. Others go where a core is ready.

    Args:
        clients: of the cores.
        num_tokens: that each core's cache has room for.
        is_ready: whether a core is there.
    """

    def __init__(
        self, clients: Sequence[EngineClient], num_tokens: Sequence[int], is_ready: Callable[[int], bool]
    ) -> None:
        self._clients = list(clients)
        self._routes = PrefixRoutes(num_tokens)
        self._is_ready = is_ready
        self._lock = threading.RLock()  # guards the routes and _watched; taken before a client's own
        self._watched: dict[str, _Watched] = {}  # by rid

    @property
    def num_live(self) -> int:
        return sum(client.num_live for client in self._clients)

    @property
    def num_live_tokens(self) -> int:
        return sum(client.num_live_tokens for client in self._clients)

    @property
    def stats(self) -> CoreStats:
        return joined_stats([client.stats for client in self._clients])

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        """Send ``request``; ``deliver`` gets its outputs. Raise as ``submit_all`` does."""
        self.submit_all([(request, deliver)])

    def submit_all(self, entries: Sequence[tuple[GenerateRequest, Deliver]]) -> None:
        """Send all of the requests, or none: after an error none of them is live.

        Raises:
            EngineStopped, InvalidRequest: as EngineClient.submit_all.
        """
        with self._lock:
            before = {request.rid: self._watched.get(request.rid) for request, _ in entries}
            groups: defaultdict[int, list[_Watched]] = defaultdict(list)
            for request, deliver in entries:
                watched = self._route(request, deliver)
                groups[watched.core].append(watched)
            sent: list[_Watched] = []
            try:
                for core, group in groups.items():
                    self._clients[core].submit_all([(watched.request, watched) for watched in group])
                    sent += group
            except BaseException:
                self._take_back(sent, [watched for group in groups.values() for watched in group], before)
                raise

    def _route(self, request: GenerateRequest, deliver: Deliver) -> "_Watched":
        """Choose the core of a request: that of an earlier one with its rid, which may not have ended there."""
        hashes = block_hashes([*request.prompt_ids, *request.output_ids], request.spec)
        earlier = self._watched.get(request.rid)
        if earlier is not None:
            core = earlier.core
        else:
            every = range(len(self._clients))
            core = self._routes.choose(hashes, [core for core in every if self._is_ready(core)] or every)
        self._routes.note(core, hashes)
        self._routes.num_requests[core] += 1
        watched = self._watched[request.rid] = _Watched(self, core, request, deliver)
        return watched

    def _take_back(
        self, sent: Sequence["_Watched"], every: Sequence["_Watched"], before: "dict[str, _Watched | None]"
    ) -> None:
        """Undo a call that failed: end what was sent, unheard."""
        for watched in every:
            watched.is_heard = False
            self._end(watched)
        for watched in sent:
            self._clients[watched.core].abort(watched.request.rid)
        self._watched |= {rid: earlier for rid, earlier in before.items() if earlier is not None}

    def _end(self, watched: "_Watched") -> None:
        """Note the end of a request, once."""
        with self._lock:
            if watched.has_ended:
                return
            watched.has_ended = True
            self._routes.num_requests[watched.core] -= 1
            ids = [*watched.request.prompt_ids, *watched.request.output_ids, *watched.output_ids]
            self._routes.note(watched.core, block_hashes(ids, watched.request.spec))  # for the next turn
            if self._watched.get(watched.request.rid) is watched:
                del self._watched[watched.request.rid]

    def abort(self, rid: str | None) -> None:
        """End one request, or all if ``rid`` is None. Its end comes from its core."""
        with self._lock:
            watched = self._watched.get(rid) if rid is not None else None
        if rid is None:
            for client in self._clients:
                client.abort(None)
        elif watched is not None:
            self._clients[watched.core].abort(rid)

    def start_flush(self) -> Future[FlushResult]:
        """Ask all cores to empty their prefix caches. See FlushResult."""
        return joined_flushes([client.start_flush() for client in self._clients], self._flushed)

    def _flushed(self, core: int) -> None:
        with self._lock:
            self._routes.forget(core)

    def flush_cache(self) -> FlushResult:
        """Empty the prefix caches, and wait for the result."""
        return self.start_flush().result()

    def lost(self, core: int) -> None:
        """Note that a core died, and its cache with it."""
        self._flushed(core)

    def fail_all(self, cause: BaseException | None, message: str = "the engine core failed") -> None:
        """End every pending call, and refuse every later one, with EngineStopped. The first cause stays."""
        for client in self._clients:
            client.fail_all(cause, message)


class _Watched:
    """A request's ``deliver``, which tells the client of its end."""

    def __init__(self, client: ReplicaClient, core: int, request: GenerateRequest, deliver: Deliver) -> None:
        self.core = core
        self.request = request
        self.output_ids: list[int] = []
        self.is_heard = True
        self.has_ended = False
        self._client = client
        self._deliver = deliver

    def __call__(self, output: TokenOutput | EngineStopped) -> None:
        if isinstance(output, EngineStopped):
            self._client._end(self)
        else:
            self.output_ids += output.token_ids
            if output.finish_reason is not None:
                self._client._end(self)
        if self.is_heard:
            self._deliver(output)


def joined_flushes(futures: Sequence[Future[FlushResult]], flushed: Callable[[int], None]) -> Future[FlushResult]:
    """Return one result for those of all cores: a success if all are. ``flushed`` is told each that succeeded."""
    joined: Future[FlushResult] = Future()
    joined.set_running_or_notify_cancel()
    lock, left = threading.Lock(), [len(futures)]

    def take(core: int, future: Future[FlushResult]) -> None:
        if future.exception() is None and future.result():
            flushed(core)
        with lock:
            left[0] -= 1
            if left[0]:
                return
        error = next((each.exception() for each in futures if each.exception() is not None), None)
        if error is not None:
            joined.set_exception(error)
            return
        results = [each.result() for each in futures]
        texts = [f"core {place}: {result.message}" for place, result in enumerate(results) if not result.success]
        joined.set_result(FlushResult(not texts, "; ".join(texts)))

    for core, future in enumerate(futures):
        future.add_done_callback(partial(take, core))
    return joined


def joined_stats(stats: Sequence[CoreStats]) -> CoreStats:
    """Return the figures of several cores as of one: sums, and means of ratios."""
    num_used = sum(each.num_used_tokens for each in stats)
    room = sum(each.max_total_tokens for each in stats)
    experts = zip(*(each.expert_tokens for each in stats), strict=True) if all(e.expert_tokens for e in stats) else ()
    stages = zip(*(each.stage_usage for each in stats), strict=True) if all(e.stage_usage for e in stats) else ()
    return CoreStats(
        num_running=sum(each.num_running for each in stats),
        num_waiting=sum(each.num_waiting for each in stats),
        num_used_tokens=num_used,
        max_total_tokens=room,
        num_held_tokens=sum(each.num_held_tokens for each in stats),
        num_evictable_tokens=sum(each.num_evictable_tokens for each in stats),
        num_free_tokens=sum(each.num_free_tokens for each in stats),
        evicted_tokens=sum(each.evicted_tokens for each in stats),
        recent_retractions=sum(each.recent_retractions for each in stats),
        token_usage=num_used / room if room else 0.0,
        cache_hit_rate=sum(each.cache_hit_rate for each in stats) / len(stats),
        gen_throughput=sum(each.gen_throughput for each in stats),
        prompt_tokens=sum(each.prompt_tokens for each in stats),
        cached_tokens=sum(each.cached_tokens for each in stats),
        generated_tokens=sum(each.generated_tokens for each in stats),
        retractions=sum(each.retractions for each in stats),
        num_grammar_queue=sum(each.num_grammar_queue for each in stats),
        state_usage=sum(each.state_usage for each in stats) / len(stats),
        expert_tokens=[sum(of_expert) for of_expert in experts],
        expert_imbalance=max(each.expert_imbalance for each in stats),
        stage_usage=[sum(of_stage) / len(stats) for of_stage in stages],
    )


def joined_info(infos: Sequence[CoreInfo]) -> CoreInfo:
    """Return what several cores take together, as of one; what one request may take is the least of them."""
    first = infos[0]
    return CoreInfo(
        max_total_tokens=sum(info.max_total_tokens for info in infos),
        max_req_len=min(info.max_req_len for info in infos),
        max_running_requests=sum(info.max_running_requests for info in infos),
        chunked_prefill_size=first.chunked_prefill_size,
        weight_bytes=sum(info.weight_bytes for info in infos),
        cache_bytes=sum(info.cache_bytes for info in infos),
        device=f"{len(infos)} x {first.device}",
        state_bytes=first.state_bytes,
        outputs=first.outputs,
        free_bytes=first.free_bytes,
    )
