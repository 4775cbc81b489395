"""Processes of our own: whose modules they import, and when they end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import rtp_llm
from rtp_llm.srt.utils import process
from rtp_llm.srt.utils.ipc import receive

ROOT = Path(__file__).resolve().parents[3]
PLANTED = ("zmq", "msgspec", "torch", "transformers", "json", "argparse", "nowhere_else")

PROBE = """
import importlib.util, os, sys, time
from multiprocessing.connection import Connection
from rtp_llm.srt.utils.ipc import send

def main(fd):
    found = {name: getattr(importlib.util.find_spec(name), "origin", None) for name in sys.argv[4:] or NAMES}
    send(Connection(fd), (os.getpid(), found))
    time.sleep(60)
"""

PARENT = """
import sys, threading, time
from rtp_llm.srt.utils.ipc import receive
from rtp_llm.srt.utils.process import start_python

started = []
thread = threading.Thread(target=lambda: started.append(start_python("probe")))
thread.start()
thread.join()
print(*receive(started[0].pipe), sep="\\n", flush=True)
time.sleep(60)
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """A folder with a script that starts a child, whose module lies beside it."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "probe.py").write_text(PROBE.replace("NAMES", repr(PLANTED)))
    (folder / "parent.py").write_text(PARENT)
    return folder


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder such as a checkpoint's, with files that are named like modules, which tell when they are imported."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in PLANTED:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'told')!r}, 'a').write({name!r})\n")
    return folder


def environment(*path: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}


@contextmanager
def running(command: list[str], folder: Path, *path: Path) -> Iterator[tuple[subprocess.Popen[str], int, dict]]:
    """(the parent, its child's process id, where the child finds the planted names)"""
    parent = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment(*path), stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        yield parent, int(parent.stdout.readline()), eval(parent.stdout.readline())
    finally:
        parent.kill()
        parent.communicate()


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.01)


@pytest.mark.parametrize("interactive", [False, True])
def test_a_child_imports_nothing_from_the_working_directory(scripts: Path, planted: Path, interactive: bool) -> None:
    """But what lies beside the script. In an interactive session the working directory counts, behind all else."""
    command = ["-c", PARENT] if interactive else [str(scripts / "parent.py")]
    with running(command, planted, scripts) as (_, _, found):
        places = {name: Path(origin).parent for name, origin in found.items() if origin and origin != "built-in"}
    here = {name for name, place in places.items() if place == planted}
    assert here == ({"nowhere_else"} if interactive else set())
    assert not (planted.parent / "told").exists() or interactive


@pytest.mark.parametrize("module", ["rtp_llm", "rtp_llm.launch_server"])
def test_our_commands_import_nothing_from_the_working_directory(planted: Path, module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=planted, env=environment(), capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not (planted.parent / "told").exists()


@pytest.mark.parametrize(
    ("command", "variable", "place"),
    [
        (["-m", "rtp_llm.launch_server", "x"], "", None),
        (["-mrtp_llm", "x"], "", None),
        (["-m", "rtp_llm", "x"], "nowhere_else", -1),
        (["-m", "rtp_llm", "x"], "other, nowhere_else.models", -1),
        (["-m", "rtp_llm", "x"], "other", None),
        (["-m", "pytest", "x"], "nowhere_else", 0),  # a program of somebody else's
        (["script.py", "x"], "", 0),
    ],
)
def test_where_the_working_directory_counts(
    planted: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], variable: str, place: int | None
) -> None:
    monkeypatch.chdir(planted)
    monkeypatch.setenv("RTP_LLM_EXTERNAL_MODEL_PACKAGE", variable)
    monkeypatch.setattr(sys, "path", [str(planted), "/site-packages"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", *command])
    monkeypatch.setattr(sys, "argv", ["-m" if command[0].startswith("-m") else command[0], "x"])
    rtp_llm._leave_out_working_directory()
    expected = ["/site-packages"]
    if place is not None:
        expected.insert(0 if place == 0 else len(expected), str(planted))
    assert sys.path == expected


def test_a_source_checkout_counts(tmp_path: Path) -> None:
    """The folder that this package itself lies in is no stranger's."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "rtp_llm").symlink_to(ROOT / "rtp_llm")
    command = [sys.executable, "-m", "rtp_llm", "--version"]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=checkout, env=bare, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("rtp-llm "), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do this")
def test_a_stopped_child_ends_with_its_parent(scripts: Path) -> None:
    """It does, though the thread that asked for it has ended long before, and it notices nothing itself."""
    with running([str(scripts / "parent.py")], scripts) as (parent, child, _):
        os.kill(child, signal.SIGSTOP)
        parent.kill()
        wait_for_end(child)


def test_a_child_outlives_the_thread_that_started_it(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(scripts))
    started: list[process.StartedPython] = []
    thread = threading.Thread(target=lambda: started.append(process.start_python("probe")))
    thread.start()
    thread.join()
    receive(started[0].pipe)
    time.sleep(0.1)
    assert started[0].process.poll() is None
    started[0].discard()


def test_a_child_of_a_dead_parent_ends(scripts: Path) -> None:
    """One whose parent died before the child could ask to be told."""
    command = [sys.executable, "-P", "-m", "rtp_llm.srt.utils.child", "probe", "0", str(os.getpid() + 100_000)]
    assert subprocess.run(command, env=environment(scripts), timeout=30).returncode == 1


def test_a_forked_process_starts_children(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(scripts))
    process.start_python("probe").discard()  # now there is a thread that starts them, which a fork does not have
    code = os.fork()
    if code == 0:
        try:
            child = process.start_python("probe")
            receive(child.pipe)
            child.discard()
        finally:
            os._exit(0 if "child" in locals() else 1)
    assert os.waitpid(code, 0)[1] == 0
