"""GSM8K (Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems"): prompts, and reading answers."""

import argparse
import json
import re
from pathlib import Path

from benchmark.download import downloaded_file
from benchmark.evaluation import EvaluationError, Question, Task, not_negative, positive

URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/test.jsonl"
STOP = ("Question", "Assistant:", "<|separator|>")
# A minus belongs to the number unless it follows what can be subtracted from.
NUMBER = re.compile(r"((?:(?<![\w)\]])-)?)(\d+)(?:\.(\d+))?", re.ASCII)


def add_task_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-shots", type=not_negative, default=5, help="examples before each question")
    parser.add_argument("--num-questions", "--limit", type=positive, default=200, help="at most so many questions")
    parser.add_argument("--max-new-tokens", type=positive, default=512, help="most tokens of an answer")
    parser.add_argument("--data-path", type=Path, help="test.jsonl; unset: it is downloaded once")


def make_task(args: argparse.Namespace) -> Task:
    """The task that the command line asks for. Raises EvaluationError."""
    path = args.data_path or downloaded_file(
        URL, "gsm8k/test.jsonl", "Get test.jsonl of openai/grade-school-math elsewhere and name it with --data-path"
    )
    questions = read_questions(path, args.num_shots, args.num_questions)
    return Task("gsm8k", questions, args.num_shots, args.max_new_tokens, STOP, extract)


def read_questions(path: Path, num_shots: int, num_questions: int) -> list[Question]:
    """Questions of a file of JSON lines. The first ``num_shots`` are the examples, and are not asked themselves.

    Raises:
        EvaluationError: no such file, a line is not what it should be, or there are too few.
    """
    rows = _rows(path)
    if len(rows) <= num_shots:
        raise EvaluationError(f"{path} has {len(rows)} questions: none is left beside {num_shots} examples")
    examples = tuple(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in rows[:num_shots])
    asked = list(enumerate(rows))[num_shots : num_shots + num_questions]
    return [
        Question(f"gsm8k-{i}", "gsm8k", "", examples, f"Question: {question}\nAnswer:", _label(path, i, answer))
        for i, (question, answer) in asked
    ]


def extract(text: str) -> str | None:
    """The last number in a text without its commas, as a plain decimal; None if there is none."""
    numbers = NUMBER.findall(text.replace(",", ""))
    if not numbers:
        return None
    sign, whole, fraction = numbers[-1]
    digits = f"{whole.lstrip('0') or '0'}.{fraction}".rstrip("0").rstrip(".") if fraction else whole.lstrip("0") or "0"
    return digits if digits == "0" else sign + digits


def _rows(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read {path}, which must be GSM8K's test.jsonl: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
                rows.append((str(row["question"]), str(row["answer"])))
            except (ValueError, LookupError, TypeError):
                raise EvaluationError(f"{path}, line {number}: no JSON object with question and answer") from None
    return rows


def _label(path: Path, i: int, answer: str) -> str:
    """What stands after #### at the answer's end."""
    label = extract(answer.rpartition("####")[2])
    if label is None:
        raise EvaluationError(f"{path}: the answer of question {i} does not end in a number: {answer[-40:]!r}")
    return label
