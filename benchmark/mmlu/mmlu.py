"""MMLU (Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding"): prompts, and reading answers."""

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

from benchmark.download import downloaded_folder
from benchmark.evaluation import EvaluationError, Question, Task, not_negative, positive, spread

URL = "https://huggingface.co/datasets/cais/mmlu/resolve/main/data.tar"
LETTERS = "ABCD"
MAX_SHOTS_LEN = 1536  # tokens of the examples


@dataclass(frozen=True, slots=True)
class Row:
    question: str
    choices: tuple[str, ...]  # as many as LETTERS
    letter: str


def add_task_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-k", "--ntrain", type=not_negative, default=5, help="examples before each question")
    parser.add_argument("--nsub", type=positive, default=60, help="at most so many subjects, in alphabetical order")
    parser.add_argument(
        "--num-questions", "--limit", type=positive, help="at most so many, spread over the subjects; unset: all"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=1, help="most tokens of an answer")
    parser.add_argument(
        "--data-path",
        "--data-dir",
        "--data_dir",
        type=Path,
        help="folder with dev and test; unset: it is downloaded once",
    )


def make_task(args: argparse.Namespace) -> Task:
    """The task that the command line asks for. Raises EvaluationError."""
    folder = args.data_path or downloaded_folder(
        URL, "mmlu", ("dev", "test"), "Get MMLU's data.tar elsewhere and name the unpacked folder with --data-path"
    )
    subjects = [read_subject(folder, name, args.ntrain) for name in subject_names(folder)[: args.nsub]]
    questions = spread(subjects, args.num_questions)
    return Task("mmlu", questions, args.ntrain, args.max_new_tokens, (), extract, MAX_SHOTS_LEN)


def subject_names(folder: Path) -> list[str]:
    """Subjects of a folder whose ``test`` has a file for each. Raises EvaluationError if there is none."""
    names = sorted(path.name.removesuffix("_test.csv") for path in (folder / "test").glob("*_test.csv"))
    if not names:
        raise EvaluationError(
            f"no *_test.csv in {folder / 'test'}: MMLU's folder holds dev/SUBJECT_dev.csv and test/SUBJECT_test.csv"
        )
    return names


def read_subject(folder: Path, name: str, num_shots: int) -> list[Question]:
    """A subject's questions, each with ``num_shots`` examples. Raises EvaluationError."""
    dev = read_rows(folder / "dev" / f"{name}_dev.csv") if num_shots else []
    if len(dev) < num_shots:
        raise EvaluationError(f"{name} has {len(dev)} examples in dev, but --ntrain is {num_shots}")
    title = name.replace("_", " ")
    intro = f"The following are multiple choice questions (with answers) about {title}.\n\n"
    examples = tuple(f"{_asked(row)} {row.letter}\n\n" for row in dev[:num_shots])
    rows = read_rows(folder / "test" / f"{name}_test.csv")
    return [Question(f"{name}-{i}", name, intro, examples, _asked(row), row.letter) for i, row in enumerate(rows)]


def read_rows(path: Path) -> list[Row]:
    """Rows of question, four choices and the answer, a letter or its number from 0; perhaps below a header.

    Raises:
        EvaluationError: no such file, or a row is not of this kind.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(f"cannot read {path}, which must be MMLU's: {error}") from None
    if lines and lines[0][-1:] == ["answer"]:
        del lines[0]
    return [_row(path, line) for line in lines]


def extract(text: str) -> str | None:
    """The letter that a text begins with, blanks apart; None if it begins with anything else."""
    first = text.strip()[:1]
    return first if first and first in LETTERS else None


def _asked(row: Row) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row.choices, strict=True))
    return f"{row.question}{choices}\nAnswer:"


def _row(path: Path, cells: list[str]) -> Row:
    letters = dict(zip("0123", LETTERS, strict=True)) | {letter: letter for letter in LETTERS}
    if len(cells) != len(LETTERS) + 2 or cells[-1].strip() not in letters:
        raise EvaluationError(f"{path}: a row must be a question, four choices and A-D or 0-3, not {cells}")
    return Row(cells[0], tuple(cells[1:-1]), letters[cells[-1].strip()])
