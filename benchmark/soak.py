"""A server under real traffic and hostile clients, for as long as it takes to see what leaks, blocks or goes wrong.

    python benchmark/soak.py --minutes 30 --kill --out soak.json

Starts `rtp-llm serve` with the embedded model on a free port of this machine, and replays a recorded trace to it with
good clients: greedy requests, some streamed, some with pictures,
each of which has been asked alone before and must get
the same answer again. Between them are hostile clients of many kinds. Meanwhile a process of its own asks for /health,
and the memory of the server's processes is read. With --kill, the core is killed again and again, and in a last phase
the HTTP process. A table says what came of it; the exit status is 1 if a requirement was missed,
and 2 if the run could
not be made. docs/reliability.md says what is required.
"""

import argparse
import asyncio
import json
import math
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The repository, and the modules that these requests come from.
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "test" / "hostile")]

from benchmark.health_watch import HealthWatch, Look
from benchmark.soak_clients import GoodClients, HostileClients
from benchmark.soak_server import MemoryWatch, Sample, ServerFailed, SoakServer
from benchmark.soak_workload import GoodRequest, good_requests
from hostile_requests import Generator
from hostile_wire import Plan, Send, perform, request
from rtp_llm.bench.workloads import WorkloadError, mooncake_requests, within_context

EXIT_MISSED, EXIT_FAILED = 1, 2
TRACE = Path("traces/mooncake/conversation_trace.jsonl")
HEALTH_INTERVAL_S = 0.2
MEMORY_INTERVAL_S = 5.0
MEMORY_WINDOW_S = 30.0  # of which the median counts
MAX_HEALTH_P99_S = 0.5
MAX_GROWTH = 1.03
MIN_MINUTES_FOR_MEMORY = 10.0
SERVER_ARGUMENTS = ("--device", "cpu", "--served-model-name", "rtp-llm-demo", "--max-running-requests", "32",
                    "--max-queued-requests", "64", "--max-total-tokens", "32768", "--mm-embedding-cache-size-mb",
                    "16")  # fmt: skip
MIB = 1 << 20


@dataclass(slots=True)
class Killing:
    """One kill: when (epoch), of what, how many good requests were live, and how long /health was not 200 after it."""

    at_s: float
    role: str
    num_live: int
    recovered_s: float


@dataclass(slots=True)
class Run:
    """All that was observed."""

    begun_s: float = 0.0  # epoch, of the load
    ended_s: float = 0.0
    killings: list[Killing] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    restarts: list[tuple[float, float]] = field(default_factory=list)  # no server was there; epoch
    looks: list[Look] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def counted_looks(self) -> list[Look]:
        """Of the times when there was a server to ask."""
        return [
            look
            for look in self.looks
            if self.begun_s <= look.at_s <= self.ended_s
            and not any(begin <= look.at_s and look.at_s - look.took_s <= end for begin, end in self.restarts)
        ]

    def memory(self, role: str, at_s: float) -> float | None:
        """Bytes: the median of half a minute up to a moment."""
        near = sorted(s.num_bytes for s in self.samples if s.role == role and 0 <= at_s - s.at_s <= MEMORY_WINDOW_S)
        return near[len(near) // 2] if near else None


class Soak:
    """The run of one command line."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.server = SoakServer(folder, (*SERVER_ARGUMENTS, *args.server_args))
        self.good = GoodClients(f"http://{self.server.address[0]}:{self.server.address[1]}")
        self.run = Run()
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
        document = perform(self.server.address, Plan((Send(request("GET", "/openapi.json")),), ("GET",)), 30.0)
        generator = Generator(json.loads(document.answers[0].body), self.args.seed, canary_port=1)
        self.hostile = HostileClients(self.server.address, generator, self.args.seed, self.args.hostile)
        memory = MemoryWatch(self.server, MEMORY_INTERVAL_S)
        memory.start()
        with HealthWatch(self._health_file, self.server.address, HEALTH_INTERVAL_S) as watch:
            await self._load(requests)
            self.run.looks = watch.looks()
        memory.stop()
        self.run.samples = memory.samples

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
        http_phase_s = time.monotonic() + 0.75 * (end_s - time.monotonic())
        gap_s = 60 * self.args.kill_every
        while True:
            is_core = time.monotonic() < http_phase_s
            wait_s = max(25.0, gap_s * self._draw.uniform(0.5, 1.5))  # three deaths within a minute end the server
            if is_core and time.monotonic() + wait_s > http_phase_s:
                wait_s = max(0.0, http_phase_s - time.monotonic()) + 5.0
                is_core = False
            if time.monotonic() + wait_s > end_s - 30:
                return
            await asyncio.sleep(wait_s)
            await self._until_busy()
            await (self._kill_core() if is_core else self._kill_http())

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


# What came of it


def missed(soak: Soak) -> list[str]:
    """The requirements that were missed, as sentences."""
    run, counts = soak.run, soak.good.counts
    found = [*run.problems, *counts.wrong]
    if counts.sent != counts.right + len(counts.wrong):
        found.append(f"of {counts.sent} good requests {counts.right} were right and {len(counts.wrong)} wrong")
    if not counts.right:
        found.append("no good request was answered")
    looks = run.counted_looks
    p99_s = percentile([look.took_s for look in looks], 99)
    if not p99_s < MAX_HEALTH_P99_S:
        found.append(f"p99 of /health is {1000 * p99_s:.0f} ms; it must be under {1000 * MAX_HEALTH_P99_S:.0f} ms")
    if soak.hostile is not None and (bad := soak.hostile.bad_statuses()):
        found.append(f"hostile clients got errors of the server's own: {bad}")
    if "Traceback (most recent call last)" in soak.server.log.read_text(errors="replace"):
        found.append(f"the server logged a traceback: {soak.server.log}")
    if soak.args.minutes >= MIN_MINUTES_FOR_MEMORY:
        for role, begin, end, ratio in memory_rows(run, soak.args.minutes):
            if not ratio <= MAX_GROWTH:
                found.append(
                    f"the {role} process grew from {begin:.0f} to {end:.0f} MiB, by more than {MAX_GROWTH - 1:.0%}"
                )
    return found


def memory_rows(run: Run, minutes: float) -> list[tuple[str, float, float, float]]:
    """(role, MiB at minute five or in the middle of a shorter run, MiB at the end, ratio)."""
    rows = []
    for role in ("HTTP", "core"):
        begin = run.memory(role, run.begun_s + 60 * reference_minute(minutes))
        end = run.memory(role, run.ended_s)
        if begin is None or end is None:  # it was being restarted
            rows.append((role, math.nan, math.nan, math.nan))
        else:
            rows.append((role, begin / MIB, end / MIB, end / begin))
    return rows


def reference_minute(minutes: float) -> float:
    return 5.0 if minutes >= MIN_MINUTES_FOR_MEMORY else minutes / 2


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed; nan of none."""
    values = sorted(values)
    return values[min(len(values) - 1, math.ceil(len(values) * percent / 100) - 1)] if values else math.nan


def table(soak: Soak) -> str:
    rows = [*good_rows(soak), *hostile_rows(soak), *server_rows(soak), *kill_rows(soak)]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def good_rows(soak: Soak) -> list[tuple[str, str]]:
    counts, args = soak.good.counts, soak.args
    rate = counts.sent / (60 * args.minutes)
    kinds = f"{counts.streamed} streamed, {counts.with_image} with pictures"
    return [
        ("load", f"{args.minutes:g} minutes, {rate:.2f} good requests/s (the trace at {args.speed:g} times its speed)"),
        ("good requests", f"{counts.sent} sent ({kinds}), {counts.right} right, {len(counts.wrong)} wrong"),
        ("good requests refused with 503, and sent again", f"{counts.refused} times"),
        ("good requests cut off by the HTTP process's death, and sent again", f"{counts.broken} times"),
        ("good requests right over a core's death", f"{counts.over_a_death}"),
    ]


def hostile_rows(soak: Soak) -> list[tuple[str, str]]:
    kinds = soak.hostile.statuses if soak.hostile else {}
    return [
        (f"hostile: {kind}", f"{counts.total()}: " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
        for kind, counts in sorted(kinds.items())
    ]


def server_rows(soak: Soak) -> list[tuple[str, str]]:
    took_ms = [1000 * look.took_s for look in soak.run.counted_looks]
    p50, p99, most = (percentile(took_ms, percent) for percent in (50, 99, 100))
    rows = [("/health", f"{len(took_ms)} asked; p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {most:.0f} ms")]
    minute = f"minute {reference_minute(soak.args.minutes):g}"
    for role, begin, end, ratio in memory_rows(soak.run, soak.args.minutes):
        rows.append(
            (f"memory of the {role} process", f"{minute}: {begin:.0f} MiB, end: {end:.0f} MiB, ratio {ratio:.3f}")
        )
    return rows


def kill_rows(soak: Soak) -> list[tuple[str, str]]:
    rows = []
    for role in ("core", "HTTP"):
        if kills := [killing for killing in soak.run.killings if killing.role == role]:
            slowest_s = max(killing.recovered_s for killing in kills)
            num_live = sum(killing.num_live for killing in kills)
            told = f"{len(kills)}, with {num_live} good requests live; ready again within {slowest_s:.1f} s"
            rows.append((f"kills of the {role} process", told))
    return rows


def record(soak: Soak, problems: list[str]) -> dict[str, Any]:
    run, counts = soak.run, soak.good.counts
    return {
        "options": {name: str(value) for name, value in vars(soak.args).items()},
        "begun_s": run.begun_s,
        "ended_s": run.ended_s,
        "good": asdict(counts),
        "hostile": {kind: dict(statuses) for kind, statuses in (soak.hostile.statuses if soak.hostile else {}).items()},
        "health": [asdict(look) for look in run.looks],
        "restarts": run.restarts,
        "memory": [asdict(sample) for sample in run.samples],
        "killings": [asdict(killing) for killing in run.killings],
        "missed": problems,
    }


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
    problems = missed(soak)
    print(table(soak))
    print("\n".join(f"MISSED: {problem}" for problem in problems[:20]) or "every requirement was met")
    if args.out is not None:
        args.out.write_text(json.dumps(record(soak, problems)))
    return EXIT_MISSED if problems else 0


if __name__ == "__main__":
    sys.exit(main())
