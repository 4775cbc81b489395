"""Python commands, run by forks of one process that has imported torch and transformers: seconds less for each.

What a command finds is otherwise what a new interpreter gives it: arguments, folder, environment, output and exit
status. A test of what a command imports, or of processes and signals, starts an interpreter of its own instead.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 180


def run_python(arguments: Sequence[str], folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS``, where they begin with ``-m MODULE`` or the path of a script."""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as outputs:
        out, err = Path(outputs, "out"), Path(outputs, "err")
        order = {"arguments": list(arguments), "folder": str(folder), "environment": environment}
        returncode = _warm_process().ask(order | {"out": str(out), "err": str(err)})
        return subprocess.CompletedProcess(["python", *arguments], returncode, out.read_text(), err.read_text())


class _WarmProcess:
    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        atexit.register(self.stop)

    def ask(self, order: dict[str, Any]) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.communicate()  # its input ends, and so does it


@cache
def _warm_process() -> _WarmProcess:
    return _WarmProcess()


def _become(order: dict[str, Any]) -> None:
    """Make this fork what a new interpreter would be, and run the command."""
    signal.alarm(TIMEOUT_S)  # which ends it if it has not ended by then
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    for target, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, order["out"], os.O_WRONLY | os.O_CREAT),
        (2, order["err"], os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(name, flags, 0o600), target)
    arguments = order["arguments"]
    if arguments[0] == "-m":
        sys.path[0] = order["folder"]
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _serve() -> None:
    for lazy in ("AutoModelForCausalLM", "AutoTokenizer", "GenerationMixin", "LlamaForCausalLM", "PreTrainedModel"):
        getattr(import_module("transformers"), lazy)
    import_module("rtp_llm.srt.entrypoints.engine")
    for line in sys.stdin.buffer:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(order)
            return
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
