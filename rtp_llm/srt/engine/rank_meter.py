"""Statistics of several ranks: how even experts and stages are used."""

from collections.abc import Callable, Sequence

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.messages import CoreStats
from rtp_llm.srt.worker.worker import RankStats


class RankMeter:
    """Asks the ranks for their totals, once for each report.

    Args:
        stats: returns those of each rank.
    """

    def __init__(self, stats: Callable[[], list[RankStats]], args: ServerArgs) -> None:
        self._stats = stats
        self._num_parts = args.num_expert_parts
        self._has_request_parts = args.num_request_parts > 1
        self._num_stages, self._ranks_of_stage = args.pp_size, args.tp_size
        self._active_s = 0.0  # with requests
        self._active_since: float | None = None
        self._reported = [0.0] * args.pp_size  # busy seconds of stages
        self._reported_active_s = 0.0

    def note(self, now: float, idle: bool) -> None:
        """Note whether there are requests at this time, of time.monotonic()."""
        if self._active_since is not None:
            self._active_s += now - self._active_since
        self._active_since = None if idle else now

    def report(self, report: CoreStats) -> None:
        """Fill in what a report says of ranks."""
        if self._num_parts == 1 and self._num_stages == 1:
            return
        ranks = self._stats()
        loads = loads_of_layers(ranks, self._has_request_parts)
        report.expert_tokens = [sum(of_expert) for of_expert in zip(*loads, strict=True)]
        report.expert_imbalance = imbalance(loads, self._num_parts)
        if self._num_stages > 1:
            busy = [rank.busy_s for rank in ranks[:: self._ranks_of_stage]]
            active_s = self._active_s - self._reported_active_s
            pairs = zip(busy, self._reported, strict=True)
            report.stage_usage = [min(1.0, (now - before) / active_s) if active_s else 0.0 for now, before in pairs]
            self._reported, self._reported_active_s = busy, self._active_s


def loads_of_layers(ranks: Sequence[RankStats], of_own_requests: bool) -> list[list[int]]:
    """Return the tokens of each expert of each layer. ``of_own_requests``: each rank has counted its own tokens, of all
    layers; else a rank has counted all of its own layers, or none."""
    if not of_own_requests:
        return [load for rank in ranks for load in rank.expert_loads]
    layers = zip(*(rank.expert_loads for rank in ranks), strict=True)
    return [[sum(of_expert) for of_expert in zip(*of_ranks, strict=True)] for of_ranks in layers]


def imbalance(loads: Sequence[Sequence[int]], num_parts: int) -> float:
    """Return how many times the mean of the parts the busiest part has, in the layer where that is largest; 0 without
    tokens. ``loads``: tokens of each expert of each layer; a part has neighbouring experts."""
    worst = 0.0
    for of_expert in loads:
        size, total = len(of_expert) // num_parts, sum(of_expert)
        parts = [sum(of_expert[first : first + size]) for first in range(0, len(of_expert), size)]
        worst = max(worst, max(parts) * num_parts / total if total else 0.0)
    return worst
