"""What HTTP and the process boundary cost: our server against our offline engine, on the same work, taking turns.

    python benchmark/http_overhead.py --model-path DIR --num-prompts 32 --input-len 64 --output-len 128

Both get the same number of prompts of random ids and generate as many tokens, greedily and to the end; the server's
answers are streamed. Prints each round, the overhead per token, and the median of the rounds' ratios.

Then the server's idle cost, as CPU seconds of its processes over --idle-seconds (a busy core would be that many):
with connections kept open after their streams have ended; and with as many streams open and waiting, for which the
core is stopped (SIGSTOP) after their first tokens, and let go afterwards: each must then come to its end.
"""

import argparse
import asyncio
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from rtp_llm import Engine
from rtp_llm.tools.bench_serving.async_http import HttpClient, RequestFailed
from rtp_llm.tools.bench_serving.benchmark import run_benchmark
from rtp_llm.tools.bench_serving.options import BenchArgs

READY_WITHIN_S = 300
IDLE_OUTPUT_LEN = 256


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextmanager
def running_server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Our server on a free port; gives its address and process id."""
    port = free_port()
    command = [sys.executable, "-m", "rtp_llm.launch_server", "--model-path", args.model_path, "--port", str(port)]
    command += ["--dtype", args.dtype, "--device", args.device, "--max-total-tokens", str(cache_tokens(args))]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            asyncio.run(until_ready(url, process, log))
            yield url, process.pid
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def until_ready(url: str, process: subprocess.Popen, log: "tempfile._TemporaryFileWrapper[str]") -> None:
    client = HttpClient(url, timeout_s=10)
    try:
        for _ in range(READY_WITHIN_S * 2):
            if process.poll() is not None:
                log.seek(0)
                raise SystemExit(f"the server ended with status {process.returncode}:\n{log.read()}")
            try:
                await client.request("GET", "/health")
                return
            except RequestFailed:
                await asyncio.sleep(0.5)
        raise SystemExit(f"the server is not ready after {READY_WITHIN_S} s")
    finally:
        await client.close()


def cache_tokens(args: argparse.Namespace) -> int:
    work = args.num_prompts * (args.input_len + args.output_len)
    return 2 * max(2048, work, args.num_streams * (args.input_len + IDLE_OUTPUT_LEN))


def vocab_size(args: argparse.Namespace) -> int:
    return transformers.AutoConfig.from_pretrained(args.model_path).get_text_config().vocab_size


def offline_round(engine: Engine, args: argparse.Namespace, draw: random.Random) -> float:
    """Seconds that the offline engine takes for one round's work."""
    size = vocab_size(args)
    prompts = [[draw.randrange(size) for _ in range(args.input_len)] for _ in range(args.num_prompts)]
    params = {"temperature": 0, "max_new_tokens": args.output_len, "ignore_eos": True}
    start_s = time.perf_counter()
    results = engine.generate(input_ids=prompts, sampling_params=params)
    duration_s = time.perf_counter() - start_s
    assert all(len(result["output_ids"]) == args.output_len for result in results)
    return duration_s


def server_round(url: str, args: argparse.Namespace, backend: str, seed: int) -> tuple[float, float]:
    """(Seconds that the server takes for one round's work, CPU seconds of the client among them)."""
    record = run_benchmark(
        BenchArgs(
            backend=backend,
            base_url=url,
            vocab_size=vocab_size(args),
            num_prompts=args.num_prompts,
            random_input_len=args.input_len,
            random_output_len=args.output_len,
            random_range_ratio=1.0,
            warmup_requests=0,
            seed=seed,
            disable_tqdm=True,
        )
    )
    expected = args.num_prompts * args.output_len
    if record["failed"] or record["total_output_tokens"] != expected:
        raise SystemExit(f"{record['total_output_tokens']} tokens instead of {expected}; errors: {record['errors']}")
    return record["duration"], record["client_cpu_share"] * record["duration"]


def compare(args: argparse.Namespace, engine: Engine, url: str) -> None:
    draw = random.Random(args.seed)
    num_tokens = args.num_prompts * args.output_len
    ratios, overheads_us = [], []
    for number in range(args.rounds + 1):  # fresh prompts each round, so that the prefix cache helps nobody
        offline_s = offline_round(engine, args, draw)
        server_s, client_s = server_round(url, args, args.backend, seed=args.seed + number)
        if number == 0:
            continue  # warming up
        ratios.append(server_s / offline_s)
        overheads_us.append((server_s - offline_s) / num_tokens * 1e6)
        print(
            f"round {number}: offline {num_tokens / offline_s:.0f} tokens/s, server {num_tokens / server_s:.0f}, "
            f"overhead {overheads_us[-1]:.1f} us per token (of which the client's CPU "
            f"{client_s / num_tokens * 1e6:.1f}), ratio {ratios[-1]:.2f}"
        )
    print(
        f"server / offline: {statistics.median(ratios):.2f}, {statistics.median(overheads_us):.1f} us per output token "
        f"(medians of {args.rounds} rounds)"
    )


def process_tree(pid: int) -> list[int]:
    """The process and all that descend from it, parents first."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid] + [
        found for file in children for child in file.read_text().split() for found in process_tree(int(child))
    ]


def cpu_s(pids: list[int]) -> float:
    """CPU seconds that the processes have used so far (fields utime and stime of /proc/PID/stat)."""
    ticks = 0
    for pid in pids:
        numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(numbers[11]) + int(numbers[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def idle_cpu_s(pids: list[int], seconds: float) -> float:
    await asyncio.sleep(2)  # what was going on may end
    before_s = cpu_s(pids)
    await asyncio.sleep(seconds)
    return cpu_s(pids) - before_s


class Streams:
    """A number of streams from the native API, and which of them have begun and ended."""

    def __init__(self, url: str, args: argparse.Namespace, num_streams: int) -> None:
        self._client = HttpClient(url)
        self._size, self._input_len = vocab_size(args), args.input_len
        self._num_streams = num_streams
        self.began: set[int] = set()
        self.ended: set[int] = set()

    async def run(self) -> None:
        """Until all have ended. Raises RequestFailed if one fails or breaks off."""
        async with asyncio.TaskGroup() as group:
            for i in range(self._num_streams):
                group.create_task(self._run_one(i))

    async def until_all_began(self) -> None:
        while len(self.began) < self._num_streams:
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        await self._client.close()

    async def _run_one(self, i: int) -> None:
        await self._client.stream("/generate", self._body(i), lambda data, now: self._take(i, data))
        if i not in self.ended:
            raise RequestFailed(f"stream {i} broke off")

    def _take(self, i: int, data: str) -> None:
        (self.ended if data == "[DONE]" else self.began).add(i)

    def _body(self, i: int) -> bytes:
        ids = [(i * 7 + position) % self._size for position in range(self._input_len)]
        params = f'{{"temperature": 0, "max_new_tokens": {IDLE_OUTPUT_LEN}, "ignore_eos": true}}'
        return f'{{"input_ids": {ids}, "sampling_params": {params}, "stream": true}}'.encode()


async def measure_idle(url: str, pid: int, args: argparse.Namespace) -> None:
    pids = process_tree(pid)
    print(f"the server has {len(pids)} processes; CPU seconds over {args.idle_seconds:g} s")
    streams = Streams(url, args, args.num_streams)
    await streams.run()
    used_s = await idle_cpu_s(pids, args.idle_seconds)
    print(f"  {args.num_streams} connections open, their streams ended: {used_s:.2f}")
    await streams.close()

    streams = Streams(url, args, args.num_streams)
    running = asyncio.create_task(streams.run())
    await streams.until_all_began()
    below = pids[1:]
    for child in below:
        os.kill(child, signal.SIGSTOP)
    try:
        num_open = args.num_streams - len(streams.ended)
        used_s = await idle_cpu_s(pids, args.idle_seconds)
    finally:
        for child in below:
            os.kill(child, signal.SIGCONT)
    await running
    await streams.close()
    print(f"  {num_open} streams open and waiting, the core stopped: {used_s:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what HTTP and the process boundary cost on one checkpoint.")
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--num-prompts", type=int, default=32, help="requests at once")
    parser.add_argument("--input-len", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=128, help="tokens to generate for each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="rtp-llm", help="the server's API, as bench_serving names it")
    parser.add_argument("--num-streams", type=int, default=100, help="connections of the idle measurement")
    parser.add_argument("--idle-seconds", type=float, default=10.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with running_server(args) as (url, pid):
        with Engine(
            model_path=args.model_path,
            dtype=args.dtype,
            device=args.device,
            max_total_tokens=cache_tokens(args),
        ) as engine:
            compare(args, engine, url)
        asyncio.run(measure_idle(url, pid, args))


if __name__ == "__main__":
    main()
