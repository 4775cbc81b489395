"""A server of ours on a file, for as long as something is asked."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmark.peers.peers import REPOSITORY
from benchmark.startup import MemorySampler, free_port, is_ready, stop, wait_for

SAMPLE_S = 0.05  # between two looks at the memory


@dataclass(frozen=True)
class Served:
    """``memory`` has seen nothing unless the server is watched."""

    port: int
    log: Path
    memory: MemorySampler


@contextmanager
def serving(file: Path, options: Sequence[str], log: Path, watched: bool = False) -> Iterator[Served]:
    """A server that is ready. ``watched``: its memory is sampled from its start to its end, which takes it time."""
    port = free_port()
    command = [sys.executable, "-m", "rtp_llm", "serve", "--model-path", str(file), "--host", "127.0.0.1"]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options], stdout=output, stderr=output, env=variables
        )
    sampler = MemorySampler(process.pid, SAMPLE_S)
    if watched:
        sampler.start()
    try:
        wait_for(lambda: is_ready(port), "becoming ready", process, log)
        yield Served(port, log, sampler)
    finally:
        if watched:
            sampler.stop()
        stop(process)
