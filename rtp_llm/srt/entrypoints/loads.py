"""How busy the server is, in the forms that routers read, and where it publishes events of its prefix cache."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from rtp_llm.srt.configs.kv_events import parse_kv_events_config
from rtp_llm.srt.engine.replicas import Replicas
from rtp_llm.srt.entrypoints.asgi import JSON
from rtp_llm.srt.entrypoints.errors import ApiError
from rtp_llm.srt.entrypoints.serving import Core, Serving
from rtp_llm.version import __version__

# Sections of SGLang's /v1/loads. A server has nothing to tell in the last three, which are then left out, as there.
SECTIONS = ("core", "memory", "queues", "spec", "lora", "disagg")
GIB = 2**30


class LoadEndpoints:
    """Counts of requests and tokens are of the moment; rates are the core's newest, at most a second old."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    @property
    def _cores(self) -> Sequence[Core]:
        """Each data-parallel rank's."""
        core = self._serving.core
        return core.supervisors if isinstance(core, Replicas) else [core]

    async def loads(self, include: str = "core", dp_rank: int | None = None) -> Response:
        """Return the load of each data-parallel rank, or of one, and of all of these together.

        ``include`` names sections, separated by commas: core, memory, queues, spec, lora, disagg, or all.
        """
        sections, cores = _sections(include), self._cores
        if dp_rank is not None and not 0 <= dp_rank < len(cores):
            raise ApiError(400, f"dp_rank must be from 0 to {len(cores) - 1}, got {dp_rank}", "dp_rank")
        ranks = range(len(cores)) if dp_rank is None else [dp_rank]
        told = [_load(rank, cores[rank]) for rank in ranks]
        aggregate = _aggregate(told)
        for load, rank in zip(told, ranks, strict=True):
            if "memory" in sections:
                load["memory"] = _memory(cores[rank])
            if "queues" in sections:
                load["queues"] = _queues(cores[rank])
        head = {"timestamp": datetime.now(UTC).isoformat(), "version": __version__, "dp_rank_count": len(cores)}
        return JSON({**head, "loads": told, "aggregate": aggregate})

    async def get_load(self) -> Response:
        """Return the load of each data-parallel rank, as older SGLang does."""
        names = {"num_reqs": "num_total_reqs", "num_waiting_reqs": "num_waiting_reqs", "num_tokens": "num_total_tokens"}
        loads = [_load(rank, core) for rank, core in enumerate(self._cores)]
        return JSON([{"dp_rank": load["dp_rank"]} | {old: load[new] for old, new in names.items()} for load in loads])

    async def server_load(self) -> Response:
        """Return the number of sequences that run or wait, as vLLM does."""
        return JSON({"server_load": self._serving.core.client.num_live})

    async def kv_event_sources(self) -> Response:
        """Return where each data-parallel rank publishes events of its prefix cache, as vLLM does; nothing if none
        does."""
        config = parse_kv_events_config(self._serving.args.kv_events_config)
        if config is None:
            return JSON({})
        told = {**asdict(config), "enable_kv_cache_events": True, "publisher": "zmq"}
        infos = [core.info for core in self._cores]
        return JSON(
            {
                str(rank): {**told, "endpoint": info.kv_event_endpoint, "replay_endpoint": info.kv_replay_endpoint}
                for rank, info in enumerate(infos)
            }
        )


def _load(rank: int, core: Core) -> dict[str, Any]:
    stats, info, client = core.stats, core.info, core.client
    num_live = client.num_live
    num_running = min(num_live - min(stats.num_waiting, num_live), info.max_running_requests)
    return {
        "dp_rank": rank,
        "num_running_reqs": num_running,
        "num_waiting_reqs": num_live - num_running,
        "num_total_reqs": num_live,
        "num_used_tokens": stats.num_used_tokens,
        "num_total_tokens": client.num_live_tokens,
        "max_total_num_tokens": info.max_total_tokens,
        "token_usage": stats.token_usage,
        "gen_throughput": stats.gen_throughput if num_live else 0.0,
        "cache_hit_rate": stats.cache_hit_rate,
        "utilization": max(num_running / info.max_running_requests, stats.token_usage),
        "max_running_requests": info.max_running_requests,
    }


def _aggregate(loads: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums of counts and the means of rates."""
    sums = {"total_running_reqs": "num_running_reqs", "total_waiting_reqs": "num_waiting_reqs"}
    sums |= {"total_reqs": "num_total_reqs", "total_tokens": "num_total_tokens"}
    means = {"avg_token_usage": "token_usage", "avg_throughput": "gen_throughput", "avg_utilization": "utilization"}
    totals = {name: sum(load[of] for load in loads) for name, of in sums.items()}
    return totals | {name: sum(load[of] for load in loads) / len(loads) for name, of in means.items()}


def _memory(core: Core) -> dict[str, Any]:
    info = core.info
    return {
        "weight_gb": info.weight_bytes / GIB,
        "kv_cache_gb": info.cache_bytes / GIB,
        "graph_gb": 0.0,
        "token_capacity": info.max_total_tokens,
    }


def _queues(core: Core) -> dict[str, int]:
    stats = core.stats
    return {
        "waiting": stats.num_waiting,
        "grammar": stats.num_grammar_queue,
        "paused": 0,
        "retracted": stats.recent_retractions,
    }


def _sections(include: str) -> set[str]:
    names = {name.strip() for name in include.split(",")}
    if "all" in names:
        return set(SECTIONS)
    unknown = sorted(names - set(SECTIONS))
    if unknown:
        raise ApiError(400, f"include has no section {unknown[0]!r}; have {', '.join(SECTIONS)}, all", "include")
    return names
