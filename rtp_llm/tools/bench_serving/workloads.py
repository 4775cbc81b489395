"""Workloads: the requests of a run and their arrival times, first as sizes, later as tokens.

A workload gives for each request its prompt's pieces, which requests may share, the tokens to generate, and its
arrival time. ``Vocabulary`` turns the pieces into ids or text: equal pieces become equal tokens, in
every run with the same seed.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import Any, Self

import numpy
from tokenizers import Tokenizer

BLOCK_TOKENS = 512  # of a hash in a Mooncake trace
PLAIN_WORD = re.compile(r"[ Ġ▁]([a-z]{2,})")  # a space (GPT-2 and SentencePiece write it so) and a word


class WorkloadError(ValueError):
    """Requests cannot be made from a data set or a tokenizer."""


class Source(IntEnum):
    """The kind of a piece of a prompt; kind and number determine its tokens."""

    OWN = 0  # of one request
    SYSTEM = 1  # of a group
    BLOCK = 2  # of a trace
    WARMUP = 3


@dataclass(frozen=True, slots=True)
class Piece:
    source: Source
    number: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """A request: its prompt's pieces, tokens to generate, seconds from the start to its arrival (None: any time)."""

    pieces: tuple[Piece, ...]
    output_len: int
    arrival_s: float | None = None

    @property
    def prompt_len(self) -> int:
        return sum(piece.num_tokens for piece in self.pieces)


class Vocabulary:
    """Draws prompts, of ids from ``ids``, of text from ``words``, a token each."""

    def __init__(self, ids: Sequence[int], words: Sequence[str] = ()) -> None:
        self._ids = numpy.array(ids, dtype=numpy.int64)
        self._words = list(words)

    @classmethod
    def from_size(cls, vocab_size: int) -> Self:
        """Use all ids below ``vocab_size``, special ones included, and no text."""
        return cls(range(vocab_size))

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> Self:
        """Use all ids but the added and special ones; words are tokens of a space and lower-case letters.

        Tokenizers split text before spaces, so that a text of n such words is n tokens.
        """
        added = tokenizer.get_added_tokens_decoder()
        tokens = {index: token for token, index in tokenizer.get_vocab(with_added_tokens=True).items()}
        ids = [index for index in sorted(tokens) if index not in added]
        words = [match[1] for index in ids if (match := PLAIN_WORD.fullmatch(tokens[index]))]
        return cls(ids, words)

    def ids(self, pieces: Iterable[Piece], seed: int) -> list[int]:
        return [index for piece in pieces for index in self._ids[_draw(piece, seed, len(self._ids))].tolist()]

    def text(self, pieces: Iterable[Piece], seed: int) -> str:
        """Return a text of about as many tokens as the pieces. Raise WorkloadError without plain words."""
        if not self._words:
            raise WorkloadError("a prompt of text needs a tokenizer that has words of plain letters; name one")
        size = len(self._words)
        return " ".join(self._words[i] for piece in pieces for i in _draw(piece, seed, size).tolist())


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer of a directory or a hub id, without transformers, which takes seconds to import.

    Raises:
        WorkloadError: there is none.
    """
    path = Path(name)
    try:
        if path.is_dir():
            return Tokenizer.from_file(str(path / "tokenizer.json"))
        return Tokenizer.from_file(name) if path.is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises nothing narrower
        raise WorkloadError(
            f"cannot load a tokenizer.json from {name!r}: {error}. Name a place that has one with --tokenizer, or, "
            "for prompts of ids, give --vocab-size"
        ) from None


def random_requests(
    num_prompts: int, input_len: int, output_len: int, range_ratio: float, seed: int
) -> list[BenchRequest]:
    """Make requests of lengths uniform in ``[range_ratio * length, length]``, at least 1, without shared tokens."""
    draw = numpy.random.default_rng([seed, 0])
    input_lens = _lengths(draw, num_prompts, input_len, range_ratio)
    output_lens = _lengths(draw, num_prompts, output_len, range_ratio)
    return [
        BenchRequest((Piece(Source.OWN, i, prompt),), output)
        for i, (prompt, output) in enumerate(zip(input_lens, output_lens, strict=True))
    ]


def shared_prefix_requests(
    num_groups: int, prompts_per_group: int, system_prompt_len: int, question_len: int, output_len: int, seed: int
) -> list[BenchRequest]:
    """Make shuffled requests in groups with a common system prompt and a question each."""
    requests = [
        BenchRequest(
            (
                Piece(Source.SYSTEM, group, system_prompt_len),
                Piece(Source.OWN, group * prompts_per_group + i, question_len),
            ),
            output_len,
        )
        for group in range(num_groups)
        for i in range(prompts_per_group)
    ]
    order = numpy.random.default_rng([seed, 0]).permutation(len(requests))
    return [requests[i] for i in order]


def azure_requests(path: Path, scale: float, speed: float) -> list[BenchRequest]:
    """Read an Azure LLM inference trace: ``TIMESTAMP,ContextTokens,GeneratedTokens``, one row per arrival.

    Lengths are divided by ``scale`` and rounded up; the times between arrivals are divided by ``speed``.

    Raises:
        WorkloadError: the file is not such a trace; it names the line.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        return _from_trace(path, enumerate(csv.DictReader(file), start=2), _azure_row, scale, speed)


def mooncake_requests(path: Path, scale: float, speed: float) -> list[BenchRequest]:
    """Read a Mooncake trace: JSON lines with ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``.

    A hash stands for a block of 512 prompt tokens and all before it, so equal hashes become equal tokens. Lengths,
    blocks included, are divided by ``scale``, and lengths are rounded up; the times between arrivals are divided by
    ``speed``.

    Raises:
        WorkloadError: the file is not such a trace; it names the line.
    """
    with path.open(encoding="utf-8") as file:
        lines = ((line, text) for line, text in enumerate(file, start=1) if text.strip())
        return _from_trace(path, lines, _mooncake_row, scale, speed)


def within_context(requests: list[BenchRequest], context_len: int | None) -> list[BenchRequest]:
    """Return requests whose prompt and output together have at most ``context_len`` tokens."""
    return [
        request for request in requests if context_len is None or request.prompt_len + request.output_len <= context_len
    ]


def with_arrivals(requests: list[BenchRequest], request_rate: float, seed: int) -> list[BenchRequest]:
    """Set Poisson arrivals at ``request_rate`` per second; all at once if it is infinite."""
    if math.isinf(request_rate):
        return [replace(request, arrival_s=0.0) for request in requests]
    gaps = numpy.random.default_rng([seed, 1]).exponential(1 / request_rate, len(requests))
    times = (numpy.cumsum(gaps) - gaps[:1]).tolist()  # the first comes at once
    return [replace(request, arrival_s=time_s) for request, time_s in zip(requests, times, strict=True)]


def warmup_requests(requests: Sequence[BenchRequest], num_requests: int) -> list[BenchRequest]:
    """Return requests as long as the first ones, but of other tokens, so that no prompt is cached."""
    models = [requests[i % len(requests)] for i in range(num_requests)]
    return [
        BenchRequest((Piece(Source.WARMUP, i, model.prompt_len),), min(model.output_len, 32))
        for i, model in enumerate(models)
    ]


def _draw(piece: Piece, seed: int, size: int) -> Any:
    """Return an array of numbers below ``size``, one for each token of the piece."""
    return numpy.random.default_rng([seed, 2, piece.source, piece.number]).integers(size, size=piece.num_tokens)


def _lengths(draw: numpy.random.Generator, count: int, length: int, range_ratio: float) -> list[int]:
    return draw.integers(max(1, int(length * range_ratio)), length, count, endpoint=True).tolist()


def _from_trace(
    path: Path,
    lines: Iterable[tuple[int, Any]],
    read: Callable[[int, Any, float], BenchRequest],
    scale: float,
    speed: float,
) -> list[BenchRequest]:
    """Make requests of a file's (line number, line), in order of arrival, the first at 0."""
    requests = []
    for number, line in lines:
        try:
            requests.append(read(number, line, scale))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise WorkloadError(f"{path}, line {number}: {reason}") from None
    if not requests:
        raise WorkloadError(f"{path} has no requests")
    requests.sort(key=lambda request: request.arrival_s or 0.0)
    start_s = requests[0].arrival_s or 0.0
    return [replace(request, arrival_s=((request.arrival_s or 0.0) - start_s) / speed) for request in requests]


def _azure_row(number: int, row: dict[str, str], scale: float) -> BenchRequest:
    prompt = Piece(Source.OWN, number, _divided(int(row["ContextTokens"]), scale))
    arrival_s = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
    return BenchRequest((prompt,), _divided(int(row["GeneratedTokens"]), scale), arrival_s)


def _mooncake_row(number: int, line: str, scale: float) -> BenchRequest:
    row = json.loads(line)
    num_tokens, hashes = int(row["input_length"]), row["hash_ids"]
    if len(hashes) != math.ceil(num_tokens / BLOCK_TOKENS):
        raise ValueError(f"{len(hashes)} hash_ids do not cover {num_tokens} tokens in blocks of {BLOCK_TOKENS}")
    pieces = tuple(_blocks(hashes, _divided(num_tokens, scale), scale))
    return BenchRequest(pieces, _divided(int(row["output_length"]), scale), float(row["timestamp"]) / 1000)


def _blocks(hashes: Sequence[int], num_tokens: int, scale: float) -> Iterator[Piece]:
    """Yield the pieces of a prompt of ``num_tokens``. Block i ends at i times the scaled block, rounded up."""
    start = 0
    for i, number in enumerate(hashes, start=1):
        end = min(num_tokens, _divided(i * BLOCK_TOKENS, scale))
        if end > start:
            yield Piece(Source.BLOCK, int(number), end - start)
        start = end


def _divided(num_tokens: int, scale: float) -> int:
    if num_tokens < 1:
        raise ValueError(f"a length of {num_tokens} tokens; there must be at least one")
    return math.ceil(num_tokens / scale)
