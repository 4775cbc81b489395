"""``rtp-llm embed``: the vectors of a file's texts, in a file. Texts and vectors pass through; neither is collected."""

import argparse
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import rtp_llm
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.sampling_params import InvalidRequest

BATCHES_AT_ONCE = 2  # one is computed while the next is encoded
STDIO = "-"
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Text:
    """A line's text. ``key``: the ``id`` of its JSON object, if it has one."""

    number: int  # of the line, from 1
    text: str
    key: Any = None


class Writer(Protocol):
    def write(self, texts: list[Text], vectors: list[Any]) -> None: ...

    def close(self) -> None: ...


def run_embed(args: argparse.Namespace, loading_bar: Callable[[], AbstractContextManager[OnProgress | None]]) -> int:
    """Embed the texts of ``args.file`` into ``args.output``; return the exit status."""
    server_args, output = ServerArgs.from_cli_args(args), Path(args.output)
    if output.suffix not in (".npy", ".jsonl"):
        raise InvalidRequest(f"--output must end in .npy or .jsonl, not {args.output!r}")
    if args.batch_size < 1:
        raise InvalidRequest(f"--batch-size must be at least 1, not {args.batch_size}")
    options = {"dimensions": args.dimensions, "prompt_name": args.prompt_name}
    options["truncate_prompt_tokens"] = -1 if args.truncate else None
    with ExitStack() as stack:
        source = sys.stdin.buffer if args.file == STDIO else stack.enter_context(open(args.file, "rb"))
        with loading_bar() as on_progress:
            engine = rtp_llm.Engine(server_args=server_args, on_progress=on_progress)
        stack.enter_context(engine)
        writer = stack.enter_context(_written(output))
        advance = stack.enter_context(_progress(None if args.file == STDIO else count_lines(Path(args.file))))
        is_jsonl = args.file.endswith(".jsonl") or args.jsonl
        count = embed_texts(engine, read_texts(source, is_jsonl, args.field), writer, args.batch_size, options, advance)
    print(f"{count} vectors in {output}", file=sys.stderr)
    return 0


def count_lines(path: Path) -> int | None:
    """Return the number of lines of a file; None for what cannot be read twice, such as a pipe."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(1 for _ in file)


def read_texts(source: IO[bytes], is_jsonl: bool, field: str) -> Iterator[Text]:
    """Yield a text for each line: the line, or what JSON has there: a string, or an object's ``field``.

    Raises:
        InvalidRequest: a line is wrong; it names it.
    """
    for number, line in enumerate(source, 1):
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"line {number} is not UTF-8: {error.reason}") from None
        yield _of_json(number, text, field) if is_jsonl else Text(number, text)


def _of_json(number: int, line: str, field: str) -> Text:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(f"line {number} is not JSON: {error}") from None
    if isinstance(value, str):
        return Text(number, value)
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise InvalidRequest(
            f"line {number} must be a JSON string, or an object with a text in {field!r} (--field names another)"
        )
    return Text(number, value[field], value.get("id"))


def embed_texts(
    engine: Any,
    texts: Iterator[Text],
    writer: Writer,
    batch_size: int,
    options: dict[str, Any],
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the vector of each text, in order; return their number.

    Args:
        options: of ``Engine.encode``.
        advance: called with the number of texts that were done.

    Raises:
        InvalidRequest: a text is wrong; it names the line.
        RuntimeError: a request failed by itself.
    """
    count = 0
    running: deque[tuple[list[Text], Future[list[Any]]]] = deque()
    with ThreadPoolExecutor(BATCHES_AT_ONCE) as pool:
        try:
            while True:
                while len(running) < BATCHES_AT_ONCE and (batch := list(islice(texts, batch_size))):
                    running.append((batch, pool.submit(_vectors, engine, batch, options)))
                if not running:
                    return count
                batch, future = running.popleft()
                writer.write(batch, future.result())
                count += len(batch)
                advance(len(batch))
        except BaseException:
            engine.abort()  # the batches that still run
            raise


def _vectors(engine: Any, batch: list[Text], options: dict[str, Any]) -> list[Any]:
    try:
        results = engine.encode([item.text for item in batch], **options)
    except InvalidRequest as error:
        found = _place(str(error))
        if found is None:
            raise
        raise InvalidRequest(f"line {batch[found[0]].number}: {found[1]}") from None
    for item, result in zip(batch, results, strict=True):
        if result["embedding"] is None:
            raise RuntimeError(f"line {item.number}: {result['meta_info']['finish_reason']['message']}")
    return [result["embedding"] for result in results]


def _place(message: str) -> tuple[int, str] | None:
    """Return the number of the input that an error of ``encode`` names, and the rest."""
    head, _, rest = message.partition(": ")
    word, _, number = head.partition(" ")
    return (int(number), rest) if word == "prompt" and number.isdigit() else None


class NpyWriter:
    """Writes float32 [count, width] as numpy does; the header has the count once it is known."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._count = self._width = 0

    def write(self, texts: list[Text], vectors: list[Any]) -> None:
        if not self._width:
            self._width = len(vectors[0])
            self._header()
        self._file.write(np.asarray(vectors, dtype="<f4").tobytes())
        self._count += len(vectors)

    def close(self) -> None:
        self._file.seek(0)
        self._header()  # as long as before: numpy leaves room for the digits of the count

    def _header(self) -> None:
        shape = (self._count, self._width)
        np.lib.format.write_array_header_1_0(self._file, {"descr": "<f4", "fortran_order": False, "shape": shape})


class JsonlWriter:
    """Writes ``{"index", "embedding"}`` a line, with the input's ``id`` if it has one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._count = 0

    def write(self, texts: list[Text], vectors: list[Any]) -> None:
        for text, vector in zip(texts, vectors, strict=True):
            named = {} if text.key is None else {"id": text.key}
            line = json.dumps({"index": self._count, **named, "embedding": vector.tolist()})
            self._file.write(line.encode() + b"\n")
            self._count += 1

    def close(self) -> None:
        """Nothing is left to write."""


@contextmanager
def _written(path: Path) -> Iterator[Writer]:
    """Write beside the file, and put it in its place once all is written; an error leaves nothing."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            writer: Writer = NpyWriter(file) if path.suffix == ".npy" else JsonlWriter(file)
            yield writer
            writer.close()
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many texts are done of how many, if that is known; without one, show nothing."""
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("embedding", total=total)
        yield lambda count: progress.update(task, advance=count)
