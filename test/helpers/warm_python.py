"""Python commands, run by forks of one process that has imported torch, transformers and this package: seconds less.

What a command finds is otherwise what a new interpreter gives it: arguments, folder, environment, ``sys.path``, output
and exit status. A test of what a command imports, of how a process is started, or of what ends with whom, starts an
interpreter of its own instead.

The process that has everything imported takes orders. For each it forks a keeper, which forks the process that runs the
command, and tells its exit status. All of them end with the test process.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 180
PARENT = "PARENT"  # among arguments: the process id of the parent, known only once the process runs
PRELOADED = (
    "rtp_llm.cli",
    "rtp_llm.srt.entrypoints.engine",
    "rtp_llm.srt.entrypoints.http_server",
    "rtp_llm.srt.engine.process",
    "rtp_llm.srt.worker.process",
)
LAZY = ("AutoModelForCausalLM", "AutoTokenizer", "GenerationMixin", "LlamaForCausalLM", "PreTrainedModel")


class WarmPython:
    """A process that runs ``python ARGUMENTS``, with the attributes of ``subprocess.Popen`` that are used of one.

    Args:
        arguments: ``-m MODULE ...``, ``-P -m MODULE ...`` or ``SCRIPT ...``.
        out, err: file descriptors of its stdout and stderr.
        inherited: file descriptors that it has under the same numbers.
        stdin: file descriptor of its stdin (default: there is nothing to read).
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        out: int,
        err: int,
        inherited: Sequence[int] = (),
        stdin: int | None = None,
    ) -> None:
        order = {"arguments": list(arguments), "folder": str(folder), "environment": dict(environment)}
        ours, theirs = socket.socketpair()
        with theirs, open(os.devnull, "rb") as nothing:
            fds = [theirs.fileno(), nothing.fileno() if stdin is None else stdin, out, err, *inherited]
            _warm_process().ask(order | {"inherited": list(inherited)}, fds)
        self._reports = ours.makefile("r")
        ours.close()
        pid = self._reports.readline()
        assert pid, "the process that has everything imported is gone; its stderr says why"
        self.pid = int(pid)
        self.returncode: int | None = None
        self._exit = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with self._reports:
            line = self._reports.readline()
        self.returncode = int(line) if line else -signal.SIGKILL  # of a keeper that was killed
        self._exit.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._exit.wait(timeout):
            raise subprocess.TimeoutExpired("python", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_python(
    arguments: Sequence[str], folder: Path = ROOT, path: Sequence[Path] = (), given: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` in ``folder``, and wait for its end. ``path``: more folders of modules; ``given``: what
    its standard input holds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        stdin.write(given)
        stdin.seek(0)
        process = WarmPython(arguments, folder, environment, out.fileno(), err.fileno(), stdin=stdin.fileno())
        try:
            process.wait(TIMEOUT_S)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(["python", *arguments], process.wait(), out.read(), err.read())


@contextmanager
def warm_children() -> Iterator[None]:
    """The processes that this process's engines start, cores and workers, are warm ones."""

    def popen(command: Sequence[str], pass_fds: Sequence[int], stdin: int, env: Mapping[str, str]) -> WarmPython:
        arguments = [*command[1:-1], PARENT]  # instead of this process
        return WarmPython(arguments, Path.cwd(), env, 1, 2, pass_fds)

    with patch("rtp_llm.srt.utils.process.subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL)):
        yield


class _WarmProcess:
    """The process that has everything imported. ``ask`` sends it an order."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._control, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            self._process = subprocess.Popen([sys.executable, __file__, str(fd)], pass_fds=[fd], env=environment)
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def ask(self, order: dict[str, Any], fds: list[int]) -> None:
        data = json.dumps(order).encode()
        with self._lock:
            socket.send_fds(self._control, [len(data).to_bytes(8)], fds)
            self._control.sendall(data)

    def stop(self) -> None:
        self._control.close()
        self._process.wait()


@cache
def _warm_process() -> _WarmProcess:
    return _WarmProcess()


def _next_order(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """An order, and the descriptors that came with it; None when no more will come."""
    header, fds, _, _ = socket.recv_fds(control, 8, 64)
    if not header:
        return None
    data = b""
    while len(data) < int.from_bytes(header):
        data += control.recv(1 << 20)
    return json.loads(data), fds


def _take_orders(control: socket.socket) -> dict[str, Any] | None:
    """Returns in every process that is to run a command, with the order, and at the end."""
    warm = os.getpid()
    keepers: set[int] = set()
    while (asked := _next_order(control)) is not None:
        order, fds = asked
        if (keeper := os.fork()) == 0:
            control.close()
            return _keep(order, fds, warm)
        for fd in fds:
            os.close(fd)
        keepers.add(keeper)
        keepers -= {ended for ended in keepers if os.waitpid(ended, os.WNOHANG)[0]}
    return None


def _keep(order: dict[str, Any], fds: list[int], warm: int) -> dict[str, Any]:
    """Return in a fork that is to run the command; tell its exit status from this process."""
    end_with_parent = import_module("rtp_llm.srt.utils.child").end_with_parent
    end_with_parent(warm)
    keeper, (report, *others) = os.getpid(), fds
    pid = os.fork()
    if pid == 0:
        end_with_parent(keeper)
        os.close(report)
        _give(others, [0, 1, 2, *order["inherited"]])
        return order
    for fd in others:
        os.close(fd)
    os.write(report, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _give(fds: list[int], numbers: list[int]) -> None:
    """Rename open descriptors. None of the old ones stays open."""
    above = 1 + max(*fds, *numbers)
    for i, fd in enumerate(fds):
        os.dup2(fd, above + i)
    for fd in fds:
        os.close(fd)
    for i, number in enumerate(numbers):
        os.dup2(above + i, number)
        os.close(above + i)


def _run(order: dict[str, Any], base_path: list[str]) -> None:
    """Make this process what a new interpreter would be, and run the command."""
    arguments = [str(os.getppid()) if word == PARENT else word for word in order["arguments"]]
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.orig_argv = [sys.executable, *arguments]
    is_safe = arguments[0] == "-P"
    arguments = arguments[is_safe:]
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [*path, *base_path]
    process = import_module("rtp_llm.srt.utils.process")
    process.subprocess = SimpleNamespace(Popen=_Fork, DEVNULL=subprocess.DEVNULL)  # type: ignore[attr-defined]
    _Fork.base_path = base_path
    if arguments[0] == "-m":
        if not is_safe:
            sys.path.insert(0, os.getcwd())
            sys.argv = ["-m", *arguments[2:]]
            import_module("rtp_llm")._leave_out_working_directory()
        sys.argv = arguments[1:]
        sys.modules.pop(arguments[1], None)  # runpy warns of a module that has been imported already
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


class _Fork(subprocess.Popen):
    """A child that a warm process starts: a fork as well, as long as the process has no threads but the one that
    starts children. Later ones are new interpreters."""

    base_path: list[str]

    def __init__(self, command: list[str], pass_fds: list[int], stdin: int, env: dict[str, str]) -> None:
        self._order = {"arguments": command[1:], "folder": os.getcwd(), "environment": env}
        self._fd = pass_fds[0]
        self._forks = threading.active_count() <= 2
        super().__init__(command, pass_fds=pass_fds, stdin=None if self._forks else stdin, env=env)

    def _execute_child(self, *arguments: Any) -> None:
        if not self._forks:
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        self.pid = os.fork()
        if self.pid == 0:
            _run_to_the_end(self._become)
        self._child_created = True

    def _become(self) -> None:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd in map(int, os.listdir("/dev/fd")):
            if fd > 2 and fd != self._fd:
                try:
                    os.close(fd)
                except OSError:  # the one that listed them
                    continue
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        _run(self._order, self.base_path)


def _run_to_the_end(run: Callable[[], None]) -> NoReturn:
    """Run the rest of a forked process, and end it as an interpreter ends, but that modules stay in memory: to free
    them takes seconds, as all of it would have to be copied first."""
    code = 0
    try:
        run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _main() -> None:
    base_path = [entry for entry in sys.path[1:] if entry != str(ROOT)]
    for lazy in LAZY:
        getattr(import_module("transformers"), lazy)
    for module in PRELOADED:
        import_module(module)
    gc.collect()
    gc.freeze()  # forks share what is not looked through
    order = _take_orders(socket.socket(fileno=int(sys.argv[1])))
    _run_to_the_end(lambda: None if order is None else _run(order, base_path))


if __name__ == "__main__":
    _main()
