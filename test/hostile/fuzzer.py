"""Throws requests at a server, and says which of them it could not bear.

    rtp-llm serve --port 30000 2> server.log
    python test/hostile/fuzzer.py --port 30000 --requests 10000 --seed 1 --log server.log
    python test/hostile/fuzzer.py --port 30000 --seed 1 --only 4711 --show

Each request is made from the seed and its number alone,
so a failure is repeated by naming both. The server must serve
the embedded model (no --model-path), whose answers to good requests are asked for first; or, with --pooled, an embedder
(--model-path DIR --served-model-name rtp-llm-demo).
"""

import argparse
import itertools
import json
import shlex
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hostile_checks import problem_of, text_of
from hostile_heavy import HEAVY
from hostile_pooled import REFUSED, pooled_requests
from hostile_requests import Case, Generator, Good, good_requests
from hostile_wire import NotHTTP, Outcome, Plan, Send, json_request, perform, request

TIMEOUT_S = 30.0
ALONE_TIMEOUT_S = 120.0  # of what was given up on, when it is sent again and nothing else is
NUM_CLIENTS = 6
SHOWN_BYTES = 1500
TRACES = ("Traceback (most recent call last)", "Exception in", "was never retrieved", "was never awaited")


@dataclass(frozen=True, slots=True)
class Failure:
    case: Case
    problem: str


@dataclass(slots=True)
class Report:
    failures: list[Failure] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)  # "kind status"
    given_up: list[Case] = field(default_factory=list)
    num_right: int = 0
    spans: list[tuple[float, float, int]] = field(default_factory=list)  # when each number began and ended; epoch

    def in_flight(self, start_s: float, end_s: float) -> list[int]:
        """Numbers of the requests that were under way in a stretch of time."""
        return [number for begun_s, ended_s, number in self.spans if begun_s < end_s and ended_s > start_s]

    def table(self) -> str:
        kinds: dict[str, Counter[str]] = {}
        for name, count in self.statuses.items():
            kind, _, status = name.rpartition(" ")
            kinds.setdefault(kind, Counter())[status] += count
        return "\n".join(
            f"{kind:14} " + "  ".join(f"{status}: {count}" for status, count in sorted(counts.items()))
            for kind, counts in sorted(kinds.items())
        )


class ServerLog:
    """What a server has written since the last look, as far as it tells of a bug."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._at = path, 0
        self._lock = threading.Lock()
        self.new_bug()

    def new_bug(self) -> str | None:
        if self._path is None:
            return None
        with self._lock, self._path.open("rb") as file:
            file.seek(self._at)
            text = file.read()
            self._at += len(text)
        lines = text.decode(errors="replace").splitlines()
        at = next((i for i, line in enumerate(lines) if any(words in line for words in TRACES)), None)
        return None if at is None else "the server logged\n" + "\n".join(lines[max(0, at - 2) : at + 200])


class Fuzzer:
    """One server under attack.

    Args:
        address: the server's.
        log: the file with its stderr, looked through for tracebacks.
        pools: it has an embedder, which gets requests for pooled outputs.
    """

    def __init__(self, address: tuple[str, int], seed: int, log: Path | None = None, pools: bool = False) -> None:
        self.address, self.seed = address, seed
        self.goods = pooled_requests() if pools else good_requests()
        self.report = Report()
        self.known: dict[str, str] = {}
        self._log = ServerLog(log)
        self._lock = threading.Lock()
        self._num_aborts = 0  # requests so far that may have ended those of others
        self._canary = socket.create_server(("127.0.0.1", 0))
        self._canary.setblocking(False)
        given = (self.goods, REFUSED) if pools else ()
        self.generator = Generator(self._document(), seed, self._canary.getsockname()[1], *given)

    def close(self) -> None:
        self._canary.close()

    def _document(self) -> dict:
        outcome = perform(self.address, Plan((Send(request("GET", "/openapi.json")),), ("GET",)), TIMEOUT_S)
        return json.loads(outcome.answers[0].body)

    def learn(self) -> None:
        """Asks all good requests alone; what they get is right from now on."""
        for good in self.goods:
            text, reason = self.ask(good)
            assert reason in ("stop", "length"), f"{good.key} ends by {reason!r}"
            assert self.known.setdefault(good.question, text) == text, f"{good.key} gets another answer as a stream"

    def ask(self, good: Good) -> tuple[str, str | None]:
        outcome = perform(self.address, _plan_of(good), ALONE_TIMEOUT_S)
        assert outcome.answers and outcome.answers[0].status == 200, outcome
        return text_of(good, outcome.answers[0])

    def run(self, numbers: Iterable[int], num_clients: int = NUM_CLIENTS) -> None:
        """Sends the requests of these numbers from as many clients at once; ``report`` tells what came of them."""
        pending = _Shared(iter(numbers))
        threads = [threading.Thread(target=self._client, args=(pending,)) for _ in range(num_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, pending: "_Shared") -> None:
        for number in pending:
            self.send(self.generator.case(number), TIMEOUT_S)

    def send(self, case: Case, timeout_s: float, is_last_try: bool = False) -> None:
        with self._lock:
            aborts_before = self._num_aborts
            self._num_aborts += case.may_abort
        problem, begun_s = None, time.time()
        try:
            outcome = perform(self.address, case.plan, timeout_s)
        except (NotHTTP, OSError) as error:
            outcome, problem = Outcome(), f"{type(error).__name__}: {error}"
        with self._lock:
            was_aborted = self._num_aborts != aborts_before
            problem = problem or problem_of(case, outcome, self.known, was_aborted)
            problem = problem or self._log.new_bug() or self._visit()
            self._take(case, outcome, problem, is_last_try, begun_s)

    def _take(self, case: Case, outcome: Outcome, problem: str | None, is_last_try: bool, begun_s: float) -> None:
        self.report.spans.append((begun_s, time.time(), case.number))
        statuses = [str(answer.status) for answer in outcome.answers]
        self.report.statuses.update(f"{case.kind} {status}" for status in statuses or ["none"])
        if problem is not None:
            self.report.failures.append(Failure(case, problem))
        elif outcome.timed_out and is_last_try:
            self.report.failures.append(Failure(case, f"no answer came, though it was alone: {outcome.problem}"))
        elif outcome.timed_out:
            self.report.given_up.append(case)
        else:
            self.report.num_right += len(case.good) * (not problem)

    def _visit(self) -> str | None:
        """Whether somebody came to where no request may lead."""
        try:
            connection, _ = self._canary.accept()
        except BlockingIOError:
            return None
        connection.close()
        return "the server connected to an address of its own machine (or a request in flight beside this one made it)"

    def run_heavy(self) -> None:
        """Sends what is too much to be drawn, one after the other, each with a good request right behind it."""
        for i in range(len(HEAVY)):
            self.send(self.generator.case(-1 - i), ALONE_TIMEOUT_S, is_last_try=True)
            self.send(Case(-1 - i, "good after it", _plan_of(good := self.goods[0]), (good,)), ALONE_TIMEOUT_S, True)

    def retry_given_up(self) -> None:
        """What was not answered among many must be answered alone."""
        given_up, self.report.given_up = self.report.given_up, []
        for case in given_up:
            self.send(case, ALONE_TIMEOUT_S, is_last_try=True)

    def wait_idle(self, timeout_s: float) -> str | None:
        """None once nothing runs or waits any more, as must come true when all clients have left."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            stats = self.get("/server_info")["stats"]
            busy = {name: stats[name] for name in ("num_running", "num_waiting", "num_held_tokens") if stats[name]}
            if not busy:
                return None
            if time.monotonic() > deadline_s:
                return f"{timeout_s:g} s after the last client left there are still {busy}"
            time.sleep(0.2)

    def get(self, path: str) -> dict:
        outcome = perform(self.address, Plan((Send(request("GET", path)),), ("GET",)), TIMEOUT_S)
        assert outcome.answers and outcome.answers[0].status == 200, (path, outcome)
        return json.loads(outcome.answers[0].body)

    def check_after(self) -> list[str]:
        """What is wrong with the server now that all is over."""
        problems = [] if (busy := self.wait_idle(60.0)) is None else [busy]
        if self.get("/health") != {"status": "ok"}:
            problems.append("/health is not ok")
        for good in self.goods:
            text, _ = self.ask(good)
            if text != self.known[good.question]:
                problems.append(f"afterwards {good.key[:200]} gets {text!r}, not {self.known[good.question]!r}")
        problems += [bug] if (bug := self._log.new_bug()) else []
        return problems

    def told(self, limit: int = 5) -> str:
        """The failures, each with what repeats it."""
        shown = [f"{len(self.report.failures)} failures (seed {self.seed})"]
        shown += [
            f"{describe(failure.case, self.seed, self.address)}\n{failure.problem}"
            for failure in self.report.failures[:limit]
        ]
        return "\n\n".join([*shown, self.report.table()])


def _plan_of(good: Good) -> Plan:
    return Plan((Send(json_request("POST", good.path, good.body)),))


class _Shared:
    """An iterator that several threads take from."""

    def __init__(self, items: Iterator[int]) -> None:
        self._items, self._lock = items, threading.Lock()

    def __iter__(self) -> Iterator[int]:
        while True:
            with self._lock:
                number = next(self._items, None)
            if number is None:
                return
            yield number


def describe(case: Case, seed: int, address: tuple[str, int]) -> str:
    """The case's name, its first bytes, and two commands that repeat it: the fuzzer's, and one without it."""
    sent = case.plan.sent
    program = Path(__file__).resolve()
    lines = [
        f"request {case.number} of seed {seed}, {case.kind}: {len(sent)} bytes",
        f"  {sent[:SHOWN_BYTES]!r}{' ...' if len(sent) > SHOWN_BYTES else ''}",
        f"  python {program} --port {address[1]} --seed {seed} --only {case.number}",
    ]
    if len(sent) <= SHOWN_BYTES:
        octal = "".join(chr(byte) if byte < 128 and chr(byte).isalnum() else f"\\{byte:03o}" for byte in sent)
        lines.append(f"  printf {shlex.quote(octal)} | nc -q 5 {address[0]} {address[1]}")
    return "\n".join(lines)


@contextmanager
def fuzzing(address: tuple[str, int], seed: int, log: Path | None = None, pools: bool = False) -> Iterator[Fuzzer]:
    fuzzer = Fuzzer(address, seed, log, pools)
    try:
        fuzzer.learn()
        yield fuzzer
    finally:
        fuzzer.close()


def main(show: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description="Throw hostile requests at a server of the embedded model.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=NUM_CLIENTS, help="connections at once")
    parser.add_argument("--only", type=int, help="send this one request, alone; below 0: one of hostile_heavy.py")
    parser.add_argument("--show", action="store_true", help="with --only: print what came back")
    parser.add_argument("--pooled", action="store_true", help="the server has an embedder, of any checkpoint")
    parser.add_argument("--log", type=Path, help="file with the server's stderr, to look for tracebacks in")
    args = parser.parse_args()
    with fuzzing((args.host, args.port), args.seed, args.log, args.pooled) as fuzzer:
        if args.only is not None:
            case = fuzzer.generator.case(args.only)
            show(describe(case, args.seed, fuzzer.address))
            if args.show:
                show(repr(perform(fuzzer.address, case.plan, ALONE_TIMEOUT_S)))
            fuzzer.send(case, ALONE_TIMEOUT_S, is_last_try=True)
        else:
            start_s = time.monotonic()
            fuzzer.run(itertools.islice(itertools.count(args.first), args.requests), args.clients)
            fuzzer.retry_given_up()
            show(f"{args.requests} requests in {time.monotonic() - start_s:.1f} s")
        problems = fuzzer.check_after()
        show("\n".join([fuzzer.told(20), *problems]))
        return 1 if problems or fuzzer.report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
