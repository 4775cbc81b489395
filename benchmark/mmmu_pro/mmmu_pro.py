"""MMMU-Pro (Yue et al. 2024, "A More Robust Multi-discipline Multimodal Understanding Benchmark"): the prompts."""

import argparse
from pathlib import Path

from benchmark.evaluation import EvaluationError
from benchmark.mmmu.dataset import LETTERS, Row, dataset_folder, read_rows
from benchmark.mmmu.eval_utils import read_choice_pro
from benchmark.mmmu.mmmu import (
    ADVICE,
    PictureQuestion,
    PictureTask,
    add_common_options,
    picture_question,
    picture_task,
)

HUB_ID = "MMMU/MMMU_Pro"
FOLDERS = {"standard-10": "standard (10 options)", "standard-4": "standard (4 options)", "vision": "vision"}
LAST_LINE = (
    "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER "
    "is one of options."
)
# What follows a question, by mode and whether it is all in the picture: the data set's own (its prompts.yaml).
INSTRUCTIONS = {
    ("direct", False): "Answer with the option letter from the given choices directly.",
    ("direct", True): f"Answer with the option letter from the given choices directly. {LAST_LINE}",
    ("cot", False): f"Answer the preceding multiple choice question. {LAST_LINE} Think step by step before answering.",
    ("cot", True): "Write out the multiple-choice question in the image and then solve it. "
    f"{LAST_LINE} Think step by step before answering.",
}
MAX_NEW_TOKENS = 1024  # thinking takes its room, and an answer without thoughts ends by itself


def add_task_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--setting",
        choices=FOLDERS,
        default="standard-10",
        help="how many options there are, or vision: question and options are in the picture; unset: standard-10",
    )
    parser.add_argument(
        "--mode", choices=("direct", "cot"), default="direct", help="whether thoughts are asked for; unset: direct, no"
    )
    parser.add_argument("--split", default="test", help="part of the data set, which has no other; unset: test")
    add_common_options(parser, HUB_ID, MAX_NEW_TOKENS)


def make_task(args: argparse.Namespace) -> PictureTask:
    """The task that the command line asks for. Raises EvaluationError."""
    name = FOLDERS[args.setting]
    pattern = f"{name}/{args.split}-*.parquet"
    folder = dataset_folder(args.dataset_path, [pattern], f"{ADVICE} with --dataset-path")
    files = sorted((folder / name).glob(f"{args.split}-*.parquet"))
    if not files:
        raise EvaluationError(f"no {args.split}-*.parquet in {folder / name}, where MMMU-Pro's files lie. {ADVICE}")
    subjects: dict[str, list[PictureQuestion]] = {}
    for row in read_rows(files):
        question = _question(row, folder, args)
        subjects.setdefault(question.subject, []).append(question)
    in_order = [subjects[subject] for subject in sorted(subjects)]
    return picture_task(f"mmmu_pro_{args.setting}_{args.mode}", in_order, args, read_choice_pro)


def _question(row: Row, folder: Path, args: argparse.Namespace) -> PictureQuestion:
    if row.subject is None or not row.options:
        raise EvaluationError(f"{folder}: question {row.name} must have a subject and options, as MMMU-Pro's have")
    options = dict(zip(LETTERS, row.options, strict=False))
    in_picture = args.setting == "vision"
    lines = [] if in_picture else [row.question, *(f"{letter}. {option}" for letter, option in options.items())]
    text = "\n".join([*lines, INSTRUCTIONS[args.mode, in_picture]])
    return picture_question(row, row.subject, text, options)
