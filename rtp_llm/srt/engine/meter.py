"""Statistics of the core: for metrics, and for the status line in the log."""

import logging
import time

from rtp_llm.srt.engine.grammars import Grammars
from rtp_llm.srt.engine.rank_meter import RankMeter
from rtp_llm.srt.messages import CoreStats
from rtp_llm.srt.scheduler.parts import PartedScheduler
from rtp_llm.srt.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0


class Meter:
    """Measures a scheduler. Rates count from the report before; a pause without work does not lower them."""

    def __init__(
        self,
        scheduler: Scheduler | PartedScheduler,
        grammars: Grammars,
        max_total_tokens: int,
        log_interval: int,
        ranks: RankMeter | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._grammars = grammars
        self._max_total_tokens = max_total_tokens
        self._log_interval = log_interval
        self._ranks = ranks
        self._steps = 0
        self._was_idle = True
        self._reported = self._logged = CoreStats(max_total_tokens=max_total_tokens)
        self._reported_at = self._logged_at = time.monotonic()

    def step(self) -> CoreStats | None:
        """Return a report if one is due: every second, and when the work is done. Call it after every loop turn."""
        now = time.monotonic()
        idle = self._scheduler.idle
        if self._ranks is not None:
            self._ranks.note(now, idle)
        if self._was_idle and not idle:
            self._reported_at = self._logged_at = now
        if not idle:
            self._count_step(now)
        due = (idle and not self._was_idle) or (not idle and now - self._reported_at >= REPORT_INTERVAL_S)
        self._was_idle = idle
        return self.report() if due else None

    def report(self) -> CoreStats:
        now = time.monotonic()
        self._reported, self._reported_at = self._stats(self._reported, now - self._reported_at), now
        if self._ranks is not None:
            self._ranks.report(self._reported)
        return self._reported

    def _count_step(self, now: float) -> None:
        self._steps += 1
        if self._steps % self._log_interval:
            return
        stats = self._stats(self._logged, now - self._logged_at)
        self._logged, self._logged_at = stats, now
        logger.info(
            "running %d, waiting %d, %.1f tokens/s, cache %.0f %% used, prefix hits %.0f %%",
            stats.num_running,
            stats.num_waiting,
            stats.gen_throughput,
            100 * stats.token_usage,
            100 * stats.cache_hit_rate,
        )

    def _stats(self, before: CoreStats, elapsed_s: float) -> CoreStats:
        totals = self._scheduler.stats
        memories = self._scheduler.memories  # of equal sizes
        usage = sum(memory.usage() for memory in memories) / len(memories)
        num_free, num_evictable = self._max_total_tokens, 0
        if memories[0].groups:
            num_free = sum(memory.free_tokens(0) for memory in memories)
            num_evictable = sum(memory.evictable_tokens(0) for memory in memories)
        prompt_tokens = totals.prompt_tokens - before.prompt_tokens
        cached_tokens = totals.cached_tokens - before.cached_tokens
        generated_tokens = totals.generated_tokens - before.generated_tokens
        return CoreStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_used_tokens=round(usage * self._max_total_tokens),
            max_total_tokens=self._max_total_tokens,
            num_held_tokens=max(0, self._max_total_tokens - num_free - num_evictable),
            num_evictable_tokens=num_evictable,
            num_free_tokens=num_free,
            evicted_tokens=sum(memory.evicted_tokens for memory in memories),
            recent_retractions=totals.retractions - before.retractions,
            token_usage=usage,
            cache_hit_rate=cached_tokens / prompt_tokens if prompt_tokens else before.cache_hit_rate,
            gen_throughput=generated_tokens / elapsed_s if elapsed_s > 0 else 0.0,
            prompt_tokens=totals.prompt_tokens,
            cached_tokens=totals.cached_tokens,
            generated_tokens=totals.generated_tokens,
            retractions=totals.retractions,
            state_usage=sum(memory.states.usage for memory in memories) / len(memories),
            num_grammar_queue=len(self._grammars),
        )
