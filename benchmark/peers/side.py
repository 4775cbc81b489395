"""An engine's process as run.py sees it."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark.peers.process import ProcessGroup
from benchmark.peers.protocol import Job, NotOffered, Timing, Work


class Side:
    """An adapter that runs in its engine's environment, and speaks the protocol."""

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self.group = ProcessGroup(
            name, command, variables, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        process = self.group.process
        assert process.stdin is not None and process.stdout is not None  # both are pipes
        self._questions, self._answers = process.stdin, process.stdout

    def load(self, job: Job) -> dict[str, str]:
        """What the engine tells about itself. Raises NotOffered, SideFailed."""
        return self._ask({"do": "load", "job": asdict(job)})

    def run(self, work: Work) -> Timing:
        """Raises NotOffered, SideFailed."""
        return Timing(**self._ask({"do": "run", "work": asdict(work)}))

    def close(self) -> None:
        self.group.end()
        self._answers.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        with self.group.awake():
            try:
                self._questions.write(json.dumps(question) + "\n")
                self._questions.flush()
            except BrokenPipeError:
                raise self.group.failure("its process ended") from None
            line = self._answers.readline()
        if not line:
            raise self.group.failure(f"its process ended with status {self.group.process.wait()}")
        answer = json.loads(line)
        if "not_offered" in answer:
            raise NotOffered(answer["not_offered"])
        if "error" in answer:
            raise self.group.failure(answer["error"])
        return answer["ok"]
