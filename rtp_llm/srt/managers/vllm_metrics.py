"""The server's metrics once more under vLLM's names, for dashboards and autoscalers that know those."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rtp_llm.srt.managers.detokenizer import Completion
from rtp_llm.srt.managers.metrics import LABEL, PREFIX

VLLM = "vllm:"
ENGINE = "engine"  # the label that vLLM adds: the data-parallel rank
# Names of ours -> vLLM's for the same figure, without prefixes.
NAMES: dict[str, tuple[str, ...]] = {
    "num_running_reqs": ("num_requests_running",),
    "num_queue_reqs": ("num_requests_waiting",),
    "token_usage": ("kv_cache_usage_perc",),
    "num_retracted_requests": ("num_preemptions",),
    "prompt_tokens": ("prompt_tokens", "prefix_cache_queries"),
    "cached_tokens": ("prompt_tokens_cached", "prefix_cache_hits"),
    "generation_tokens": ("generation_tokens",),
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_latency_seconds": ("inter_token_latency_seconds",),
    "request_time_per_output_token_seconds": ("request_time_per_output_token_seconds",),
    "e2e_request_latency_seconds": ("e2e_request_latency_seconds",),
    "queue_time_seconds": ("request_queue_time_seconds",),
    "prompt_tokens_histogram": ("request_prompt_tokens",),
    "generation_tokens_histogram": ("request_generation_tokens",),
}


class VllmMetrics(Collector):
    """All metrics of a registry, and those of ``NAMES`` under vLLM's names, too. An Observer of a Frontend.

    Args:
        own: the registry with the server's metrics.
        model_name: the value of their label.
        block_size, num_blocks: of the cache, as ``cache_config_info`` tells.
    """

    def __init__(self, own: CollectorRegistry, model_name: str, block_size: int, num_blocks: int) -> None:
        self._own = own
        self._model_name = model_name
        self._cache = {"block_size": str(block_size), "num_gpu_blocks": str(num_blocks)}
        self._ends = Counter(
            f"{VLLM}request_success", "Requests that have ended.", [LABEL, ENGINE, "finished_reason"], registry=None
        )

    def collect(self) -> Iterator[Metric]:
        for family in self._own.collect():
            yield family
            for name in NAMES.get(family.name.removeprefix(PREFIX), ()):
                yield self._renamed(family, VLLM + name)
        yield from self._ends.collect()
        info = GaugeMetricFamily(f"{VLLM}cache_config_info", "The cache.", labels=[LABEL, ENGINE, *self._cache])
        info.add_metric([self._model_name, "0", *self._cache.values()], 1)
        yield info

    def _renamed(self, family: Metric, name: str) -> Metric:
        renamed = Metric(name, family.documentation, family.type)
        for sample in family.samples:
            suffix = sample.name.removeprefix(family.name)
            renamed.add_sample(name + suffix, {**sample.labels, ENGINE: "0"}, sample.value, sample.timestamp)
        return renamed

    def started(self, completion: Completion) -> None:
        pass

    def progressed(self, completion: Completion, num_new: int, elapsed_s: float, is_first: bool) -> None:
        pass

    def ended(self, completion: Completion, elapsed_s: float) -> None:
        reason = completion.finish_reason
        self._ends.labels(self._model_name, "0", "abort" if reason is None else reason.type).inc()
