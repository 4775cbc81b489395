"""Ask a server for its health again and again, from a process of its own, and say how long each answer took.

    python health_watch.py HOST PORT INTERVAL_S

writes a line of JSON for each question: when it was answered (seconds since the epoch), how long that took, the status
(0: none came), and how late this process itself was woken, which tells how busy the machine is.
"""

import http.client
import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Look:
    at_s: float
    took_s: float
    status: int
    late_s: float


def watch(host: str, port: int, interval_s: float) -> None:
    next_s = time.monotonic()
    while True:
        next_s = max(next_s + interval_s, time.monotonic())
        time.sleep(max(0.0, next_s - time.monotonic()))
        start_s = time.monotonic()
        status = ask(host, port)
        print(json.dumps([time.time(), time.monotonic() - start_s, status, start_s - next_s]), flush=True)


def ask(host: str, port: int) -> int:
    """The status; 0 if there is none. Each question has a connection of its own, as those of load balancers have."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health", headers={"Connection": "close"})
        response = connection.getresponse()
        response.read()
        return response.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


class HealthWatch:
    """The watching process, as a context. ``looks`` reads what it has written to ``file`` so far."""

    def __init__(self, file: Path, address: tuple[str, int], interval_s: float) -> None:
        self._file = file
        self._command = [sys.executable, "-I", __file__, address[0], str(address[1]), str(interval_s)]

    def __enter__(self) -> "HealthWatch":
        with self._file.open("ab") as output:
            self._process = subprocess.Popen(self._command, stdout=output)
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()

    def looks(self) -> list[Look]:
        lines = self._file.read_text().splitlines(keepends=True)
        return [Look(*json.loads(line)) for line in lines if line.endswith("\n")]


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        watch(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
