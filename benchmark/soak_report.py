"""What came of a soak: what was observed, the requirements that were missed, and the table."""

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmark.health_watch import Look
from benchmark.soak_good import GoodCounts
from benchmark.soak_server import Sample

HEALTH_INTERVAL_S = 0.2
MEMORY_WINDOW_S = 30.0  # of which the median counts
MAX_HEALTH_P99_S = 0.5
MAX_GROWTH = 1.03
MIN_MINUTES_FOR_MEMORY = 10.0
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
    """All that was observed under the options of the command line."""

    args: argparse.Namespace
    log: Path  # the server's
    good: GoodCounts = field(default_factory=GoodCounts)
    hostile: dict[str, Counter[str]] = field(default_factory=dict)  # kind -> how often each status came
    begun_s: float = 0.0  # epoch, of the load
    ended_s: float = 0.0
    killings: list[Killing] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    restarts: list[tuple[float, float]] = field(default_factory=list)  # no server was there; epoch
    looks: list[Look] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def counted_looks(self) -> list[Look]:
        """Looks from the times when there was a server to ask."""
        return [
            look
            for look in self.looks
            if self.begun_s <= look.at_s <= self.ended_s
            and not any(begin <= look.at_s and look.at_s - look.took_s <= end for begin, end in self.restarts)
        ]

    @property
    def health_s(self) -> list[float]:
        """Seconds that /health took. A question that was not asked because the one before it had no answer yet counts,
        too, with what it would have waited from its time on."""
        found = []
        for look in self.counted_looks:
            num_due = int(look.took_s / HEALTH_INTERVAL_S)
            found += [look.took_s - i * HEALTH_INTERVAL_S for i in range(num_due + 1)]
        return found

    def memory(self, samples: Sequence[Sample], at_s: float) -> float | None:
        """Bytes: the median of half a minute up to a moment."""
        near = sorted(sample.num_bytes for sample in samples if 0 <= at_s - sample.at_s <= MEMORY_WINDOW_S)
        return near[len(near) // 2] if near else None

    def memory_of_http(self, at_s: float) -> list[Sample]:
        """Samples of the HTTP process that was there at a moment, for as long as it lived."""
        samples = [sample for sample in self.samples if sample.role == "HTTP"]
        pid = min(samples, key=lambda sample: abs(sample.at_s - at_s)).pid if samples else None
        return [sample for sample in samples if sample.pid == pid]


def missed(run: Run) -> list[str]:
    """The requirements that were missed, as sentences."""
    counts = run.good
    found = [*run.problems, *counts.wrong]
    if counts.sent != counts.right + len(counts.wrong):
        found.append(f"of {counts.sent} good requests {counts.right} were right and {len(counts.wrong)} wrong")
    num_cores = len({sample.pid for sample in run.samples if sample.role == "core"})
    if num_cores > 1 + len(run.killings):
        found.append(f"there were {num_cores} cores and {len(run.killings)} kills: a core died by itself")
    if not counts.right:
        found.append("no good request was answered")
    looks = run.counted_looks
    if odd := Counter(look.status for look in looks if look.status not in (200, 503)):
        found.append(f"/health was answered neither 200 nor 503 (status 0: not at all): {dict(odd)}")
    p99_s = percentile(run.health_s, 99)
    if not p99_s < MAX_HEALTH_P99_S:
        found.append(f"p99 of /health is {1000 * p99_s:.0f} ms; it must be under {1000 * MAX_HEALTH_P99_S:.0f} ms")
    if bad := bad_statuses(run.hostile):
        found.append(f"hostile clients got errors of the server's own: {bad}")
    if "Traceback (most recent call last)" in run.log.read_text(errors="replace"):
        found.append(f"the server logged a traceback: {run.log}")
    if run.args.minutes >= MIN_MINUTES_FOR_MEMORY:
        for role, begin, end, ratio in memory_rows(run, run.args.minutes):
            if not ratio <= MAX_GROWTH:
                found.append(
                    f"the {role} process grew from {begin:.0f} to {end:.0f} MiB, by more than {MAX_GROWTH - 1:.0%}"
                )
    return found


def bad_statuses(hostile: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Errors of the server's own: 5xx other than 503, and answers that are no HTTP."""
    return {
        f"{kind} {status}": count
        for kind, counts in hostile.items()
        for status, count in counts.items()
        if (status.startswith("5") and status not in ("501", "503", "505")) or status == "no HTTP"
    }


def memory_rows(run: Run, minutes: float) -> list[tuple[str, float, float, float]]:
    """(role, MiB at minute five or in the middle of a shorter run, MiB at the end, ratio). The end of the HTTP process
    is its own, if it was killed; the core at the end may be another one."""
    begin_s = run.begun_s + 60 * reference_minute(minutes)
    http = run.memory_of_http(begin_s)
    core = [sample for sample in run.samples if sample.role == "core"]
    rows = []
    for role, samples in (("HTTP", http), ("core", core)):
        begin, end = (run.memory(samples, at_s) for at_s in (begin_s, samples[-1].at_s if samples else 0.0))
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


def table(run: Run) -> str:
    rows = [*good_rows(run), *hostile_rows(run), *server_rows(run), *kill_rows(run)]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def good_rows(run: Run) -> list[tuple[str, str]]:
    counts, args = run.good, run.args
    rate = counts.sent / (60 * args.minutes)
    kinds = f"{counts.streamed} streamed, {counts.with_image} with pictures"
    return [
        ("load", f"{args.minutes:g} minutes, {rate:.2f} good requests/s (the trace at {args.speed:g} times its speed)"),
        ("good requests", f"{counts.sent} sent ({kinds}), {counts.right} right, {len(counts.wrong)} wrong"),
        ("good requests refused with 503, and sent again", f"{counts.refused} times"),
        ("good requests cut off by the HTTP process's death, and sent again", f"{counts.broken} times"),
        ("good requests right over a core's death", f"{counts.over_a_death}"),
    ]


def hostile_rows(run: Run) -> list[tuple[str, str]]:
    kinds = run.hostile
    return [
        (f"hostile: {kind}", f"{counts.total()}: " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
        for kind, counts in sorted(kinds.items())
    ]


def server_rows(run: Run) -> list[tuple[str, str]]:
    took_ms = [1000 * seconds for seconds in run.health_s]
    p50, p99, most = (percentile(took_ms, percent) for percent in (50, 99, 100))
    statuses = Counter(look.status for look in run.counted_looks)
    told = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    rows = [("/health", f"{statuses.total()} asked: {told}; p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {most:.0f} ms")]
    minute = f"minute {reference_minute(run.args.minutes):g}"
    for role, begin, end, ratio in memory_rows(run, run.args.minutes):
        rows.append(
            (f"memory of the {role} process", f"{minute}: {begin:.0f} MiB, end: {end:.0f} MiB, ratio {ratio:.3f}")
        )
    return rows


def kill_rows(run: Run) -> list[tuple[str, str]]:
    rows = []
    for role in ("core", "HTTP"):
        if kills := [killing for killing in run.killings if killing.role == role]:
            slowest_s = max(killing.recovered_s for killing in kills)
            num_live = sum(killing.num_live for killing in kills)
            told = f"{len(kills)}, with {num_live} good requests live; ready again within {slowest_s:.1f} s"
            rows.append((f"kills of the {role} process", told))
    return rows


def record(run: Run, problems: list[str]) -> dict[str, Any]:
    counts = run.good
    return {
        "options": {name: str(value) for name, value in vars(run.args).items()},
        "begun_s": run.begun_s,
        "ended_s": run.ended_s,
        "good": asdict(counts),
        "hostile": {kind: dict(statuses) for kind, statuses in run.hostile.items()},
        "health": [asdict(look) for look in run.looks],
        "restarts": run.restarts,
        "memory": [asdict(sample) for sample in run.samples],
        "killings": [asdict(killing) for killing in run.killings],
        "missed": problems,
    }
