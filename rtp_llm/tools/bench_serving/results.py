"""From observations of requests to the figures of a run: a dict, a line of JSON, a table."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from rtp_llm.tools.bench_serving.backends import Chunk

Figures = dict[str, Any]
TABLE_WIDTH = 78


@dataclass(slots=True)
class Observation:
    """The observation of one request. Times are seconds of ``time.perf_counter``."""

    prompt_len: int  # as requested
    output_len: int
    start_s: float = 0.0
    end_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # inter-token latencies
    prompt_tokens: int | None = None  # by the server's count
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    num_seen: int = 0  # tokens: by the server's count where an event has one, else one for each event
    texts: list[str] = field(default_factory=list)
    finished: bool = False
    error: str | None = None

    def add(self, chunk: Chunk, now_s: float) -> None:
        """Add an event that arrived at ``now_s``."""
        if chunk.has_tokens:
            known = self.num_seen + 1 if chunk.completion_tokens is None else chunk.completion_tokens
            if known > self.num_seen:
                self._add_tokens(known - self.num_seen, now_s)
        if chunk.completion_tokens is not None:
            self.completion_tokens = chunk.completion_tokens
        if chunk.prompt_tokens is not None:
            self.prompt_tokens = chunk.prompt_tokens
        if chunk.cached_tokens is not None:
            self.cached_tokens = chunk.cached_tokens
        if chunk.cumulative:
            self.texts = [chunk.text]
        elif chunk.text:
            self.texts.append(chunk.text)
        self.finished = self.finished or chunk.finished

    def _add_tokens(self, num_new: int, now_s: float) -> None:
        """Add tokens; those that come together share the time since the ones before."""
        if self.first_token_s is None:
            self.first_token_s = now_s
        else:
            self.gaps_s += [(now_s - self.last_token_s) / num_new] * num_new
        self.last_token_s = now_s
        self.num_seen += num_new

    @property
    def input_tokens(self) -> int:
        return self.prompt_len if self.prompt_tokens is None else self.prompt_tokens

    @property
    def output_tokens(self) -> int:
        return self.num_seen if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token; None if there was none."""
        return None if self.first_token_s is None else self.first_token_s - self.start_s

    @property
    def e2e_s(self) -> float:
        """Time to the last token, or, without tokens, to the end of the answer."""
        return (self.end_s if self.first_token_s is None else self.last_token_s) - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None if there are fewer than two."""
        if self.first_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)


def figures(observations: Sequence[Observation], duration_s: float, client_cpu_s: float, ignore_eos: bool) -> Figures:
    """Return the figures of a run of ``duration_s`` seconds, of completed requests only unless the name says otherwise.

    Times per request end in ``_ms``, throughputs are per second. Unknown figures are None.
    """
    done = [item for item in observations if item.error is None]
    input_tokens = sum(item.input_tokens for item in done)
    output_tokens = sum(item.output_tokens for item in done)
    return {
        "completed": len(done),
        "failed": len(observations) - len(done),
        "errors": dict(Counter(item.error for item in observations if item.error is not None).most_common()),
        "ended_early": sum(ignore_eos and item.output_tokens < item.output_len for item in done),
        "duration": duration_s,
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "requests_without_usage": sum(item.completion_tokens is None for item in done),
        **_cache_figures(done),
        "request_throughput": len(done) / duration_s,
        "input_throughput": input_tokens / duration_s,
        "output_throughput": output_tokens / duration_s,
        "total_throughput": (input_tokens + output_tokens) / duration_s,
        "concurrency": sum(item.e2e_s for item in done) / duration_s,
        "client_cpu_share": client_cpu_s / duration_s,
        **_spread("ttft", [item.ttft_s for item in done if item.ttft_s is not None]),
        **_spread("tpot", [item.tpot_s for item in done if item.tpot_s is not None]),
        **_spread("itl", [gap for item in done for gap in item.gaps_s]),
        **_spread("e2e_latency", [item.e2e_s for item in done]),
    }


def details(observations: Sequence[Observation]) -> Figures:
    """Return values of every request, in order of arrival; times in seconds."""
    return {
        "input_lens": [item.input_tokens for item in observations],
        "output_lens": [item.output_tokens for item in observations],
        "cached_lens": [item.cached_tokens for item in observations],
        "start_times": [item.start_s - observations[0].start_s for item in observations],
        "ttfts": [item.ttft_s for item in observations],
        "itls": [item.gaps_s for item in observations],
        "e2e_latencies": [item.e2e_s for item in observations],
        "generated_texts": ["".join(item.texts) for item in observations],
        "request_errors": [item.error for item in observations],
    }


def table(title: str, what: str, result: Figures) -> str:
    """Return the figures as a table at most 80 columns wide."""
    lines = [f" {title} ".center(TABLE_WIDTH, "="), what]
    lines += [
        _pair("Completed", f"{result['completed']}", "Requests/s", f"{result['request_throughput']:.2f}"),
        _pair("Failed", f"{result['failed']}", "Input tokens/s", f"{result['input_throughput']:.1f}"),
        _pair("Duration (s)", f"{result['duration']:.2f}", "Output tokens/s", f"{result['output_throughput']:.1f}"),
        _pair("Input tokens", f"{result['total_input_tokens']}", "All tokens/s", f"{result['total_throughput']:.1f}"),
        _pair("Output tokens", f"{result['total_output_tokens']}", "Concurrency", f"{result['concurrency']:.2f}"),
        _pair("Cached tokens", _cached(result), "Client CPU", f"{result['client_cpu_share']:.0%} of a core"),
        "-" * TABLE_WIDTH,
        f"{'':<30}" + "".join(f"{name:>12}" for name in ("mean", "median", "p90", "p99")),
        _times("Time to first token (ms)", "ttft", result),
        _times("Time per output token (ms)", "tpot", result),
        _times("Inter-token latency (ms)", "itl", result),
        _times("End to end (ms)", "e2e_latency", result),
        "=" * TABLE_WIDTH,
    ]
    return "\n".join(lines + _notes(result))


def _notes(result: Figures) -> list[str]:
    notes = []
    if result["errors"]:
        reason, count = next(iter(result["errors"].items()))
        notes.append(f"{count} of {result['failed']} failed requests: {reason}")
    if result["ended_early"]:
        notes.append(f"{result['ended_early']} requests ended with fewer tokens than were asked for")
    if result["requests_without_usage"]:
        notes.append(f"{result['requests_without_usage']} requests came without usage: their tokens are counted events")
    if result["client_cpu_share"] > 0.8:
        notes.append("the load generator was busy nearly all the time: the figures may be its limit, not the server's")
    return notes


def _cache_figures(done: Sequence[Observation]) -> Figures:
    """Return figures of the requests whose usage has cached tokens."""
    counted = [item for item in done if item.cached_tokens is not None]
    cached, prompt = sum(item.cached_tokens or 0 for item in counted), sum(item.input_tokens for item in counted)
    return {"cached_tokens": cached if counted else None, "cache_hit_rate": cached / prompt if prompt else None}


def _spread(name: str, values_s: Sequence[float]) -> Figures:
    """Return mean, standard deviation, percentiles (linear between the nearest two) and maximum, in milliseconds."""
    if not values_s:
        return {f"{part}_{name}_ms": None for part in ("mean", "std", "median", "p90", "p95", "p99", "max")}
    values = numpy.array(values_s) * 1000
    median, p90, p95, p99 = numpy.percentile(values, (50, 90, 95, 99)).tolist()
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"std_{name}_ms": float(values.std()),
        f"median_{name}_ms": median,
        f"p90_{name}_ms": p90,
        f"p95_{name}_ms": p95,
        f"p99_{name}_ms": p99,
        f"max_{name}_ms": float(values.max()),
    }


def _pair(name: str, value: str, other_name: str, other_value: str) -> str:
    return f"{name:<16}{value:>22}  {other_name:<18}{other_value:>20}"


def _times(label: str, name: str, result: Figures) -> str:
    values = [result[f"{part}_{name}_ms"] for part in ("mean", "median", "p90", "p99")]
    return f"{label:<30}" + "".join(f"{'-' if value is None else format(value, '.2f'):>12}" for value in values)


def _cached(result: Figures) -> str:
    if result["cached_tokens"] is None:
        return "not reported"
    return f"{result['cached_tokens']} ({result['cache_hit_rate'] or 0:.1%})"
