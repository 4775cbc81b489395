"""One run against a server: its requests, their sending, and the observations."""

import asyncio
import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rtp_llm.tools.bench_serving.async_http import BadAddress, HttpClient, RequestFailed
from rtp_llm.tools.bench_serving.backends import END_OF_STREAM, NATIVE, Ask, read_event
from rtp_llm.tools.bench_serving.options import DATASET_OPTIONS, DEFAULT_NUM_PROMPTS, BenchArgs, BenchError
from rtp_llm.tools.bench_serving.results import Figures, Observation, details, figures
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


def run_benchmark(args: BenchArgs) -> Figures:
    """Run once; return options and figures, which are also appended to the output file, if any.

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
    """One run against one server: query its model, make the requests, warm up, send, sum up."""

    def __init__(self, args: BenchArgs, on_progress: Callable[[int, int], None]) -> None:
        self.args = args
        self._on_progress = on_progress
        self._client = HttpClient(args.root_url, args.api_key, args.request_timeout)
        self._model = ""

    async def run(self) -> tuple[list[Observation], Figures]:
        """Return the observation of each request, and the record: options and figures."""
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
        """Return the model's name. The native API needs none, and some servers with it list none."""
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
        """Return the server's tokenizer path, if it reports one, as ours and SGLang do; else the model's name."""
        if self.args.api is NATIVE:
            info = await self._client.request_json("GET", "/model_info")
            if name := info.get("tokenizer_path") or info.get("model_path"):
                return str(name)
        return self._model

    def _body(self, request: BenchRequest, vocabulary: Vocabulary) -> bytes:
        """Return the request's body. All are made before the clock starts."""
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
        """Send all; return (observations, seconds that it took, CPU seconds of this process)."""
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
        """Send one request; its errors are recorded, not raised."""
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
    """Return the requests of a run, in order of arrival.

    Raises:
        WorkloadError: the data set is malformed, or no request of it is left.
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


@contextmanager
def _output(args: BenchArgs) -> Iterator[Callable[[Figures], None]]:
    """Yield a function that appends a line to the output file, if any; fail before the run if it cannot be written."""
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
    """Show a progress bar on stderr, if that is a terminal; yield the function to call with (done, total)."""
    console = Console(stderr=True)
    if args.disable_tqdm or not console.is_terminal:
        yield lambda done, total: None
        return
    columns = TextColumn("Requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task("Requests", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
