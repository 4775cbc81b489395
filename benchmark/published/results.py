"""What was measured: kept as JSON, a file for each part, so that an interrupted run goes on where it was."""

import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmark.peers.peers import REPOSITORY
from benchmark.peers.workloads import WORKLOADS

Record = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where everything lies, and with how many threads all sides compute.

    Args:
        models: folder of the GGUF files.
        work: folder of results and of what is made on the way.
        peers: where benchmark/peers/setup.py put llama.cpp.
        data: folder with gsm8k/test.jsonl and mmlu; None: they are downloaded.
        again: measure anew what was measured before.
        workloads: those of benchmark/peers that are measured.
    """

    models: Path
    work: Path
    peers: Path
    data: Path | None
    threads: int
    rounds: int
    again: bool
    workloads: tuple[str, ...] = tuple(WORKLOADS)

    @property
    def references(self) -> Path:
        return self.work / "reference"


def kept(place: Place, section: str, name: str, measure: Callable[[], Record]) -> Record:
    """Return the record of a part: the one that is there, unless all is measured again, else a new one."""
    if not place.again and (record := known(place, section, name)):
        print(f"{section}, {name}: kept from {record['date']}; --again measures it anew", flush=True)
        return record
    print(f"{section}, {name} ...", flush=True)
    record = about() | measure()
    file = record_file(place, section, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.rename(file)
    return record


def known(place: Place, section: str, name: str) -> Record | None:
    """Return the record of a part that was measured before."""
    file = record_file(place, section, name)
    return json.loads(file.read_text()) if file.exists() else None


def record_file(place: Place, section: str, name: str) -> Path:
    return place.work / "results" / section / f"{name}.json"


def about() -> Record:
    """Return when and where, and of which commit ("+": with changes)."""
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "cpu": cpu_name(), "commit": commit()}


def commit() -> str:
    """Return the commit that is measured. The page of results is no change of it: each section writes its table."""
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs/published_models.md")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changes else "")


def git(*arguments: str) -> str:
    """Return what a command prints; empty where this is no clone."""
    return subprocess.run(["git", *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True).stdout.strip()


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
