"""Our engine and its peers on one CPU, on the same work, in one run, taking turns (A B A B ...).

    python benchmark/peers/setup.py llama.cpp openvino vllm transformers
    python benchmark/peers/run.py --precision 16 --shape 0.6b --rounds 3
    python benchmark/peers/run.py --model FILE.gguf
    python benchmark/peers/run.py --before CHECKOUT

Prints each round, a markdown table with medians, ratios to the best peer and to what the machine allows, and the
machine's ceilings, measured before the first and after the last round. README.md tells what makes this fair.
"""

import argparse
import json
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for the modules beside this one

from benchmark.peers.peers import BEFORE, DEFAULT_INTO, HERE, OURS, PEERS, Peer, add_before
from benchmark.peers.process import SideFailed
from benchmark.peers.protocol import Job, NotOffered
from benchmark.peers.report import FIGURES, Comparison, bound, compare, table
from benchmark.peers.side import Side
from benchmark.peers.subject import (
    BITS_PER_WEIGHT,
    GGUF_SUFFIX,
    SHAPES,
    Subject,
    of_checkpoint,
    of_gguf,
    shape_checkpoint,
)
from benchmark.peers.workloads import WORKLOADS

GGUF_PEERS = (OURS, "llama.cpp")
WARMUP_OUTPUT_LEN = 2  # one step of decoding
EXIT_FAILED = 1


@dataclass
class Run:
    """All that a run has seen: by workload and figure, the rounds of each side."""

    sides: dict[str, Side]
    about: dict[str, dict[str, str]]
    values: dict[tuple[str, str], dict[str, list[float]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    failed: bool = False

    def drop(self, name: str, why: str) -> None:
        """A side that failed is out for the rest of the run, and of its rounds nothing is reported."""
        print(f"!! {why}", flush=True)
        self.left_out.append(f"{PEERS[name].title}: {why.splitlines()[0]}")
        self.failed = True
        self.sides.pop(name).close()
        for rounds in self.values.values():
            rounds.pop(name, None)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the sides are ended
    args.work_dir.mkdir(parents=True, exist_ok=True)
    subject = subject_of(args)
    ceilings = [measure_ceilings(args.threads)]
    with tempfile.TemporaryDirectory(prefix="peers-") as logs:
        run = start(args, subject, Path(logs))
        try:
            for name in args.workloads:
                run_workload(run, name, subject.vocab_size, args)
            peak = {name: side.group.peak_memory() for name, side in run.sides.items()}
        finally:
            for side in run.sides.values():
                side.close()
    ceilings.append(measure_ceilings(args.threads))
    report(args, subject, run, ceilings, peak)
    return EXIT_FAILED if run.failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare our engine with its peers on one CPU, taking turns.")
    parser.add_argument("--precision", type=int, choices=BITS_PER_WEIGHT, default=16, help="bits of a weight")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b", help="random checkpoint, made if it is not there")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder in bfloat16 instead of --shape")
    parser.add_argument("--model", type=Path, help="a GGUF file, which those who read one are given as it is")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="sides; all by default, or with --before ours alone")
    parser.add_argument("--before", type=Path, help="a checkout of another commit of ours, which is one more side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--into", type=Path, default=DEFAULT_INTO, help="where setup.py put the environments")
    parser.add_argument("--work-dir", type=Path, default=HERE / ".work", help="checkpoints and converted files")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if args.model and args.model.suffix != GGUF_SUFFIX:
        parser.error(f"--model {args.model} must be a GGUF file; name a folder by --checkpoint")
    readers = GGUF_PEERS if args.model else tuple(PEERS)
    if unfit := set(args.peers or ()) - {*readers, BEFORE}:
        parser.error(f"{', '.join(sorted(unfit))} read no GGUF file; {', '.join(readers)} do")
    args.peers = args.peers or ([OURS] if args.before else list(readers))
    if args.before:
        if not (args.before / "benchmark" / "peers").is_dir():
            parser.error(f"--before {args.before} is no checkout of this repository")
        add_before(args.before)
        args.peers.append(BEFORE)
    # each side has its own working directory
    args.into, args.work_dir = args.into.resolve(), args.work_dir.resolve()
    args.checkpoint = args.checkpoint and args.checkpoint.resolve()
    args.model = args.model and args.model.resolve()
    return args


def subject_of(args: argparse.Namespace) -> Subject:
    if args.model:
        return of_gguf(args.model)
    return of_checkpoint(args.checkpoint or shape_checkpoint(args.shape, args.work_dir), args.precision)


def measure_ceilings(threads: int) -> dict[str, float]:
    """In a process of its own, so that it takes no memory and no threads from the sides."""
    command = [sys.executable, str(HERE / "ceilings.py"), "--threads", str(threads), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    ceilings = json.loads(done.stdout)
    print("ceilings: " + ", ".join(f"{name} {value:.1f}" for name, value in ceilings.items()), flush=True)
    return ceilings


def start(args: argparse.Namespace, subject: Subject, logs: Path) -> Run:
    """Loads all sides that have this precision, one after the other."""
    run = Run({}, {})
    for name in args.peers:
        peer = PEERS[name]
        if not peer.python(args.into).exists():
            run.left_out.append(f"{peer.title}: no environment; make it with setup.py {name} --into {args.into}")
            print(f"!! {run.left_out[-1]}", flush=True)
            run.failed = True
            continue
        side = open_side(peer, args, logs)
        run.sides[name] = side
        files = args.work_dir / "converted" / subject.name / name
        try:
            run.about[name] = side.load(Job(str(subject.path), subject.precision, args.threads, str(files)))
            print(f"{peer.title}: {run.about[name]}", flush=True)
        except NotOffered as why:
            run.left_out.append(f"{peer.title}: {why}")
            print(f"-- {run.left_out[-1]}", flush=True)
            run.sides.pop(name).close()
        except SideFailed as why:
            run.drop(name, str(why))
    return run


def open_side(peer: Peer, args: argparse.Namespace, logs: Path) -> Side:
    # -P: an adapter's own folder is not searched, where its name would hide the engine's
    command = [str(peer.python(args.into)), "-P", "-m", f"benchmark.peers.adapters.{peer.adapter}"]
    return Side(peer.name, command, peer.process_variables(args.into, args.threads), logs / f"{peer.name}.log")


def run_workload(run: Run, name: str, size: int, args: argparse.Namespace) -> None:
    """A warm-up for each side, which is not counted, then the rounds. Each round has prompts of its own."""
    workload = WORKLOADS[name]
    print(f"\n{name}: {workload.title}", flush=True)
    taking_part = warm_up(run, name, size)
    for number in range(1, args.rounds + 1):
        work = workload.work(size, seed=number)
        for side in [side for side in taking_part if side in run.sides]:
            try:
                timing = run.sides[side].run(work)
            except SideFailed as why:
                run.drop(side, str(why))
                continue
            figures = workload.measure(timing)
            for figure, value in figures.items():
                run.values.setdefault((name, figure), {}).setdefault(side, []).append(value)
            shown = ", ".join(f"{figure} {value:.2f} {FIGURES[figure].unit}" for figure, value in figures.items())
            print(f"  round {number}, {PEERS[side].title}: {shown}", flush=True)


def warm_up(run: Run, name: str, size: int) -> list[str]:
    """Those that have the workload."""
    work = WORKLOADS[name].work(size, seed=0, output_len=WARMUP_OUTPUT_LEN)
    taking_part = []
    for side in list(run.sides):
        try:
            run.sides[side].run(work)
            taking_part.append(side)
        except NotOffered as why:
            print(f"-- {PEERS[side].title}: {why}", flush=True)
        except SideFailed as why:
            run.drop(side, str(why))
    return taking_part


def report(
    args: argparse.Namespace, subject: Subject, run: Run, ceilings: list[dict[str, float]], peak: dict[str, int]
) -> None:
    best = {name: max(ceiling[name] for ceiling in ceilings) for name in ceilings[0]}
    rows: list[tuple[str, Comparison, float | None]] = []
    for (name, figure), rounds in run.values.items():
        comparison = compare(FIGURES[figure], rounds, OURS)
        rows.append((name, comparison, bound(name, FIGURES[figure], best, subject.size)))
    titles = {name: PEERS[name].title for name in args.peers if name in run.sides}
    print(f"\n{subject.name}, {subject.weights}, {args.threads} threads, medians of {args.rounds} rounds\n")
    print(table(rows, titles, OURS))
    print("\nCeilings (best of before and after): " + ", ".join(f"{name} {value:.1f}" for name, value in best.items()))
    for line in run.left_out:
        print(f"Left out: {line}")
    if args.json:
        args.json.write_text(json.dumps(record(args, subject, run, ceilings, rows, peak), indent=1) + "\n")


def record(
    args: argparse.Namespace,
    subject: Subject,
    run: Run,
    ceilings: list[dict[str, float]],
    rows: list[tuple[str, Comparison, float | None]],
    peak: dict[str, int],
) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "system": platform.platform(), "python": platform.python_version()},
        "checkpoint": subject.name,
        "precision": subject.precision,
        "weights": subject.weights,
        "threads": args.threads,
        "model": subject.size,
        "ceilings": ceilings,
        "sides": run.about,
        "peak_memory_bytes": peak,
        "left_out": run.left_out,
        "rows": [
            {
                "workload": name,
                "figure": comparison.figure.name,
                "unit": comparison.figure.unit,
                "rounds": run.values[name, comparison.figure.name],
                "medians": comparison.medians,
                "best_peer": comparison.best,
                "ratio": comparison.ratio,
                "ratios": comparison.ratios,
                "bound": limit,
            }
            for name, comparison, limit in rows
        ],
    }


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
