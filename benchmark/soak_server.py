"""A server for a soak: started, watched, killed, and looked for afterwards."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

MARK = "RTP_LLM_SOAK"  # an environment variable that the server's processes, and theirs, have
SCRATCH = "rtp-llm-*"
CORE_MODULE = b"rtp_llm.srt.engine.process"
READY_WITHIN_S = 300.0
STOPPED_WITHIN_S = 90.0
GONE_WITHIN_S = 10.0


class ServerFailed(Exception):
    """The server did not do what a server must, so that the run cannot go on."""


class SoakServer:
    """One server after the other at the same port, in a folder of their own. ``starts`` counts them."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.address = ("127.0.0.1", free_port())
        self.log = folder / "server.log"
        self.scratch = folder / "t"  # a short name: sockets lie below it
        self.scratch.mkdir()
        self._mark = uuid4().hex
        self._command = [
            sys.executable,
            "-m",
            "rtp_llm",
            "serve",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.address[1]),
        ]
        self._command += arguments
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    @property
    def http_pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> float:
        """Starts one and waits until it is ready; returns the seconds that took. Raises ServerFailed."""
        start_s = time.monotonic()
        environment = os.environ | {MARK: self._mark, "TMPDIR": str(self.scratch)}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, cwd=self.log.parent
            )
        self.starts += 1
        self.wait_ready()
        return time.monotonic() - start_s

    def wait_ready(self) -> None:
        assert self._process is not None
        deadline_s = time.monotonic() + READY_WITHIN_S
        while health_status(self.address) != 200:
            if self._process.poll() is not None:
                raise ServerFailed(f"the server ended with status {self._process.returncode}; see {self.log}")
            if time.monotonic() > deadline_s:
                raise ServerFailed(f"the server was not ready within {READY_WITHIN_S:g} s; see {self.log}")
            time.sleep(0.1)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def core_pid(self) -> int | None:
        """The core's process; None while there is none."""
        return next((pid for pid in self.processes() if parent_of(pid) == self.http_pid and is_core(pid)), None)

    def processes(self) -> list[int]:
        """All that was started for this soak and lives, whoever its parent is now."""
        wanted = f"{MARK}={self._mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def scratch_folders(self) -> set[str]:
        return {str(path) for path in self.scratch.glob(SCRATCH)}

    def kill_core(self) -> int | None:
        """Kills it as the system would for want of memory; None if there is none at the moment."""
        pid = self.core_pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pid

    def kill_http(self) -> list[str]:
        """Kills the HTTP process; what is still there GONE_WITHIN_S later."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        return self._left_over()

    def stop(self) -> list[str]:
        """Ends the server as an operator does; what went wrong, or is left."""
        assert self._process is not None
        if self._process.poll() is not None:
            return [f"the server had ended with status {self._process.returncode}", *self._left_over()]
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return [f"the server did not end within {STOPPED_WITHIN_S:g} s of SIGTERM", *self._left_over()]
        problems = [] if status == 0 else [f"SIGTERM ended the server with status {status}, not 0"]
        problems += [f"temporary folders are left: {sorted(left)}"] if (left := self.scratch_folders()) else []
        return problems + self._left_over()

    def end(self) -> None:
        """Makes sure that nothing of it runs."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def _left_over(self) -> list[str]:
        deadline_s = time.monotonic() + GONE_WITHIN_S
        while (problems := self._present()) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return problems

    def _present(self) -> list[str]:
        problems = [f"processes are left: {pids}"] if (pids := self.processes()) else []
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(self.address)
            except OSError as error:
                problems.append(f"port {self.address[1]} is in use: {error}")
        return problems


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float  # since the epoch
    role: str  # "HTTP" or "core"
    pid: int
    num_bytes: int


class MemoryWatch(threading.Thread):
    """Resident bytes of the server's processes, every few seconds."""

    def __init__(self, server: SoakServer, interval_s: float) -> None:
        super().__init__(daemon=True)
        self._server, self._interval_s = server, interval_s
        self._stopped = threading.Event()
        self.samples: list[Sample] = []

    def run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            for role, pid in (("HTTP", self._server.http_pid), ("core", self._server.core_pid())):
                if pid is not None and (num_bytes := resident_bytes(pid)):
                    self.samples.append(Sample(time.time(), role, pid, num_bytes))

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def resident_bytes(pid: int) -> int:
    """0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def is_core(pid: int) -> bool:
    """By its command line; a worker of --tp-size has another."""
    try:
        return CORE_MODULE in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def health_status(address: tuple[str, int]) -> int:
    connection = http.client.HTTPConnection(*address, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()
