"""Speed on GGUF files against llama.cpp: benchmark/peers/run.py on each file, both sides taking turns.

Beside the published models, which are small, stand files of the shape of Qwen3-0.6B with random weights.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmark.peers.make_gguf import TYPES, make_files
from benchmark.peers.peers import OURS, REPOSITORY
from benchmark.peers.workloads import WORKLOADS
from benchmark.published.results import Place, Record, kept, known

SECTION = "speed"
SHAPE = "0.6b"
LLAMA_CPP = "llama.cpp"


def random_files(place: Place) -> dict[str, Path]:
    """Return the files with random weights by their titles, made unless they are there."""
    files = make_files(SHAPE, TYPES, place.peers, place.work, place.threads)
    return {f"Qwen3-0.6B's shape, {name}": file for name, file in zip(TYPES, files, strict=True)}


def records(titles: Mapping[str, Path], place: Place) -> dict[str, Record]:
    """Return the record of each file by its title: of the workloads of ``place``, and of others that were measured."""
    found = {}
    for title, file in titles.items():
        parts = []
        for workload in WORKLOADS:
            name = f"{file.stem}-{workload}"
            if workload in place.workloads:
                parts.append(kept(place, SECTION, name, partial(measure, file, workload, place)))
            elif record := known(place, SECTION, name):
                parts.append(record)
        found[title] = {"parts": parts, "rows": [row for part in parts for row in part["run"]["rows"]]}
    return found


def measure(file: Path, workload: str, place: Place) -> Record:
    """Return what run.py records.

    Raises:
        subprocess.CalledProcessError: it failed, and has said why.
    """
    result = place.work / "speed.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(REPOSITORY / "benchmark" / "peers" / "run.py"), "--model", str(file)]
    command += ["--rounds", str(place.rounds), "--threads", str(place.threads), "--into", str(place.peers)]
    command += ["--workloads", workload]
    subprocess.run([*command, "--work-dir", str(place.work), "--json", str(result)], check=True, cwd=REPOSITORY)
    return {"run": json.loads(result.read_text())}


def table(records: Mapping[str, Record]) -> str:
    """Markdown, of the records of files by their titles."""
    lines = ["| | | rounds | ours | llama.cpp | ours / llama.cpp |", "|---|---|---|---|---|---|"]
    for title, record in records.items():
        for row in record["rows"]:
            ratios = row["ratios"]
            medians = [f"{row['medians'][side]:.4g}" for side in (OURS, LLAMA_CPP)]
            spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
            cells = [
                title,
                f"{row['workload']} {row['figure']}, {row['unit']}",
                str(len(ratios)),
                *medians,
                f"{row['ratio']:.2f}{spread}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
