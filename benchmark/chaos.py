"""Kills ranks, cores, replicas, nodes and the router at random while clients ask, and looks for what must not happen.

    python -m benchmark.chaos --minutes 20

Some replicas of the embedded model run behind a router. Each client asks one request after the other, half of them as
streams, and compares every answer with the one that the model gave before anything was killed. Every few seconds
something is killed with SIGKILL: a rank's worker process (with --pp-size 2), a core, a replica's HTTP process, a node
(all processes of a replica at once, as if its machine had lost power), or the router. What a replica restarts by itself
is left to it. A replica or a router that has ended is started again, and the router is told of replicas once they are
ready, as an orchestrator would.

A request may end by an error: its connection was to what was killed. It may not end by a wrong answer, nor not end. The
memory of each kind of process must not grow from one half of the run to the other.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import httpx

from benchmark.fleet import NotAdded, Router, end, start_replicas, url_of
from benchmark.soak_server import ServerFailed, SoakServer, health_status, resident_bytes
from rtp_llm.srt.configs.server_args import DEMO_MODEL

MODEL = "chaos"
KINDS = ("rank", "core", "replica", "node", "router")
WORKER_MODULE = b"rtp_llm.srt.worker.process"
HUNG_AFTER_S = 180.0
GROWTH = 1.3  # of the median memory of a kind of process, from the first half of a run to the second


class Fleet:
    """The replicas and their router, each of which is started again when it has ended."""

    def __init__(self, replicas: list[SoakServer], router: Router) -> None:
        self.replicas, self.router = replicas, router
        self.restarts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.not_added: Counter[str] = Counter()  # why the router did not take a replica
        self._hit: set[SoakServer | Router] = set()  # of which something was killed since they were last started
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._keep_up_replica, args=(replica,)) for replica in replicas]
        self._threads.append(threading.Thread(target=self._keep_up_router))

    def start(self) -> None:
        self.router.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self.router.kill()
        end(self.replicas)

    def ready(self) -> list[str]:
        """Return the URLs of the replicas that take requests."""
        return [url_of(each) for each in self.replicas if each.is_running() and health_status(each.address) == 200]

    def _keep_up_replica(self, replica: SoakServer) -> None:
        while not self._ended.wait(0.5):
            if not replica.is_running():
                replica.end()  # what its HTTP process has left
                self._start_again("replica", replica, replica.start)

    def _keep_up_router(self) -> None:
        """A router that is started waits for all replicas that it is told of, so it is told of the others later."""
        while not self._ended.wait(0.5):
            ready = self.ready()
            if not self.router.is_running():
                if ready:
                    self._start_again("router", self.router, partial(self.router.start, ready))
                continue
            for url in ready:
                if url not in self.router.urls:
                    try:
                        self.router.add(url)
                    except NotAdded as error:  # either may have been killed since: it is tried again
                        self.not_added[str(error)[:100]] += 1

    def _start_again(self, kind: str, member: SoakServer | Router, start: Callable[[], None]) -> None:
        try:
            self._hit.discard(member)
            start()
            self.restarts[kind] += 1
        except ServerFailed as error:
            # A server ends if its core or a rank is killed while it is starting.
            if member.is_running() or member not in self._hit:
                self.problems.append(str(error))

    def kill(self, kind: str, draw: random.Random) -> bool:
        """Kill one of a kind; return whether there was one."""
        if kind == "router":
            self._hit.add(self.router)
            self.router.kill()
            return True
        replica = draw.choice(self.replicas)
        if not replica.is_running():
            return False
        pids = {
            "replica": [replica.http_pid],
            "node": replica.processes(),
            "core": [pid for pid in [replica.core_pid()] if pid is not None],
            "rank": [pid for pid in replica.processes() if is_worker(pid)],
        }[kind]
        if not pids:
            return False
        self._hit.add(replica)
        for pid in pids if kind == "node" else [draw.choice(pids)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return True


def is_worker(pid: int) -> bool:
    try:
        return WORKER_MODULE in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


class Client(threading.Thread):
    """Asks one request after the other."""

    def __init__(self, number: int, url: str, expected: dict[str, str], ended: threading.Event) -> None:
        super().__init__(name=f"client-{number}")
        self._draw = random.Random(number)
        self._url, self._expected, self._ended = url, expected, ended
        self._http = http_client()
        self.counts: Counter[str] = Counter()
        self.answered_s: list[float] = []  # when right answers came
        self.problems: list[str] = []

    def run(self) -> None:
        with self._http:
            self._ask_until_the_end()

    def _ask_until_the_end(self) -> None:
        while not self._ended.is_set():
            prompt, stream = self._draw.choice(list(self._expected)), self._draw.random() < 0.5
            start_s = time.monotonic()
            try:
                text = ask(self._http, self._url, prompt, stream)
            except httpx.TimeoutException:
                self.problems.append(f"hung: no answer to {prompt!r} within {time.monotonic() - start_s:.0f} s")
                continue
            except (httpx.HTTPError, Refused) as error:
                self.counts[f"{type(error).__name__} {error}"[:60]] += 1
                self._ended.wait(0.2)
                continue
            if text == self._expected[prompt]:
                self.counts["streamed" if stream else "whole"] += 1
                self.answered_s.append(time.monotonic())
            else:
                self.problems.append(f"wrong: {prompt!r} gave {text!r}, not {self._expected[prompt]!r}")


class Refused(Exception):
    """The answer is an error, or a stream that broke off with one."""


def http_client() -> httpx.Client:
    """Return a client for plain HTTP. Without ``verify=False`` each reads the certificates of all authorities, which
    takes long enough that clients who are refused and ask again leave no time for servers to start."""
    return httpx.Client(verify=False, trust_env=False, timeout=httpx.Timeout(HUNG_AFTER_S, connect=10))


def ask(http: httpx.Client, url: str, prompt: str, stream: bool) -> str:
    """Return the greedy text after a prompt.

    Raises:
        Refused, httpx.HTTPError: there is none.
    """
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 32, "temperature": 0, "ignore_eos": True, "stream": stream}
    with http.stream("POST", f"{url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            raise Refused(str(response.status_code))
        if not stream:
            return json.loads(response.read())["choices"][0]["text"]
        text, is_done = "", False
        for line in response.iter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise Refused("error event")
                text += "".join(choice["text"] for choice in event["choices"])
        if not is_done:
            raise Refused("stream without its end")
        return text


class Memory(threading.Thread):
    """Resident bytes of each kind of process, every few seconds."""

    def __init__(self, fleet: Fleet, ended: threading.Event) -> None:
        super().__init__(daemon=True)
        self._fleet, self._ended = fleet, ended
        self.samples: dict[str, list[int]] = {"http": [], "core": [], "rank": []}

    def run(self) -> None:
        while not self._ended.wait(3):
            for replica in self._fleet.replicas:
                if replica.is_running():
                    self._note("http", replica.http_pid)
                    self._note("core", replica.core_pid())
                    for pid in replica.processes():
                        if is_worker(pid):
                            self._note("rank", pid)

    def _note(self, kind: str, pid: int | None) -> None:
        if pid is not None and (num_bytes := resident_bytes(pid)):
            self.samples[kind].append(num_bytes)

    def report(self) -> tuple[list[str], list[str]]:
        """Return a line for each kind, and what has grown too much."""
        lines, problems = [], []
        for kind, samples in self.samples.items():
            half = len(samples) // 2
            if half < 5:
                continue
            first, second = statistics.median(samples[:half]), statistics.median(samples[half:])
            lines.append(
                f"memory of {kind}: {first / 2**20:.0f} MiB, then {second / 2**20:.0f} MiB (medians of halves)"
            )
            if second > GROWTH * first:
                problems.append(f"the memory of {kind} grew from {first / 2**20:.0f} to {second / 2**20:.0f} MiB")
        return lines, problems


def words(draw: random.Random) -> str:
    return " ".join(draw.choice(("the", "cat", "dog", "two", "plus", "red", "is", "a")) for _ in range(40))


def run(args: argparse.Namespace, folder: Path) -> list[str]:
    """Return the problems that were found."""
    flags = ["--model-path", args.model_path, "--served-model-name", MODEL, "--log-level", "warning"]
    flags += ["--device", "cpu", "--max-total-tokens", "16384", "--tp-size", str(args.tp_size)]
    flags += ["--pp-size", str(args.pp_size)]
    replicas = start_replicas(folder, args.replicas, flags)
    fleet = Fleet(replicas, Router(args.router, folder, [url_of(r) for r in replicas], "cache_aware"))
    draw, ended = random.Random(args.seed), threading.Event()
    kills: Counter[str] = Counter()
    try:
        with http_client() as http:
            url, prompts = url_of(replicas[0]), {words(draw) for _ in range(40)}
            expected = {prompt: ask(http, url, prompt, False) for prompt in prompts}
        fleet.start()
        memory = Memory(fleet, ended)
        clients = [Client(number, fleet.router.url, expected, ended) for number in range(args.clients)]
        for thread in (memory, *clients):
            thread.start()
        start_s = time.monotonic()
        deadline_s = start_s + 60 * args.minutes
        kinds = [kind for kind in KINDS if kind != "rank" or args.tp_size * args.pp_size > 1]
        while time.monotonic() < deadline_s:
            time.sleep(draw.uniform(0.5, 1.5) * args.every_s)
            kind = draw.choice(kinds)
            kills[kind] += fleet.kill(kind, draw)
        end_s = time.monotonic()
        problems = finish(clients, ended) + fleet.problems
        gap_s = longest_gap(start_s, [at for client in clients for at in client.answered_s if at < end_s], end_s)
        if gap_s >= end_s - start_s:
            problems.append("no request was answered")
        lines, grown = memory.report()
        counts = sum((client.counts for client in clients), Counter())
        print(f"killed: {dict(kills)}; started again: {dict(fleet.restarts)}")
        print(f"{counts.pop('whole', 0)} whole answers and {counts.pop('streamed', 0)} streams, all right")
        print(f"longest time without an answer: {gap_s:.0f} s; replicas not taken: {dict(fleet.not_added)}")
        print(f"requests that ended by an error: {sum(counts.values())} {dict(counts.most_common(6))}")
        print("\n".join(lines))
        return problems + grown
    finally:
        ended.set()
        fleet.stop()


def longest_gap(start_s: float, answered_s: list[float], end_s: float) -> float:
    """Return the longest time from ``start_s`` to ``end_s`` in which no answer came; all of it if none came."""
    times = sorted([start_s, *answered_s, end_s])
    return max(after - before for before, after in pairwise(times))


def finish(clients: list[Client], ended: threading.Event) -> list[str]:
    """Let the clients' last requests end; return their problems, and those that do not end."""
    ended.set()
    problems = []
    for client in clients:
        client.join(HUNG_AFTER_S + 30)
        if client.is_alive():
            problems.append(f"{client.name} hangs")
        problems += client.problems
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill parts of a fleet at random while clients ask.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--tp-size", type=int, default=1, help="the embedded model cannot be divided so")
    parser.add_argument("--pp-size", type=int, default=1)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--every-s", type=float, default=20, help="seconds between two kills, on average")
    parser.add_argument("--router", default="vllm-router", choices=("vllm-router", "smg"))
    parser.add_argument("--model-path", default=DEMO_MODEL)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ch"))
    problems = run(args, folder)
    for problem in problems[:20]:
        print(f"PROBLEM {problem}")
    print(f"{len(problems)} problems" + (f"; the logs stay in {folder}" if problems else ""))
    if not problems:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
