"""Metrics in Prometheus' format. Gauges are read from the core's newest stats when /metrics is requested."""

from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rtp_llm.srt.managers.detokenizer import Completion
from rtp_llm.srt.messages import CoreStats

PREFIX = "rtp_llm:"
LABEL = "model_name"
FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS_S = (0.001, 0.002, 0.004, 0.008, 0.015, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6, 5)
REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class RequestMetrics:
    """Counts requests and tokens, and times requests as their callers see them. An Observer of a Frontend.

    Args:
        registry: where the metrics are registered.
        model_name: the value of their one label.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def counter(name: str, help: str) -> Counter:
            return Counter(PREFIX + name, help, [LABEL], registry=registry).labels(model_name)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, help, [LABEL], buckets=buckets, registry=registry).labels(model_name)

        self._first_s: WeakKeyDictionary[Completion, float] = WeakKeyDictionary()  # seconds to the first token
        self._requests = counter("num_requests", "Requests that have ended, aborted ones included.")
        self._aborted = counter("num_aborted_requests", "Requests that were aborted or whose client hung up.")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of the requests that have ended.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._cached_tokens = counter("cached_tokens", "Prompt tokens that came from the prefix cache.")
        self._first_token = histogram("time_to_first_token_seconds", "From arrival to first token.", FIRST_TOKEN_S)
        self._between = histogram("inter_token_latency_seconds", "Between two tokens of a request.", BETWEEN_TOKENS_S)
        self._per_token = histogram(
            "request_time_per_output_token_seconds",
            "Per request, between two tokens on average.",
            BETWEEN_TOKENS_S,
        )
        self._queue = histogram("queue_time_seconds", "From arrival in the core to admission.", FIRST_TOKEN_S)
        self._request = histogram("e2e_request_latency_seconds", "From arrival to end.", REQUEST_S)
        self._prompt_len = histogram("prompt_tokens_histogram", "Prompt tokens per request.", TOKENS)
        self._output_len = histogram("generation_tokens_histogram", "Generated tokens per request.", TOKENS)

    def started(self, completion: Completion) -> None:
        pass

    def progressed(self, completion: Completion, num_new: int, elapsed_s: float, is_first: bool) -> None:
        self._generation_tokens.inc(num_new)
        if is_first:
            self._first_token.observe(elapsed_s)
            self._first_s[completion] = elapsed_s
            return
        for _ in range(num_new):
            self._between.observe(elapsed_s / num_new)

    def ended(self, completion: Completion, elapsed_s: float) -> None:
        reason = completion.finish_reason
        prompt_len = completion.prompt_tokens
        self._requests.inc()
        self._aborted.inc(reason is None or reason.type == "abort")
        self._prompt_tokens.inc(prompt_len)
        self._cached_tokens.inc(completion.cached_tokens)
        self._queue.observe(completion.queue_time_s)
        self._request.observe(elapsed_s)
        self._prompt_len.observe(prompt_len)
        num_new = len(completion.output_ids)
        self._output_len.observe(num_new)
        if num_new > 1:
            self._per_token.observe((elapsed_s - self._first_s.get(completion, 0.0)) / (num_new - 1))


class CoreMetrics(Collector):
    """The core's stats as gauges.

    Args:
        stats: returns the newest.
        constants: gauges that never change, by name.
        max_running_requests: how many requests the core runs at once.
    """

    def __init__(
        self,
        stats: Callable[[], CoreStats],
        model_name: str,
        constants: dict[str, float],
        max_running_requests: int,
    ) -> None:
        self._stats = stats
        self._max_running_requests = max_running_requests
        self._model_name = model_name
        self._constants = constants

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield self._gauge("num_running_reqs", "Requests that are being computed.", stats.num_running)
        yield self._gauge("num_queue_reqs", "Requests that wait.", stats.num_waiting)
        yield self._gauge("num_grammar_queue_reqs", "Requests whose grammars are compiled.", stats.num_grammar_queue)
        yield self._gauge("num_used_tokens", "Tokens in the cache that requests hold.", stats.num_used_tokens)
        yield self._gauge("kv_used_tokens", "Tokens in the cache that requests hold.", stats.num_held_tokens)
        yield self._gauge("kv_evictable_tokens", "Tokens that only the prefix cache holds.", stats.num_evictable_tokens)
        yield self._gauge("kv_available_tokens", "Tokens of the cache that are free.", stats.num_free_tokens)
        yield self._gauge("num_retracted_reqs", "Retractions since the report before.", stats.recent_retractions)
        yield self._gauge("utilization", "Used share of slots or cache, the larger one.", self._used(stats))
        yield self._gauge("max_total_num_tokens", "Tokens that the cache has room for.", stats.max_total_tokens)
        yield self._gauge("token_usage", "num_used_tokens / max_total_num_tokens.", stats.token_usage)
        yield self._gauge("mamba_usage", "Part of the slots for recurrent states in use.", stats.state_usage)
        yield self._gauge("cache_hit_rate", "Part of the newest prompts' tokens found cached.", stats.cache_hit_rate)
        yield self._gauge("gen_throughput", "Tokens generated per second.", stats.gen_throughput)
        for name, value in self._constants.items():
            yield self._gauge(name, "Set when the server starts.", value)
        yield self._counter("num_retracted_requests", "Retractions.", stats.retractions)
        yield self._counter("evicted_tokens", "Tokens evicted from the prefix cache.", stats.evicted_tokens)
        if stats.stage_usage:
            yield self._stages(stats.stage_usage)
        if stats.expert_tokens:
            yield self._experts(stats.expert_tokens)
            text = "Tokens of the busiest part of the experts over the mean, in the layer where that is largest."
            yield self._gauge("expert_imbalance", text, stats.expert_imbalance)

    def _used(self, stats: CoreStats) -> float:
        return max(stats.num_running / self._max_running_requests, stats.token_usage)

    def _stages(self, usage: list[float]) -> Metric:
        text = "Part of the time with requests in which each stage computed; the rest are bubbles."
        family = GaugeMetricFamily(PREFIX + "stage_usage", text, labels=[LABEL, "stage"])
        for stage, value in enumerate(usage):
            family.add_metric([self._model_name, str(stage)], value)
        return family

    def _experts(self, tokens: list[int]) -> Metric:
        text = "Tokens that each expert has computed, of all layers, where experts are divided over ranks."
        family = CounterMetricFamily(PREFIX + "expert_tokens", text, labels=[LABEL, "expert"])
        for expert, value in enumerate(tokens):
            family.add_metric([self._model_name, str(expert)], value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, help, labels=[LABEL])
        family.add_metric([self._model_name], value)
        return family

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, help, labels=[LABEL])
        family.add_metric([self._model_name], value)
        return family
