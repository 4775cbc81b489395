"""MMMU (Yue et al. 2023, "Massive Multi-discipline Multimodal Understanding and Reasoning Benchmark"): prompts."""

import argparse
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmark.evaluation import Chat, EvaluationError, Question, Task, positive, spread
from benchmark.mmmu.dataset import LETTERS, Row, dataset_folder, num_pixels, placed, read_rows
from benchmark.mmmu.eval_utils import is_right, read_choice, read_open

HUB_ID = "MMMU/MMMU"
ADVICE = "Get the data set elsewhere, or draw a small one with benchmark/make_mmmu_mini.py, and name its folder"
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Psychology", "Sociology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}


@dataclass(frozen=True, slots=True)
class Formats:
    """Prompts around a question: ``{}`` is the question, in ``multi_choice`` the second one the options."""

    instructions: str = ""
    multi_choice: str = "{}\n\n{}\n\nAnswer with the option's letter from the given choices directly."
    short_answer: str = "{}\n\nAnswer the question using a single word or phrase."


@dataclass(frozen=True, slots=True)
class PictureQuestion(Question):
    """A question with pictures. ``options`` are by letter; the answer is open if there are none."""

    chat: Chat
    options: Mapping[str, str]

    def prompt(self, num_shots: int) -> Chat:
        return self.chat

    def is_right(self, answer: Any) -> bool:
        """``label`` is a letter, or the list of an open question's right answers."""
        return answer == self.label if self.options else is_right(answer, self.label)


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureTask(Task):
    """``extract`` gives the part of a text that is read. What gives no letter counts as one that is drawn by lot."""

    read_letter: Callable[[str, Mapping[str, str]], str | None]
    seed: int

    def read(self, question: PictureQuestion, text: str) -> str | list[str | float] | None:
        part = self.extract(text) or ""
        if question.options:
            return self.read_letter(part, question.options)
        found = read_open(part)
        return found if any(found) else None

    def guess(self, question: PictureQuestion) -> str | None:
        """The same for a question whatever became of the others."""
        draw = random.Random(f"{self.seed}:{question.name}")
        return draw.choice(list(question.options)) if question.options else None


def add_task_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="validation", help="part of the data set; others have no answers, or few")
    add_common_options(parser, HUB_ID, max_new_tokens=30)
    parser.add_argument(
        "--prompt-format-file",
        type=Path,
        help="YAML with task_instructions, multi_choice_example_format and short_ans_example_format, each optional",
    )


def add_common_options(parser: argparse.ArgumentParser, hub_id: str, max_new_tokens: int) -> None:
    """Options that MMMU-Pro has too."""
    parser.add_argument(
        "--dataset-path", "--data-path", default=hub_id, help=f"folder, or data set on the hub; unset: {hub_id}"
    )
    parser.add_argument(
        "--num-questions", "--limit", type=positive, help="at most so many, spread over the subjects; unset: all"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=max_new_tokens, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=1, help="of the guesses that count for answers without a letter")
    parser.add_argument(
        "--image-pixels-limit",
        type=int,
        default=-1,
        help="questions with a picture of more pixels are not asked; unset: -1, all are",
    )
    parser.add_argument(
        "--response-answer-regex",
        type=answer_pattern,
        default="(?s)(.*)",
        help="its first group is what is read of an answer, which is read whole where it does not match",
    )


def answer_pattern(text: str) -> str:
    """An argument that is a regular expression with a group."""
    try:
        num_groups = re.compile(text).groups
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    if not num_groups:
        raise argparse.ArgumentTypeError(f"{text!r} has no group in parentheses, which would be the answer")
    return text


def make_task(args: argparse.Namespace) -> PictureTask:
    """The task that the command line asks for. Raises EvaluationError."""
    folder = dataset_folder(args.dataset_path, [f"*/{args.split}-*.parquet"], f"{ADVICE} with --dataset-path")
    formats = read_formats(args.prompt_format_file) if args.prompt_format_file else Formats()
    files = subject_files(folder, args.split)
    subjects = [[_question(row, name, formats) for row in read_rows(paths)] for name, paths in files.items()]
    return picture_task("mmmu", subjects, args, read_choice)


def picture_task(
    name: str,
    subjects: Sequence[Sequence[PictureQuestion]],
    args: argparse.Namespace,
    read_letter: Callable[[str, Mapping[str, str]], str | None],
) -> PictureTask:
    """A task of these questions, as the common options have it."""
    limit = args.image_pixels_limit
    asked = [[q for q in questions if limit < 0 or largest_picture(q) <= limit] for questions in subjects]
    num_left_out = sum(map(len, subjects)) - sum(map(len, asked))
    return PictureTask(
        name,
        spread(asked, args.num_questions),
        num_shots=0,
        max_new_tokens=args.max_new_tokens,
        stop=(),
        extract=partial(answer_part, re.compile(args.response_answer_regex)),
        groups=DOMAINS,
        left_out={f"a picture has more than {limit} pixels": num_left_out} if num_left_out else {},
        read_letter=read_letter,
        seed=args.seed,
    )


def largest_picture(question: PictureQuestion) -> int:
    """In pixels; 0 without pictures."""
    pictures = [part for part in question.chat.parts if isinstance(part, bytes)]
    return max((num_pixels(question.name, picture) for picture in pictures), default=0)


def answer_part(pattern: re.Pattern[str], text: str) -> str:
    """What follows a model's thoughts, and of this the first group of the pattern where that matches."""
    text = text.rpartition("</think>")[2].strip()
    match = pattern.search(text)
    return text if match is None else match.group(1) or ""


def subject_files(folder: Path, split: str) -> dict[str, list[Path]]:
    """The parquet files of each subject that has the split. Raises EvaluationError if none has."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"*/{split}-*.parquet")):
        files.setdefault(path.parent.name, []).append(path)
    if not files:
        raise EvaluationError(f"no {split}-*.parquet in {folder}/SUBJECT, where MMMU's files lie. {ADVICE}")
    return files


def read_formats(path: Path) -> Formats:
    """Formats of a YAML file: what it does not name stays as it is. Raises EvaluationError."""
    names = {
        "task_instructions": ("instructions", 0),
        "multi_choice_example_format": ("multi_choice", 2),
        "short_ans_example_format": ("short_answer", 1),
    }
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EvaluationError(f"cannot read {path}, which must be YAML: {error}") from None
    if not isinstance(values, dict) or values.keys() - names.keys():
        raise EvaluationError(f"{path} must have no other entries than {', '.join(names)}")
    found = {}
    for key, value in values.items():
        field, num_places = names[key]
        text = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(text, str) or text.count("{}") != num_places:
            raise EvaluationError(f"{path}: {key} must be a text with {num_places} times {{}}, not {value!r}")
        found[field] = text
    return Formats(**found)


def _question(row: Row, subject: str, formats: Formats) -> PictureQuestion:
    options = dict(zip(LETTERS, row.options, strict=False))
    if options:
        choices = "\n".join(f"({letter}) {option}" for letter, option in options.items())
        text = filled(formats.multi_choice, row.question, choices)
    else:
        text = filled(formats.short_answer, row.question)
    text = f"{formats.instructions}\n\n{text}" if formats.instructions else text
    return picture_question(row, subject, text, options)


def picture_question(row: Row, subject: str, text: str, options: Mapping[str, str]) -> PictureQuestion:
    label = row.answers[0] if options else list(row.answers)
    return PictureQuestion(row.name, subject, "", (), text, label, placed(text, row.pictures), options)


def filled(text: str, *values: str) -> str:
    """A format with its places filled in order; braces elsewhere, as in formulas, mean nothing."""
    pieces = text.split("{}")
    return "".join(piece + value for piece, value in zip(pieces, (*values, ""), strict=True))
