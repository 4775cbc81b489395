"""A server under real traffic and hostile clients, for as long as it takes to see what leaks, blocks or goes wrong.

    python benchmark/soak.py --minutes 30 --kill --out soak.json

Starts `rtp-llm serve` with the embedded model on a free port of this machine, and replays a recorded trace to it with
good clients: greedy requests, some streamed, some with pictures, each of which has been asked alone before and must get
the same answer again. Between them are hostile clients of many kinds. Meanwhile a process of its own asks for /health,
and the memory of the server's processes is read. With --kill, the core is killed again and again, and in the last
quarter of the time the HTTP process. A table says what came of it; the exit status is 1 if a requirement was missed,
and 2 if the run could not be made. docs/reliability.md says what is required.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The repository, and the modules that these requests come from.
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "test" / "hostile")]

from benchmark.health_watch import HealthWatch
from benchmark.soak_good import GoodClients
from benchmark.soak_hostile import HostileClients
from benchmark.soak_report import HEALTH_INTERVAL_S, Killing, Run, missed, record, table
from benchmark.soak_server import MemoryWatch, ServerFailed, SoakServer
from benchmark.soak_workload import GoodRequest, good_requests
from hostile_requests import Generator
from hostile_wire import Plan, Send, perform, request
from rtp_llm.tools.bench_serving.workloads import WorkloadError, mooncake_requests, within_context

EXIT_MISSED, EXIT_FAILED = 1, 2
TRACE = Path("traces/mooncake/conversation_trace.jsonl")
MEMORY_INTERVAL_S = 5.0
SERVER_ARGUMENTS = (
    "--device", "cpu", "--served-model-name", "rtp-llm-demo", "--max-running-requests", "32",
    "--max-queued-requests", "64", "--max-total-tokens", "32768", "--mm-embedding-cache-size-mb", "16",
)  # fmt: skip
IDLE_WITHIN_S = 60.0
MIN_KILL_GAP_S = 25.0  # three deaths of a core within a minute end the server


class Soak:
    """The run of one command line."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.server = SoakServer(folder, (*SERVER_ARGUMENTS, *args.server_args))
        self.good = GoodClients(f"http://{self.server.address[0]}:{self.server.address[1]}")
        self.run = Run(args, self.server.log, self.good.counts)
        self.hostile: HostileClients | None = None
        self._draw = random.Random(args.seed)
        self._health_file = folder / "health"

    def go(self, requests: list[GoodRequest]) -> None:
        """Everything, to the end of the server. Raises ServerFailed."""
        try:
            say(f"the server is ready after {self.server.start():.1f} s; its log is {self.server.log}")
            asyncio.run(self._measured(requests))
            self.run.problems += self.server.stop()
        finally:
            self.server.end()

    async def _measured(self, requests: list[GoodRequest]) -> None:
        start_s = time.monotonic()
        await self.good.learn(requests)
        say(f"{len(requests)} good requests have been asked alone, in {time.monotonic() - start_s:.1f} s")
        generator = Generator(get_json(self.server.address, "/openapi.json"), self.args.seed, canary_port=1)
        self.hostile = HostileClients(self.server.address, generator, self.args.seed, self.args.hostile)
        self.run.hostile = self.hostile.statuses
        memory = MemoryWatch(self.server, MEMORY_INTERVAL_S)
        memory.start()
        with HealthWatch(self._health_file, self.server.address, HEALTH_INTERVAL_S) as watch:
            await self._load(requests)
            self.run.looks = watch.looks()
        memory.stop()
        self.run.samples = memory.samples
        self.run.problems += self._still_busy()

    def _still_busy(self) -> list[str]:
        """What runs although all clients have left."""
        deadline_s = time.monotonic() + IDLE_WITHIN_S
        while True:
            stats = get_json(self.server.address, "/server_info")["stats"]
            busy = {name: stats[name] for name in ("num_running", "num_waiting", "num_held_tokens") if stats[name]}
            if not busy:
                return []
            if time.monotonic() > deadline_s:
                return [f"{IDLE_WITHIN_S:g} s after all clients left there are still {busy}"]
            time.sleep(0.2)

    async def _load(self, requests: list[GoodRequest]) -> None:
        self.run.begun_s = time.time()
        end_s = time.monotonic() + 60 * self.args.minutes
        clients = [self.good.run(requests, self.args.speed, end_s)]
        clients += [self.hostile.run(end_s)] if self.args.hostile and self.hostile is not None else []
        clients += [self._kill(end_s)] if self.args.kill else []
        await asyncio.gather(*clients, self._tell(end_s))
        self.run.ended_s = time.time()

    async def _tell(self, end_s: float) -> None:
        while (left_s := end_s - time.monotonic()) > 0:
            await asyncio.sleep(min(60.0, left_s))
            counts = self.good.counts
            say(
                f"{max(0.0, end_s - time.monotonic()) / 60:.1f} min left: good {counts.right} right of {counts.sent}, "
                f"{len(counts.wrong)} wrong, {counts.refused} refused, {counts.broken} broken; "
                f"{len(self.run.killings)} kills"
            )

    # Killing

    async def _kill(self, end_s: float) -> None:
        """The core at random in the first three quarters of the time, the HTTP process in the last."""
        start_s = time.monotonic()
        http_phase_s = start_s + 0.75 * (end_s - start_s)
        while (at_s := time.monotonic() + self._kill_gap_s()) < http_phase_s:
            await self._kill_at(at_s, self._kill_core)
        at_s = http_phase_s
        while at_s < end_s - 25:
            await self._kill_at(at_s, self._kill_http)
            at_s = time.monotonic() + self._kill_gap_s()

    def _kill_gap_s(self) -> float:
        return max(MIN_KILL_GAP_S, 60 * self.args.kill_every * self._draw.uniform(0.5, 1.5))

    async def _kill_at(self, at_s: float, kill: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await asyncio.sleep(max(0.0, at_s - time.monotonic()))
        await self._until_busy()
        await kill()

    async def _until_busy(self) -> None:
        deadline_s = time.monotonic() + 30
        while not self.good.num_live and time.monotonic() < deadline_s:
            await asyncio.sleep(0.005)

    async def _kill_core(self) -> None:
        at_s, start_s, num_live = time.time(), time.monotonic(), self.good.num_live
        pid = self.server.kill_core()
        if pid is None:
            self.run.problems.append("there was no core to kill")
            return
        self.good.num_deaths += 1
        await asyncio.to_thread(self._wait_for_another_core, pid)
        self.run.killings.append(Killing(at_s, "core", num_live, time.monotonic() - start_s))

    def _wait_for_another_core(self, pid: int) -> None:
        deadline_s = time.monotonic() + 60
        while self.server.core_pid() in (None, pid) and self.server.is_running() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        self.server.wait_ready()

    async def _kill_http(self) -> None:
        at_s, start_s, num_live = time.time(), time.monotonic(), self.good.num_live
        self.good.begin_breaking()
        scratch = self.server.scratch_folders()
        problems = await asyncio.to_thread(self.server.kill_http)
        self.run.problems += [f"after the HTTP process was killed, {problem}" for problem in problems]
        await asyncio.to_thread(self.server.start)
        if left := scratch & self.server.scratch_folders():
            self.run.problems.append(f"the next start left temporary folders of the killed server: {sorted(left)}")
        self.good.end_breaking()
        self.run.restarts.append((at_s, time.time()))
        self.run.killings.append(Killing(at_s, "HTTP", num_live, time.monotonic() - start_s))


def get_json(address: tuple[str, int], path: str) -> Any:
    outcome = perform(address, Plan((Send(request("GET", path)),), ("GET",)), 60.0)
    if not outcome.answers or outcome.answers[0].status != 200:
        raise ServerFailed(f"{path} was not answered: {outcome}")
    return json.loads(outcome.answers[0].body)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def parse_args() -> argparse.Namespace:
    data = Path(os.environ.get("RTP_LLM_TEST_DATA", ROOT / "../shared/data"))
    parser = argparse.ArgumentParser(description="Soak a server in real traffic and hostile requests.")
    parser.add_argument("--minutes", type=float, default=30.0, help="of load")
    parser.add_argument(
        "--kill", action="store_true", help="kill the core at random, and in the last quarter the HTTP process"
    )
    parser.add_argument(
        "--kill-every", type=float, default=2.0, help="minutes between two kills, on average; at least 25 s"
    )
    parser.add_argument("--out", type=Path, help="file for all that was observed, as JSON")
    parser.add_argument("--trace", type=Path, default=data / TRACE, help="a Mooncake trace ($RTP_LLM_TEST_DATA/traces)")
    parser.add_argument("--scale-lengths", type=float, default=64.0, help="the trace's lengths are divided by this")
    parser.add_argument("--context-len", type=int, default=500, help="longer requests of the scaled trace are left out")
    parser.add_argument("--most-exchanges", type=int, default=12, help="of a conversation, before its question")
    parser.add_argument("--speed", type=float, default=0.75, help="the trace's times are divided by this")
    parser.add_argument("--distinct", type=int, default=400, help="requests of the trace that are used, over and over")
    parser.add_argument("--images", type=float, default=0.2, help="share of good requests with a picture")
    parser.add_argument(
        "--hostile", type=float, default=1.0, help="how many hostile clients, relative to the usual; 0: none"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="where the server's log and temporary folders go; kept (a short name)"
    )
    parser.add_argument("server_args", nargs="*", help="further arguments of the server, after --")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        trace = within_context(mooncake_requests(args.trace, args.scale_lengths, 1.0), args.context_len)[
            : args.distinct
        ]
    except (OSError, WorkloadError) as error:
        say(f"no trace: {error}")
        return EXIT_FAILED
    requests = good_requests(trace, args.images, args.seed, args.most_exchanges)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    soak = Soak(args, folder)
    try:
        soak.go(requests)
    except (ServerFailed, RuntimeError) as error:
        say(f"the run could not be completed: {error}")
        return EXIT_FAILED
    problems = missed(soak.run)
    print(table(soak.run))
    print("\n".join(f"MISSED: {problem}" for problem in problems[:20]) or "every requirement was met")
    if args.out is not None:
        args.out.write_text(json.dumps(record(soak.run, problems)))
    return EXIT_MISSED if problems else 0


if __name__ == "__main__":
    sys.exit(main())
