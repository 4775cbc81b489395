"""GSM8K and MMLU: our server on the GGUF file, and transformers in float32 on its own reading, the same questions.

Each run of each side is kept by itself, since together they take long.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmark.compare_answers import differing
from benchmark.peers.peers import REPOSITORY
from benchmark.published.models import PublishedModel
from benchmark.published.results import Place, Record, about, kept
from benchmark.published.server import serving

BATCH_SIZE = 32  # of transformers


@dataclass(frozen=True)
class Evaluation:
    name: str
    title: str
    data: str  # below the data folder
    options: tuple[str, ...]


EVALUATIONS = (
    Evaluation(
        "gsm8k", "GSM8K", "gsm8k/test.jsonl", ("--num-questions", "200", "--num-shots", "2", "--max-new-tokens", "160")
    ),
    Evaluation("mmlu", "MMLU", "mmlu", ("--num-questions", "500", "--ntrain", "1")),
)
THEIRS = "transformers, float32"
OURS = {"rtp_llm, float32": ("--dtype", "float32"), "rtp_llm, the file's bits": ()}


def measure(model: PublishedModel, file: Path, folder: Path, place: Place) -> Record:
    """Return the record of each evaluation and side, of which those that are there are kept."""
    rows, parts = [], []
    for evaluation in EVALUATIONS:
        name = f"{model.stem}-{evaluation.name}"
        by_side = {THEIRS: kept(place, "answers", f"{name}-transformers", partial(theirs, evaluation, folder, place))}
        for side, options in OURS.items():
            part = f"{name}-{'float32' if options else 'packed'}"
            by_side[side] = kept(place, "answers", part, partial(ours, evaluation, file, options, place))
        rows.append({"evaluation": evaluation.title, "options": evaluation.options, "sides": compared(by_side)})
        parts += [{name: record[name] for name in about()} for record in by_side.values()]
    return {"evaluations": rows, "parts": parts}


def theirs(evaluation: Evaluation, folder: Path, place: Place) -> Record:
    options = ["--model-path", str(folder), "--dtype", "float32", "--batch-size", str(BATCH_SIZE), "--device", "cpu"]
    return run(evaluation, "bench_hf.py", options, place)


def ours(evaluation: Evaluation, file: Path, options: Sequence[str], place: Place) -> Record:
    with serving(file, ["--device", "cpu", *options], place.work / "server.log") as served:
        return run(evaluation, "bench_rtp_llm.py", ["--port", str(served.port)], place)


def run(evaluation: Evaluation, script: str, options: Sequence[str], place: Place) -> Record:
    """Run a script of an evaluation; return its record, and every answer.

    Raises:
        subprocess.CalledProcessError: it failed, and has said why.
    """
    with tempfile.TemporaryDirectory(dir=place.work) as folder:
        result, answers = Path(folder, "result.jsonl"), Path(folder, "answers.jsonl")
        command = [sys.executable, str(REPOSITORY / "benchmark" / evaluation.name / script), *evaluation.options]
        command += [*options, "--result-filename", str(result), "--answers", str(answers)]
        if place.data is not None:
            command += ["--data-path", str(place.data / evaluation.data)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        if done.returncode:
            print(done.stdout, file=sys.stderr)  # which requests failed, and why
        done.check_returncode()
        record = json.loads(result.read_text())
        del record["date"]  # a part has a date of its own
        return record | {"answers": answers.read_text()}


def compared(by_side: Mapping[str, Record]) -> list[Record]:
    """Return each side's figures, and how many questions it answers as transformers does."""
    expected = answers_of(by_side[THEIRS])
    rows = []
    for side, record in by_side.items():
        differ = differing(answers_of(record), expected)
        figures = {name: record[name] for name in ("correct", "answered", "failed")}
        equal = {f"same_{name}": record["answered"] - len(differ[name]) for name in ("text", "answer")}
        rows.append({"side": side, "date": record["date"]} | figures | equal)
    return rows


def answers_of(record: Record) -> dict[str, Record]:
    return {row["name"]: row for row in map(json.loads, record["answers"].splitlines())}


def table(records: Mapping[str, Record]) -> str:
    """Markdown, of the records of models by their titles."""
    lines = ["| | | right | of | same text as transformers | same answer |", "|---|---|---|---|---|---|"]
    for title, record in records.items():
        for evaluation in record["evaluations"]:
            for row in evaluation["sides"]:
                cells = [f"{title}, {evaluation['evaluation']}", row["side"], row["correct"], row["answered"]]
                cells += [row["same_text"], row["same_answer"]]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
