"""The core: one loop that receives, plans, executes and commits."""

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rtp_llm.srt.configs.kv_events import parse_kv_events_config
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device.choice import choose_device, provider_named
from rtp_llm.srt.engine.capacity import Capacity, StateCapacity, auto_max_tokens, plan_capacity, plan_states
from rtp_llm.srt.engine.executor import Executor, StepHandle
from rtp_llm.srt.engine.executors import make_executor
from rtp_llm.srt.engine.grammars import Grammars
from rtp_llm.srt.engine.meter import Meter
from rtp_llm.srt.engine.rank_meter import RankMeter
from rtp_llm.srt.messages import CoreInfo, Ping, Shutdown
from rtp_llm.srt.plan import StepPlan
from rtp_llm.srt.scheduler.config import SchedulerConfig
from rtp_llm.srt.scheduler.parts import PartedScheduler
from rtp_llm.srt.scheduler.scheduler import Scheduler
from rtp_llm.srt.utils.ipc import CoreEnd
from rtp_llm.srt.worker.worker import LoadedModel, WorkerConfig

if TYPE_CHECKING:
    from rtp_llm.srt.engine.kv_events import KvEvents

logger = logging.getLogger(__name__)

DEFAULT_MAX_RUNNING_REQUESTS = 256
DEFAULT_CHECKPOINT_FRACTION = 0.2  # of the cache's memory, where there are pages as well
DEFAULT_DIST_TIMEOUT_S = 600.0


class EngineCore:
    """Executor and scheduler behind one end of a link. All methods run on the caller's thread."""

    def __init__(
        self,
        server_args: ServerArgs,
        model_config: ModelConfig,
        link: CoreEnd,
        on_progress: Callable[[int, int], None] | None = None,
        on_admission: Callable[[list[str]], None] | None = None,
        executor: Executor | None = None,
        on_loaded: Callable[[], None] | None = None,
        replica: int = 0,
        free_bytes: int | None = None,
    ) -> None:
        """Load the model and reserve the cache.

        Args:
            on_progress: called with (bytes loaded, bytes in all) while weights are read.
            on_admission: called with the rids of requests that the workers see for the first time in the next step.
            executor: used instead of the one that ``server_args`` asks for.
            on_loaded: called once the weights are loaded, before the cache takes memory.
            replica: place among the ``dp_size`` cores of a server.
            free_bytes: memory to plan weights and cache with; None: what is free now.
        """
        self._args = server_args
        self._link = link
        self._on_admission = on_admission
        self._in_flight: deque[StepHandle] = deque()
        self.device = choose_device(server_args.device)
        self._provider = provider_named(self.device)
        self._free_bytes = self._memory(replica) if free_bytes is None else free_bytes
        self.executor = executor or make_executor(
            WorkerConfig(server_args, model_config, self.device, isolates_rows=True, replica=replica),
            depth=self._depth(),
            dist_timeout_s=server_args.dist_timeout or DEFAULT_DIST_TIMEOUT_S,
        )
        self.grammars = Grammars(server_args, model_config, on_admission, skips_forced_tokens=self.executor.depth == 0)
        self._events: KvEvents | None = None
        try:
            loaded = self.executor.load(on_progress)
            if on_loaded is not None:
                on_loaded()
            self._make_cache(loaded, model_config, replica)
        except BaseException:
            if self._events is not None:
                self._events.shutdown()
            self.executor.shutdown()
            raise
        ranks = RankMeter(partial(self.executor.rpc, "stats"), server_args) if server_args.num_ranks > 1 else None
        log_interval = server_args.decode_log_interval
        self._meter = Meter(self.scheduler, self.grammars, self.max_total_tokens, log_interval, ranks)
        self._weight_bytes = loaded.weight_bytes
        self._state_bytes = 0 if loaded.layout.states is None else loaded.layout.states.bytes_per_slot
        self._log_start(loaded, model_config)

    def _make_cache(self, loaded: LoadedModel, model_config: ModelConfig, replica: int) -> None:
        """Divide the memory that the loaded model leaves, and make what plans with it."""
        self._cuts_prompts = not loaded.sees_whole_prompts
        self._outputs = loaded.outputs
        self.states, self.capacity = self._plan_memory(loaded, model_config)
        self._events = self._make_events(loaded, replica)
        self.scheduler = self._make_scheduler(loaded, model_config)
        self.executor.init_cache(
            list(self.capacity.num_pages),
            self.scheduler.config.max_running_requests,
            self.max_req_len,
            self.states.num_slots,
        )

    def _memory(self, replica: int) -> int:
        """Return the bytes that are free on this core's first device."""
        if self._args.dp_size > 1:
            num_ranks = self._args.num_ranks
            self._provider.prepare_rank(replica * num_ranks, self._args.dp_size * num_ranks)
        return self._provider.memory_bytes()[0]

    def _depth(self) -> int:
        """Steps in flight while another is planned: one where a device computes on its own, and with stages one less
        than these, so that each has a step."""
        if self._args.disable_overlap_schedule:
            return 0
        return max(int(self._provider.overlaps_steps), self._args.pp_size - 1)

    @property
    def info(self) -> CoreInfo:
        return CoreInfo(
            max_total_tokens=self.max_total_tokens,
            max_req_len=self.max_req_len,
            max_running_requests=self.max_running_requests,
            chunked_prefill_size=self.chunked_prefill_size,
            weight_bytes=self._weight_bytes,
            cache_bytes=self.cache_bytes,
            device=self.device,
            state_bytes=self._state_bytes,
            outputs=self._outputs,
            free_bytes=self._free_bytes,
            kv_event_endpoint=None if self._events is None else self._events.endpoint,
            kv_replay_endpoint=None if self._events is None else self._events.replay_endpoint,
        )

    @property
    def max_total_tokens(self) -> int:
        """Tokens that the cache holds, or those of all ranks with requests of their own."""
        return self.capacity.max_total_tokens * self._args.num_request_parts

    @property
    def max_req_len(self) -> int:
        """Tokens, prompt and output, of the longest request that can be served."""
        return self.capacity.max_req_len

    @property
    def chunked_prefill_size(self) -> int:
        """Prompt tokens in a step, at most; -1: prompts are not cut."""
        if not self._cuts_prompts:
            return -1
        return self._args.chunked_prefill_size or self._provider.chunked_prefill_size

    @property
    def max_running_requests(self) -> int:
        """Requests that may run at once: as many as are asked for, or as there is memory for their states."""
        return self.states.max_running_requests * self._args.num_request_parts

    @property
    def cache_bytes(self) -> int:
        """Memory of pages and states, per rank."""
        return self.capacity.cache_bytes + self.states.num_bytes

    def _plan_memory(self, loaded: LoadedModel, model_config: ModelConfig) -> tuple[StateCapacity, Capacity]:
        """Share what is left beside the weights among states and pages; a given number of tokens comes first."""
        fraction = self._args.mem_fraction_static or self._provider.mem_fraction_static
        ranks_sharing = self._args.num_ranks * self._args.dp_size if self._provider.ranks_share_memory else 1
        budget_bytes = max(0, int(self._free_bytes * fraction) // ranks_sharing - loaded.weight_bytes)
        wanted_running = self._args.max_running_requests or DEFAULT_MAX_RUNNING_REQUESTS
        wanted_running = -(-wanted_running // self._args.num_request_parts)
        context_length = self.context_length = _context_length(loaded, model_config)
        auto_tokens = auto_max_tokens(context_length, wanted_running)

        def pages(budget_bytes: int) -> Capacity:
            return plan_capacity(
                loaded.layout.groups,
                context_length,
                max(self.chunked_prefill_size, loaded.max_media_block) if self.chunked_prefill_size > 0 else None,
                budget_bytes,
                self._args.max_total_tokens,
                auto_tokens,
                self._args.swa_full_tokens_ratio,
            )

        given = self._args.max_total_tokens is not None
        states = plan_states(
            loaded.layout.states,
            wanted_running,
            budget_bytes - (pages(budget_bytes).cache_bytes if given else 0),
            self._args.max_total_tokens or auto_tokens,
            self._checkpoint_fraction(loaded),
            keeps_checkpoints=not (self._args.disable_radix_cache or loaded.sees_whole_prompts),
            beside_pages=bool(loaded.layout.groups) and not given,
        )
        return states, pages(budget_bytes - states.num_bytes)

    def _checkpoint_fraction(self, loaded: LoadedModel) -> float:
        given = self._args.state_cache_fraction
        return given if given is not None else DEFAULT_CHECKPOINT_FRACTION if loaded.layout.groups else 1.0

    def _make_scheduler(self, loaded: LoadedModel, model_config: ModelConfig) -> Scheduler | PartedScheduler:
        config = SchedulerConfig(
            max_req_len=self.max_req_len,
            max_running_requests=self.states.max_running_requests,
            chunked_prefill_size=self.chunked_prefill_size,
            max_prefill_tokens=self._prefill_tokens(loaded),
            schedule_policy=self._args.schedule_policy,
            disable_radix_cache=self._args.disable_radix_cache or loaded.sees_whole_prompts,
            state_checkpoint_interval=self._args.state_checkpoint_interval,
            max_media_block=loaded.max_media_block,
            outputs=loaded.outputs,
            share_prefixes=loaded.reads_shared_prefixes and not self._args.disable_prefix_sharing,
            num_stages=self._args.pp_size,
        )
        parts = [
            Scheduler(
                config,
                loaded.layout,
                self.capacity.num_pages,
                self.states.num_slots,
                self.grammars.matchers,
                None if self._events is None else self._events.watch,
                part * config.max_running_requests,
            )
            for part in range(self._args.num_request_parts)
        ]
        return parts[0] if len(parts) == 1 else PartedScheduler(parts)

    def _make_events(self, loaded: LoadedModel, replica: int) -> "KvEvents | None":
        config = parse_kv_events_config(self._args.kv_events_config)
        if config is None:
            return None
        if loaded.sees_whole_prompts:
            logger.warning("kv_events_config: this model's prompts are not cached, so there will be no events")
        # ZeroMQ is not needed by an engine that publishes nothing and has its core on a thread.
        from rtp_llm.srt.engine.kv_events import KvEvents

        return KvEvents(config, loaded.layout.groups, replica)

    def _prefill_tokens(self, loaded: LoadedModel) -> int:
        """Return how many prompt tokens a step computes at most; a longer whole prompt is computed alone."""
        most = self._provider.whole_prompt_tokens if loaded.sees_whole_prompts else None
        return min(self._args.max_prefill_tokens, most or self._args.max_prefill_tokens)

    def _log_start(self, loaded: LoadedModel, model_config: ModelConfig) -> None:
        num_ranks = self._args.num_ranks
        logger.info(
            "%s on %s, %s, %.2f GiB of weights, %.2f GiB of cache for %d tokens, longest request %d tokens",
            model_config.architectures[0],
            self.device if num_ranks == 1 else f"{num_ranks} x {self.device}",
            model_config.dtype,
            loaded.weight_bytes / 2**30,
            self.cache_bytes / 2**30,
            self.max_total_tokens,
            self.max_req_len,
        )
        if not self._cuts_prompts:
            logger.info("prompts are not cut and not cached: their tokens see those behind them")
        if self._state_bytes:
            logger.info(
                "states: %.2f MiB a request, beside %d bytes a token; %d requests run at once, %d checkpoints",
                self._state_bytes / 2**20,
                sum(group.bytes_per_page // group.page_size for group in loaded.layout.groups),
                self.max_running_requests,
                self.states.num_slots - self.max_running_requests,
            )

    def run(self) -> None:
        """Loop until a Shutdown message."""
        while self.step(block=True):
            pass

    def step(self, block: bool) -> bool:
        """Run one turn of the loop; return False after a Shutdown message. ``block``: wait while nothing is to do."""
        messages = self._link.drain(block=block and self.scheduler.idle and not len(self.grammars))
        if any(isinstance(message, Shutdown) for message in messages):
            return False
        if any(isinstance(message, Ping) for message in messages):
            self._link.send([self._meter.report()])
            messages = [message for message in messages if not isinstance(message, Ping)]
        messages, ends = self.grammars.pass_on(messages, may_wait=self.scheduler.idle)
        self._link.send([*ends, *self.scheduler.receive(messages)])
        plan = self.scheduler.plan()
        if plan is not None:
            self._submit(plan)
        while len(self._in_flight) > self.executor.depth:
            self._commit()
        if plan is None and self._in_flight:
            self._commit()  # after which there may be more to plan
        if self._events is not None:
            self._events.publish()
        stats = self._meter.step()
        if stats is not None:
            self._link.send([stats])
        return True

    def _submit(self, plan: StepPlan) -> None:
        if plan.admissions and self._on_admission is not None:
            self._on_admission([admission.rid for admission in plan.admissions])
        if not plan.masked_rows:
            self._in_flight.append(self.executor.submit(plan))
            return
        # What may come next depends on the tokens before: of a step in flight, they are known when it is committed.
        matchers = self.scheduler.matchers
        is_known = not self._in_flight or self._args.pp_size > 1  # stages never compute steps of one row at once
        masks = self.grammars.masks(plan.masked_rows, matchers) if is_known else None
        self._in_flight.append(self.executor.submit(plan))
        while masks is None and len(self._in_flight) > 1:
            self._commit()
        self.executor.sample((masks or self.grammars.masks(plan.masked_rows, matchers)).result())

    def _commit(self) -> None:
        self._link.send(self.scheduler.commit(self._in_flight.popleft().result()))

    def shutdown(self) -> None:
        """End the workers. Requests that still run get no answer."""
        self.grammars.shutdown()
        self._in_flight.clear()
        self.executor.shutdown()
        if self._events is not None:
            self._events.shutdown()


def _context_length(loaded: LoadedModel, model_config: ModelConfig) -> int:
    """Return the longest input of an encoder, whose configuration may count positions that no token has; else the
    configuration's, and the worker refuses more than the model takes."""
    if loaded.outputs.generates or loaded.max_positions is None:
        return model_config.context_length
    return min(model_config.context_length, loaded.max_positions)
