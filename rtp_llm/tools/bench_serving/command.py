"""A load generator for servers that generate: ``python -m rtp_llm.bench_serving``, or ``rtp-llm bench``.

It sends requests to a server that runs already, ours or any with the OpenAI API, at a rate, at a concurrency, or as a
trace says, and prints throughput and latencies. docs/benchmarking.md explains the figures.
"""

import argparse
import asyncio
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rtp_llm.srt.configs.options import ArgumentParser, add_field_flags
from rtp_llm.tools.bench_serving.async_http import BadAddress, HttpClient, RequestFailed
from rtp_llm.tools.bench_serving.backends import BACKENDS, END_OF_STREAM, NATIVE, Ask, Backend, read_event
from rtp_llm.tools.bench_serving.results import Figures, Observation, details, figures, table
from rtp_llm.tools.bench_serving.workloads import (
    BenchRequest,
    Vocabulary,
    WorkloadError,
    azure_requests,
    load_tokenizer,
    mooncake_requests,
    random_requests,
    shared_prefix_requests,
    warmup_requests,
    with_arrivals,
    within_context,
)
from rtp_llm.version import __version__

EXIT_FAILED_REQUESTS = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

# The options that belong to one kind of data set, and what they are where they are not given.
DATASET_OPTIONS: dict[str, dict[str, Any]] = {
    "random": {"random_input_len": 1024, "random_output_len": 1024, "random_range_ratio": 0.0},
    "generated-shared-prefix": {
        "gsp_num_groups": 64,
        "gsp_prompts_per_group": 16,
        "gsp_system_prompt_len": 2048,
        "gsp_question_len": 128,
        "gsp_output_len": 256,
    },
    "mooncake": {
        "dataset_path": None, "trace_scale_lengths": 1.0, "trace_speed": 1.0, "trace_context_len": None,
    },
    "azure": {
        "dataset_path": None, "trace_scale_lengths": 1.0, "trace_speed": 1.0, "trace_context_len": None,
    },
}  # fmt: skip
DEFAULT_NUM_PROMPTS = 1000  # of the random data set; others have a size of their own


class BenchError(Exception):
    """The benchmark cannot be run as it was asked for."""


def _option(
    default: Any, help: str, *, choices: Sequence[str] = (), low: float | None = None, high: float | None = None
) -> Any:
    """A field. Numbers lie in ``[low, high]``."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices), "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    """All options of a run. Construction checks them, fills in the data set's own, and raises BenchError."""

    backend: str = _option(
        "rtp-llm",
        "what to talk to: our native /generate (also SGLang's), /v1/completions, or /v1/chat/completions",
        choices=tuple(BACKENDS),
    )
    base_url: str | None = _option(None, "address of the server, such as http://10.0.0.1:8000; unset: host and port")
    host: str | None = _option(None, "address of the server; unset: 127.0.0.1")
    port: int | None = _option(None, "port of the server; unset: 30000", low=1, high=65535)
    api_key: str | None = _option(None, "bearer token")
    model: str | None = _option(None, "the model's name at the server; unset: the first that it serves")
    tokenizer: str | None = _option(None, "directory or hub id with a tokenizer.json; unset: the model's")
    vocab_size: int | None = _option(None, "draw prompts from all ids below this, without a tokenizer", low=1)
    text_prompts: bool = _option(False, "send text even where the server takes token ids")
    dataset_name: str = _option("random", "what is asked", choices=tuple(DATASET_OPTIONS))
    dataset_path: str | None = _option(None, "mooncake, azure: the file of the trace")
    num_prompts: int | None = _option(
        None, f"number of requests, the first ones of the data set; unset: random {DEFAULT_NUM_PROMPTS}, others all",
        low=1,
    )  # fmt: skip
    random_input_len: int | None = _option(None, "random: most tokens of a prompt; unset: 1024", low=1)
    random_output_len: int | None = _option(None, "random: most tokens to generate; unset: 1024", low=1)
    random_range_ratio: float | None = _option(
        None, "random: shortest length as a part of the longest; 1: all equal; unset: 0, from one token on",
        low=0, high=1,
    )  # fmt: skip
    gsp_num_groups: int | None = _option(None, "shared prefix: number of system prompts; unset: 64", low=1)
    gsp_prompts_per_group: int | None = _option(None, "shared prefix: requests with each; unset: 16", low=1)
    gsp_system_prompt_len: int | None = _option(None, "shared prefix: tokens of each; unset: 2048", low=1)
    gsp_question_len: int | None = _option(None, "shared prefix: tokens that follow it; unset: 128", low=1)
    gsp_output_len: int | None = _option(None, "shared prefix: tokens to generate; unset: 256", low=1)
    trace_scale_lengths: float | None = _option(None, "traces: divide lengths by this; unset: 1", low=0.001)
    trace_speed: float | None = _option(None, "traces: divide times by this; unset: 1", low=0.001)
    trace_context_len: int | None = _option(
        None, "traces: leave out requests with more tokens, prompt and output together", low=2
    )
    request_rate: float | None = _option(
        None, "Poisson arrivals per second; inf: all at once; unset: as the trace says, else inf", low=1e-6
    )
    max_concurrency: int | None = _option(None, "most requests at once; those that arrive meanwhile wait", low=1)
    seed: int = _option(1, "of prompts, lengths and arrivals", low=0)
    disable_ignore_eos: bool = _option(False, "let the model end before the asked number of tokens")
    extra_request_body: str = _option("{}", "JSON object whose entries are added to each request, or replace ours")
    request_timeout: float = _option(3600.0, "seconds until an unfinished request counts as failed", low=0.001)
    warmup_requests: int = _option(1, "requests sent before, one by one, and not counted", low=0)
    flush_cache: bool = _option(False, "empty the server's prefix cache (POST /flush_cache) after warming up")
    output_file: str | None = _option(None, "append the result to this file, as a line of JSON")
    output_details: bool = _option(False, "every request's figures and text into that line, too")
    disable_tqdm: bool = _option(False, "no progress bar")

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item.name, getattr(self, item.name), item.metadata)
        if self.base_url is not None and (self.host is not None or self.port is not None):
            raise BenchError("give either --base-url, or --host and --port")
        if self.output_details and self.output_file is None:
            raise BenchError("--output-details needs --output-file")
        self._refuse_options_of_other_datasets()
        if "dataset_path" in DATASET_OPTIONS[self.dataset_name] and self.dataset_path is None:
            raise BenchError(f"--dataset-name {self.dataset_name} needs --dataset-path")
        self.extra_body()

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        return cls(**{item.name: getattr(args, item.name) for item in fields(cls)})

    @property
    def api(self) -> Backend:
        return BACKENDS[self.backend]

    @property
    def root_url(self) -> str:
        """The server's address without ``/v1``, which may be given or not."""
        url = self.base_url or f"http://{self.host or '127.0.0.1'}:{self.port or 30000}"
        return url.rstrip("/").removesuffix("/v1")

    @property
    def sends_text(self) -> bool:
        return self.text_prompts or not self.api.takes_ids

    def of_dataset(self, name: str) -> Any:
        """An option of the data set, or its default."""
        value = getattr(self, name)
        return DATASET_OPTIONS[self.dataset_name][name] if value is None else value

    def extra_body(self) -> dict[str, Any]:
        try:
            body = json.loads(self.extra_request_body)
        except ValueError as error:
            raise BenchError(f"--extra-request-body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise BenchError(f"--extra-request-body must be a JSON object, not {self.extra_request_body!r}")
        return body

    def to_dict(self) -> dict[str, Any]:
        """Options for the record: those that apply, without the key; an infinite rate is "inf"."""
        own = DATASET_OPTIONS[self.dataset_name]
        foreign = {name for options in DATASET_OPTIONS.values() for name in options} - set(own)
        hidden = {"api_key", "host", "port", "base_url", "disable_tqdm", "output_file", "output_details"}
        options = {name: value for name, value in asdict(self).items() if name not in foreign | hidden}
        options |= {name: self.of_dataset(name) for name in own}
        rate = self.request_rate
        return options | {
            "base_url": self.root_url,
            "request_rate": rate if rate is not None and math.isfinite(rate) else "trace" if self._replays else "inf",
        }

    @property
    def _replays(self) -> bool:
        return "trace_speed" in DATASET_OPTIONS[self.dataset_name] and self.request_rate is None

    def _refuse_options_of_other_datasets(self) -> None:
        own = DATASET_OPTIONS[self.dataset_name]
        for dataset, options in DATASET_OPTIONS.items():
            for name in options:
                if name not in own and getattr(self, name) is not None:
                    raise BenchError(f"{_flag(name)} belongs to --dataset-name {dataset}, not {self.dataset_name}")
        if self.trace_speed is not None and self.request_rate is not None:
            raise BenchError("--request-rate replaces the trace's times: --trace-speed would do nothing")


def _check(name: str, value: Any, metadata: Any) -> None:
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if value is None:
        return
    if choices and value not in choices:
        raise BenchError(f"{_flag(name)} cannot be {value!r}; have {', '.join(choices)}")
    # written so that NaN, which compares false with everything, is refused
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        raise BenchError(
            f"{_flag(name)} must be at least {low}{'' if high is None else f', at most {high}'}; not {value}"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """The flags of a run, one for each field of BenchArgs."""
    add_field_flags(parser, BenchArgs)
    parser.set_defaults(log_level="warning")  # which the command line asks all commands for


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark that a command line asks for; prints the table; returns the exit status.

    0: done; 1: done, but requests failed.

    Raises:
        BenchError: it cannot be run.
    """
    bench_args = BenchArgs.from_cli_args(args)
    record = run_benchmark(bench_args)
    print(table("Serving benchmark", _what(bench_args, record), record))
    return EXIT_FAILED_REQUESTS if record["failed"] else 0


def run_benchmark(args: BenchArgs) -> Figures:
    """One run: its options and figures, which are also appended to the output file if there is one.

    Raises:
        BenchError: no server, no tokenizer, no data set, or a warm-up request failed.
    """
    _allow_many_connections()
    try:
        with _output(args) as write, _progress(args) as on_progress:
            observations, record = asyncio.run(Benchmark(args, on_progress).run())
            write(record | details(observations) if args.output_details else record)
    except (BadAddress, RequestFailed, WorkloadError, OSError) as error:
        raise BenchError(str(error)) from error
    return record


class Benchmark:
    """One run against one server: find out what it serves, make the requests, warm up, send, sum up."""

    def __init__(self, args: BenchArgs, on_progress: Callable[[int, int], None]) -> None:
        self.args = args
        self._on_progress = on_progress
        self._client = HttpClient(args.root_url, args.api_key, args.request_timeout)
        self._model = ""

    async def run(self) -> tuple[list[Observation], Figures]:
        """What was seen of each request, and the record: options and figures."""
        try:
            requests = workload(self.args)
            self._model = await self._served_model()
            vocabulary = await self._vocabulary()
            bodies = [self._body(request, vocabulary) for request in requests]
            await self._warm_up(requests, vocabulary)
            observations, duration_s, cpu_s = await self._load(requests, bodies)
        finally:
            await self._client.close()
        result = figures(observations, duration_s, cpu_s, not self.args.disable_ignore_eos)
        about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "rtp_llm_version": __version__}
        options = self.args.to_dict() | {"model": self._model, "num_prompts": len(requests)}
        return observations, about | options | result

    async def _served_model(self) -> str:
        """The name of the model. The native API needs none, and some servers that have it list none."""
        if self.args.model is not None:
            return self.args.model
        try:
            listed = await self._client.request_json("GET", "/v1/models")
            return str(listed["data"][0]["id"])
        except (LookupError, TypeError):
            raise BenchError(f"{self.args.root_url}/v1/models lists no model; name one with --model") from None

    async def _vocabulary(self) -> Vocabulary:
        if self.args.vocab_size is not None:
            if self.args.sends_text:
                raise BenchError("prompts of text need a tokenizer: --vocab-size is for prompts of token ids")
            return Vocabulary.from_size(self.args.vocab_size)
        return Vocabulary.from_tokenizer(load_tokenizer(self.args.tokenizer or await self._tokenizer_name()))

    async def _tokenizer_name(self) -> str:
        """Where the server has its tokenizer from, if it tells, as ours and SGLang do; else the model's name."""
        if self.args.api is NATIVE:
            info = await self._client.request_json("GET", "/model_info")
            if name := info.get("tokenizer_path") or info.get("model_path"):
                return str(name)
        return self._model

    def _body(self, request: BenchRequest, vocabulary: Vocabulary) -> bytes:
        """The request as it is sent. All are made before the clock starts."""
        draw = vocabulary.text if self.args.sends_text else vocabulary.ids
        prompt = draw(request.pieces, self.args.seed)
        ask = Ask(prompt, request.output_len, self._model, not self.args.disable_ignore_eos)
        return json.dumps(self.args.api.body(ask) | self.args.extra_body()).encode()

    async def _warm_up(self, requests: Sequence[BenchRequest], vocabulary: Vocabulary) -> None:
        for request in warmup_requests(requests, self.args.warmup_requests):
            seen = await self._send(request, self._body(request, vocabulary))
            if seen.error is not None:
                raise BenchError(f"a warm-up request failed: {seen.error}")
        if self.args.flush_cache:
            try:
                await self._client.request("POST", "/flush_cache")
            except RequestFailed as error:
                raise BenchError(f"--flush-cache: {error}") from None

    async def _load(
        self, requests: Sequence[BenchRequest], bodies: Sequence[bytes]
    ) -> tuple[list[Observation], float, float]:
        """Sends all; (what was seen, seconds that it took, CPU seconds of this process)."""
        gate = asyncio.Semaphore(self.args.max_concurrency or len(requests))
        num_done = 0

        async def send(request: BenchRequest, body: bytes) -> Observation:
            nonlocal num_done
            async with gate:
                seen = await self._send(request, body)
            num_done += 1
            self._on_progress(num_done, len(requests))
            return seen

        self._on_progress(0, len(requests))
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for request, body in zip(requests, bodies, strict=True):
                await _sleep_until(start_s + (request.arrival_s or 0.0))
                tasks.append(group.create_task(send(request, body)))
        return [task.result() for task in tasks], time.perf_counter() - start_s, time.process_time() - start_cpu_s

    async def _send(self, request: BenchRequest, body: bytes) -> Observation:
        """One request; what goes wrong with it is noted, not raised."""
        seen = Observation(request.prompt_len, request.output_len)
        ended = False

        def on_event(data: str, now_s: float) -> None:
            nonlocal ended
            if data.strip() == END_OF_STREAM:
                ended = True
            elif data:
                seen.add(read_event(self.args.api, data), now_s)

        seen.start_s = time.perf_counter()
        try:
            await self._client.stream(self.args.api.path, body, on_event)
            if not (ended or seen.finished):
                raise RequestFailed("the stream ended before the answer was complete")
        except RequestFailed as error:
            seen.error = str(error)
        seen.end_s = time.perf_counter()
        return seen


def workload(args: BenchArgs) -> list[BenchRequest]:
    """The requests of a run, in order of arrival.

    Raises:
        WorkloadError: the data set is not what it should be, or nothing of it is left.
    """
    requests = within_context(_dataset(args), args.trace_context_len)[: args.num_prompts]
    if not requests:
        raise WorkloadError(f"no request of the trace has at most {args.trace_context_len} tokens")
    rate = args.request_rate
    if rate is None and requests[0].arrival_s is None:
        rate = math.inf
    return requests if rate is None else with_arrivals(requests, rate, args.seed)


def _dataset(args: BenchArgs) -> list[BenchRequest]:
    options = {name: args.of_dataset(name) for name in DATASET_OPTIONS[args.dataset_name]}
    if args.dataset_name == "random":
        count = args.num_prompts or DEFAULT_NUM_PROMPTS
        return random_requests(
            count,
            options["random_input_len"],
            options["random_output_len"],
            options["random_range_ratio"],
            args.seed,
        )
    if args.dataset_name == "generated-shared-prefix":
        return shared_prefix_requests(
            **{name.removeprefix("gsp_"): value for name, value in options.items()}, seed=args.seed
        )
    read = azure_requests if args.dataset_name == "azure" else mooncake_requests
    return read(Path(options["dataset_path"]), options["trace_scale_lengths"], options["trace_speed"])


async def _sleep_until(time_s: float) -> None:
    if (wait_s := time_s - time.perf_counter()) > 0:
        await asyncio.sleep(wait_s)


def _what(args: BenchArgs, record: Figures) -> str:
    """Three lines on what was run. Of a long model name, which may be a path, the end stays."""
    rate = record["request_rate"]
    arrivals = {"inf": "all at once", "trace": "at the trace's times"}.get(rate, f"{rate} requests/s")
    at_most = f", at most {args.max_concurrency} running" if args.max_concurrency else ""
    model = record["model"] if len(record["model"]) <= 70 else "..." + record["model"][-67:]
    lines = [
        f"{args.api.path} at {args.root_url}",
        f"model {model}",
        f"{args.dataset_name}, {record['num_prompts']} requests, {arrivals}{at_most}",
    ]
    return "\n".join(lines)


@contextmanager
def _output(args: BenchArgs) -> Iterator[Callable[[Figures], None]]:
    """What appends a line to the output file, if there is one; that it cannot be written is told before the run."""
    if args.output_file is None:
        yield lambda record: None
        return
    with open(args.output_file, "a") as file:
        yield lambda record: print(json.dumps(record), file=file)


def _allow_many_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def _progress(args: BenchArgs) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, if that is a terminal; gives the function to be called with (done, total)."""
    console = Console(stderr=True)
    if args.disable_tqdm or not console.is_terminal:
        yield lambda done, total: None
        return
    columns = TextColumn("Requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task("Requests", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def main(argv: Sequence[str] | None = None) -> int:
    """The module's own command line, with the flags and the exit statuses of ``rtp-llm bench``."""
    parser = ArgumentParser(prog="python -m rtp_llm.bench_serving", description="Load on a server, and its figures.")
    add_cli_args(parser)
    try:
        return run(parser.parse_args(argv))
    except BenchError as error:
        print(f"bench_serving: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
