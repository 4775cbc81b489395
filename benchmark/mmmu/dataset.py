"""The data sets MMMU and MMMU-Pro, as they lie on the Hugging Face hub: folders with a split's parquet files."""

import ast
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from PIL import Image, UnidentifiedImageError

from benchmark.evaluation import Chat, EvaluationError

MAX_PICTURES = 7  # columns image_1 ... image_7
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MENTION = re.compile(r"<image (\d+)>")


@dataclass(frozen=True, slots=True)
class Row:
    """A question of a data set.

    ``options`` is empty where the answer is open, and ``answers`` are those that are right; elsewhere the only one of
    them is a letter. ``pictures`` are encoded, by the number with which texts mention them.
    """

    name: str
    subject: str | None  # None: the folder tells
    question: str
    options: tuple[str, ...]
    answers: tuple[str, ...]
    pictures: Mapping[int, bytes]


def dataset_folder(path: str, patterns: Sequence[str], advice: str) -> Path:
    """A folder of this machine, or of the hub's data set of this name what matches the patterns, downloaded once.

    Raises:
        EvaluationError: there is neither; the message ends in ``advice``.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, repo_type="dataset", allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # the hub's are OSErrors; a name that is none is a ValueError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EvaluationError(f"{path} is no folder here, and cannot be had from the hub: {reason}. {advice}") from None


def read_rows(files: Sequence[Path]) -> list[Row]:
    """All rows of parquet files.

    Raises:
        EvaluationError: pyarrow is missing, or a file or a row is not what it should be.
    """
    return [_row(path, values) for path in files for values in _parquet(path)]


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet  # large, and only for this
    except ImportError:
        raise EvaluationError("pyarrow reads parquet files and is not installed: pip install pyarrow") from None
    try:
        yield from parquet.read_table(path).to_pylist()
    except (OSError, ValueError, NotImplementedError) as error:  # as pyarrow's errors are
        raise EvaluationError(f"cannot read {path}: {error}") from None


def _row(path: Path, values: Mapping[str, Any]) -> Row:
    try:
        name = str(values["id"])
        options = tuple(_strings(values["options"]))
        # Open questions have no options; MMMU-Pro has none of them, and no column that tells.
        is_open = values.get("question_type", "multiple-choice") != "multiple-choice"
        answer = str(values["answer"])
        answers = tuple(_strings(answer)) if is_open and answer.startswith("[") else (answer,)
        row = Row(
            name,
            values.get("subject"),
            str(values.get("question") or ""),
            () if is_open else options,
            answers,
            _pictures(values),
        )
    except (LookupError, TypeError, ValueError, SyntaxError) as error:
        raise EvaluationError(
            f"{path}: a row must have id, question, options, answer and pictures as MMMU has them ({error!r})"
        ) from None
    if not is_open and not 2 <= len(options) <= len(LETTERS):
        raise EvaluationError(f"{path}: question {name} must have 2 to {len(LETTERS)} options, not {len(options)}")
    if not is_open and answer not in list(LETTERS[: len(options)]):
        raise EvaluationError(f"{path}: the answer to {name} must be one of its {len(options)} letters, not {answer!r}")
    return row


def _strings(value: Any) -> list[str]:
    """A list of strings, or the Python notation of one, as the columns hold it. It is read as a literal, never run."""
    found = ast.literal_eval(value) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"a list is expected, not {value!r}")
    return [str(one) for one in found]


def _pictures(values: Mapping[str, Any]) -> dict[int, bytes]:
    """A picture without a number (MMMU-Pro's whole question) is number 1."""
    columns = {number: values.get(f"image_{number}") for number in range(1, MAX_PICTURES + 1)}
    if values.get("image") is not None:
        columns[1] = values["image"]
    return {number: bytes(column["bytes"]) for number, column in columns.items() if column is not None}


def placed(text: str, pictures: Mapping[int, bytes]) -> Chat:
    """A text with pictures where ``<image N>`` mentions them, as often as it does; those that it does not come first.

    A mention of a picture that there is none of stays text.
    """
    pieces = MENTION.split(text)  # texts, and between them the numbers
    mentions = [int(number) for number in pieces[1::2]]
    parts: list[str | bytes] = [picture for number, picture in pictures.items() if number not in mentions]
    parts.append(pieces[0])
    for number, piece in zip(mentions, pieces[2::2], strict=True):
        parts += [pictures.get(number, f"<image {number}>"), piece]
    return Chat(tuple(_joined(parts)))


def _joined(parts: Sequence[str | bytes]) -> Iterator[str | bytes]:
    """Neighbouring texts as one; no empty ones."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield text
        text = ""
        yield part
    if text:
        yield text


def num_pixels(name: str, picture: bytes) -> int:
    """Pixels of an encoded picture, which is not decoded. ``name``: of the question, for the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            width, height = Image.open(BytesIO(picture)).size
    except Image.DecompressionBombError:
        return 2 * (Image.MAX_IMAGE_PIXELS or 0) + 1  # at least
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise EvaluationError(f"a picture of question {name} cannot be read: {error}") from None
    return width * height
