"""Replicas of a server behind a router of others, each in a process of its own, for measurements and for chaos."""

import contextlib
import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmark.soak_server import ServerFailed, SoakServer, free_port, health_status

READY_WITHIN_S = 180.0
MODULES = {"vllm-router": "vllm_router", "smg": "smg"}
ADD_WITHIN_S = 30.0


class NotAdded(Exception):
    """The router did not take a replica."""


class Router:
    """One router after the other at the same port. ``name``: a key of ``MODULES``.

    ``urls``: the replicas that it was told of.
    """

    def __init__(self, name: str, folder: Path, urls: Sequence[str], policy: str, *more: str) -> None:
        if importlib.util.find_spec(MODULES[name]) is None:
            raise ServerFailed(f"{name} is not installed: pip install {name}")
        self.address = ("127.0.0.1", free_port())
        self.log = folder / "router.log"
        self.urls, self._name = list(urls), name
        launch = ["vllm_router.launch_router"] if name == "vllm-router" else ["smg", "launch"]
        self._command = [sys.executable, "-m", *launch, "--host", "127.0.0.1", "--port", str(self.address[1])]
        self._command += ["--policy", policy, "--prometheus-port", str(free_port()), *more]
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, urls: Sequence[str] | None = None) -> None:
        """Start one for these replicas (None: for the same), and wait until it is ready: all of them must answer
        first. Raises ServerFailed."""
        self.urls = self.urls if urls is None else list(urls)
        command = [*self._command, "--worker-urls", *self.urls]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.log.parent, start_new_session=True
            )
        self.starts += 1
        deadline_s = time.monotonic() + READY_WITHIN_S
        while health_status(self.address) != 200:
            if self._process.poll() is not None:
                raise ServerFailed(f"the router ended with status {self._process.returncode}; see {self.log}")
            if time.monotonic() > deadline_s:
                raise ServerFailed(f"the router was not ready within {READY_WITHIN_S:g} s; see {self.log}")
            time.sleep(0.1)

    def add(self, url: str) -> None:
        """Tell it of one more replica. Raises NotAdded."""
        connection = http.client.HTTPConnection(*self.address, timeout=ADD_WITHIN_S)
        try:
            if self._name == "vllm-router":
                connection.request("POST", f"/add_worker?url={url}")
            else:
                connection.request("POST", "/workers", json.dumps({"url": url}), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise NotAdded(f"{self._name} does not answer: {error}") from error
        finally:
            connection.close()
        if answer.status >= 300:
            raise NotAdded(f"{self._name} answers {answer.status}: {said[:200]!r}")
        self.urls.append(url)

    def kill(self) -> None:
        """Kill it, and what it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def start_replicas(
    folder: Path, count: int, arguments: Sequence[str], own: Sequence[Sequence[str]] = ()
) -> list[SoakServer]:
    """Start servers, one after the other. ``own``: further arguments of each."""
    replicas = []
    for number in range(count):
        place = folder / f"r{number}"
        place.mkdir()
        replicas.append(SoakServer(place, [*arguments, *(own[number] if own else ())]))
    try:
        for replica in replicas:
            replica.start()
    except BaseException:
        end(replicas)
        raise
    return replicas


def url_of(replica: SoakServer) -> str:
    return "http://{}:{}".format(*replica.address)


def end(replicas: Sequence[SoakServer]) -> None:
    for replica in replicas:
        replica.end()
