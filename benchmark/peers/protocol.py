"""How run.py talks to an engine: one line of JSON each way, to a process in that engine's own environment.

    -> {"do": "load", "job": {...}}      <- {"ok": {"engine": "llama.cpp", "version": "0.3.36", "load_s": "2.1", ...}}
    -> {"do": "run", "work": {...}}      <- {"ok": {"first_token_s": 0.4, "total_s": 6.2, "output_tokens": 128}}
    -> {"do": "quit"}                    <- {"ok": {}}, and the process ends

An answer is instead ``{"not_offered": why}`` if the engine has no such thing, and ``{"error": why}`` if it failed.
Only the standard library is used here, since this module is imported in every engine's environment.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TextIO


class NotOffered(Exception):
    """The engine has no such precision or workload. The message says what is missing."""


@dataclass(frozen=True)
class Job:
    """What to load: a checkpoint folder, bits of each weight (16, 8 or 4), and a folder for converted files; or a GGUF
    file, which is taken as it is."""

    checkpoint: str
    precision: int
    threads: int
    files: str

    @property
    def is_gguf(self) -> bool:
        return self.checkpoint.endswith(".gguf")


@dataclass(frozen=True)
class Work:
    """One workload's requests: ids of each prompt, of which the first ``shared_len`` are the same in all prompts.

    Every request gets ``output_len`` tokens, greedily, whatever they are. All requests are there at the start; in which
    order the engine is given them is the adapter's choice.
    """

    name: str
    prompts: list[list[int]]
    shared_len: int
    output_len: int

    @property
    def max_len(self) -> int:
        """Tokens of the longest request, prompt and output together."""
        return max(len(prompt) for prompt in self.prompts) + self.output_len


@dataclass(frozen=True)
class Timing:
    """Seconds from the start of the work to the first token and to the end of all, and the number of all tokens.

    With several requests at once, an adapter may take their end for the first token: no figure is made of it.
    """

    first_token_s: float
    total_s: float
    output_tokens: int


class Adapter(Protocol):
    """One engine. ``load`` is called once, then ``run`` any number of times.

    Both may raise NotOffered. ``load`` returns what should be told about the engine (name, version, types of weights
    and of keys and values).
    """

    def load(self, job: Job) -> dict[str, str]: ...

    def run(self, work: Work) -> Timing: ...


class Stopwatch:
    """Times one piece of work: made at its start, told of tokens as they come."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._first_token_s: float | None = None
        self._output_tokens = 0

    def tokens(self, count: int) -> None:
        """``count`` new tokens, of one request or of several, are there."""
        if count and self._first_token_s is None:
            self._first_token_s = time.perf_counter() - self._start_s
        self._output_tokens += count

    def stop(self) -> Timing:
        total_s = time.perf_counter() - self._start_s
        if self._first_token_s is None:
            raise RuntimeError("the engine ended without a token")
        return Timing(self._first_token_s, total_s, self._output_tokens)


def serve(adapter: Adapter) -> None:
    """Answers the questions on standard input until told to quit. What engines print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    serve_lines(adapter, sys.stdin, answers)


def serve_lines(adapter: Adapter, questions: TextIO, answers: TextIO) -> None:
    doers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "load": lambda question: _load(adapter, Job(**question["job"])),
        "run": lambda question: asdict(_checked(adapter, Work(**question["work"]))),
        "quit": lambda question: {},
    }
    for line in questions:
        question = json.loads(line)
        print(json.dumps(_answer(doers[question["do"]], question)), file=answers, flush=True)
        if question["do"] == "quit":
            return


def _answer(do: Callable[[dict[str, Any]], dict[str, Any]], question: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"ok": do(question)}
    except NotOffered as error:
        return {"not_offered": str(error)}
    except Exception as error:  # whatever an engine raises is reported, and ends this engine's part
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _load(adapter: Adapter, job: Job) -> dict[str, str]:
    start_s = time.perf_counter()
    about = adapter.load(job)
    return about | {"load_s": f"{time.perf_counter() - start_s:.1f}"}


def _checked(adapter: Adapter, work: Work) -> Timing:
    timing = adapter.run(work)
    expected = len(work.prompts) * work.output_len
    if timing.output_tokens != expected:
        raise RuntimeError(f"{work.name}: {timing.output_tokens} tokens instead of {expected}")
    return timing
