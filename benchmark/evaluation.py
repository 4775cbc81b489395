"""What the evaluations share: questions, prompts that fit the context, the run, its record and its table.

An evaluation is a ``Task``; whoever answers is an ``Answerer``: a server, or transformers in this process. Both are
given the same prompts, byte for byte, so that their answers can be compared question by question.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rtp_llm import __version__

EXIT_FAILED_REQUESTS = 1
EXIT_ERROR = 2
NOT_RECORDED = ("api_key", "answers", "result_filename")

Record = dict[str, Any]
AnyQuestion = TypeVar("AnyQuestion", bound="Question")


@dataclass(frozen=True, slots=True)
class Chat:
    """A user's message that is answered by an assistant: texts and encoded pictures (PNG, JPEG ...), in their order."""

    parts: tuple[str | bytes, ...]


Prompt = str | Chat  # a text is continued as it stands, a chat goes through the model's template


class EvaluationError(Exception):
    """The evaluation cannot be run as it was asked for."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the examples that may precede it, and the right answer.

    ``intro`` begins the prompt; each of ``examples`` is complete, with its answer and what separates it from the next.
    """

    name: str  # unique within the task
    subject: str
    intro: str
    examples: tuple[str, ...]
    text: str
    label: Any

    def shots(self, num_shots: int) -> str:
        return self.intro + "".join(self.examples[:num_shots])

    def prompt(self, num_shots: int) -> Prompt:
        return self.shots(num_shots) + self.text

    def is_right(self, answer: Any) -> bool:
        return answer == self.label


def spread(subjects: Sequence[Sequence[AnyQuestion]], num_questions: int | None) -> list[AnyQuestion]:
    """The first questions of every subject, as equally many of each as there are; in the order of the subjects."""
    turns = chain.from_iterable(zip_longest(*subjects))
    chosen = {question.name for question in [q for q in turns if q is not None][:num_questions]}
    return [question for subject in subjects for question in subject if question.name in chosen]


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked, and how an answer's text is read. ``max_shots_len``: most tokens of the intro and the examples.

    ``groups`` are subjects whose figures are also wanted together. ``left_out`` are questions of the data set that are
    not asked at all, counted by the reason.
    """

    name: str
    questions: Sequence[Question]
    num_shots: int
    max_new_tokens: int
    stop: tuple[str, ...]
    extract: Callable[[str], str | None]  # the answer that a text gives, comparable with a label; None: it gives none
    max_shots_len: int | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)

    def read(self, question: Question, text: str) -> Any:
        """The answer that a text gives to a question; None if it gives none."""
        return self.extract(text)

    def guess(self, question: Question) -> Any:
        """What counts as the answer where a text gives none; None if nothing does."""
        return None


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for a prompt: the text up to a stop string and its tokens (None: not told), or an error."""

    text: str = ""
    num_tokens: int | None = None
    error: str | None = None


class Answerer(Protocol):
    """Whoever continues prompts, greedily.

    ``context_len`` is in tokens, prompt and answer together, None where nobody knows; ``counting`` says for a person
    how tokens are counted.
    """

    backend: str
    model: str
    context_len: int | None
    counting: str

    def count_tokens(self, prompts: Sequence[Any]) -> list[int]:
        """Tokens of each prompt, those included that the tokenizer puts around a text."""

    def answer(
        self, prompts: Sequence[Any], max_new_tokens: int, stop: tuple[str, ...], on_done: Callable[[], None]
    ) -> list[Reply]:
        """Replies in the order of the prompts; ``on_done`` is called after each."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A question as it is put. ``num_shots`` is None, and there is no prompt, if it is skipped."""

    question: Question
    num_shots: int | None = None
    prompt: Prompt = ""


def fit(task: Task, answerer: Answerer) -> list[Ask]:
    """Every question of a task with as many of its examples as fit.

    Examples are dropped from the last until intro and examples have at most ``task.max_shots_len`` tokens, and prompt
    and answer together at most ``answerer.context_len``. A question that does not fit without any is skipped.
    """
    most = _most_shots(task, answerer)
    room = None if answerer.context_len is None else answerer.context_len - task.max_new_tokens
    fitting: dict[str, Ask] = {}
    for num_shots in range(task.num_shots, -1, -1):
        tried = [
            question
            for question in task.questions
            if question.name not in fitting and most[question.shots(task.num_shots)] >= num_shots
        ]
        prompts = [question.prompt(num_shots) for question in tried]
        lengths = [0] * len(prompts) if room is None else answerer.count_tokens(prompts)
        for question, prompt, length in zip(tried, prompts, lengths, strict=True):
            if room is None or length <= room:
                fitting[question.name] = Ask(question, num_shots, prompt)
    return [fitting.get(question.name, Ask(question)) for question in task.questions]


def _most_shots(task: Task, answerer: Answerer) -> dict[str, int]:
    """For each distinct text of intro and examples: how many of the examples ``task.max_shots_len`` allows."""
    most = {}
    for question in task.questions:
        whole = question.shots(task.num_shots)
        if whole not in most:
            most[whole] = task.num_shots
            while task.max_shots_len is not None and most[whole] > 0:
                if answerer.count_tokens([question.shots(most[whole])])[0] <= task.max_shots_len:
                    break
                most[whole] -= 1
    return most


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a question. ``answer`` is None where the reply gives none; then ``guess`` counts, if it is one."""

    ask: Ask
    reply: Reply | None  # None: skipped
    answer: Any
    guess: Any = None

    @property
    def status(self) -> str:
        if self.reply is None:
            return "skipped"
        return "answered" if self.reply.error is None else "failed"

    @property
    def right(self) -> bool:
        answer = self.guess if self.answer is None else self.answer
        return answer is not None and self.ask.question.is_right(answer)

    @property
    def invalid(self) -> bool:
        return self.status == "answered" and self.answer is None

    def to_dict(self) -> Record:
        """A line of the answers file."""
        question, reply = self.ask.question, self.reply or Reply()
        guess = {} if self.guess is None else {"guess": self.guess}
        return {
            "name": question.name,
            "subject": question.subject,
            "status": self.status,
            "num_shots": self.ask.num_shots,
            "prompt_sha256": digest(self.ask.prompt),
            "text": reply.text,
            "answer": self.answer,
            "label": question.label,
            "right": self.right,
            "error": reply.error,
        } | guess


def digest(prompt: Prompt) -> str:
    """SHA-256 of a prompt. A chat's is over kind, length and content of its parts."""
    if isinstance(prompt, str):
        return hashlib.sha256(prompt.encode()).hexdigest()
    content = hashlib.sha256()
    for part in prompt.parts:
        data = part.encode() if isinstance(part, str) else part
        content.update(f"{'text' if isinstance(part, str) else 'picture'} {len(data)}:".encode())
        content.update(data)
    return content.hexdigest()


def outcomes(task: Task, asks: Sequence[Ask], replies: Sequence[Reply]) -> list[Outcome]:
    """Asks with the replies to those of them that were not skipped."""
    remaining = iter(replies)
    found = []
    for ask in asks:
        reply = None if ask.num_shots is None else next(remaining)
        answered = reply is not None and reply.error is None
        answer = task.read(ask.question, reply.text) if answered else None
        guess = task.guess(ask.question) if answered and answer is None else None
        found.append(Outcome(ask, reply, answer, guess))
    return found


def figures(task: Task, found: Sequence[Outcome]) -> Record:
    """Accuracy is of the answered questions: those that failed or were skipped are counted by themselves."""
    status = Counter(outcome.status for outcome in found)
    correct, answered = sum(outcome.right for outcome in found), status["answered"]
    invalid = sum(outcome.invalid for outcome in found)
    return {
        "accuracy": correct / answered if answered else None,
        "correct": correct,
        "invalid": invalid / answered if answered else None,
        "num_questions": len(found),
        "answered": answered,
        "failed": status["failed"],
        "skipped": status["skipped"],
        "fewer_shots": sum(o.ask.num_shots is not None and o.ask.num_shots < task.num_shots for o in found),
        "guessed": sum(outcome.guess is not None for outcome in found),
        "left_out": dict(task.left_out),
    }


def run(
    make_task: Callable[[argparse.Namespace], Task],
    make_answerer: Callable[[argparse.Namespace], AbstractContextManager[Answerer]],
    args: argparse.Namespace,
) -> int:
    """One evaluation from its command line to its record; prints the figures; returns the exit status.

    0: done; 1: done, but requests failed; 2: it could not be run.
    """
    try:
        with ExitStack() as stack:
            task = make_task(args)
            answerer = stack.enter_context(make_answerer(args))
            results = stack.enter_context(open(args.result_filename, "a"))
            answers = stack.enter_context(open(args.answers, "w")) if args.answers else None
            record, found = evaluate(task, answerer)
            options = {name: value for name, value in vars(args).items() if name not in NOT_RECORDED}
            print(json.dumps(record | {"options": options}, default=str), file=results)
            for outcome in found if answers else ():
                print(json.dumps(outcome.to_dict()), file=answers)
    except (EvaluationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    report(task, record, found)
    return EXIT_FAILED_REQUESTS if record["failed"] else 0


def evaluate(task: Task, answerer: Answerer) -> tuple[Record, list[Outcome]]:
    """The record of a run, and what became of each question.

    Raises:
        EvaluationError: no question fits the context.
    """
    asks = fit(task, answerer)
    prompts = [ask.prompt for ask in asks if ask.num_shots is not None]
    if not prompts:
        raise EvaluationError(
            f"none of {len(asks)} questions fits: prompt and answer may have {answerer.context_len} tokens together, "
            f"of which --max-new-tokens takes {task.max_new_tokens}. Lower that, or serve with a longer context"
        )
    with progress(task.name, len(prompts)) as on_done:
        start_s = time.perf_counter()
        replies = answerer.answer(prompts, task.max_new_tokens, task.stop, on_done)
        latency_s = time.perf_counter() - start_s
    found = outcomes(task, asks, replies)
    return about(task, answerer) | figures(task, found) | _speed(replies, latency_s) | _details(task, found), found


def about(task: Task, answerer: Answerer) -> Record:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rtp_llm_version": __version__,
        "task": task.name,
        "backend": answerer.backend,
        "model": answerer.model,
        "context_len": answerer.context_len,
        "counting": answerer.counting,
    }


def _speed(replies: Sequence[Reply], latency_s: float) -> Record:
    """Latency is the seconds that all answers took together. Throughput is unknown where token counts are."""
    done = [reply.num_tokens for reply in replies if reply.error is None]
    known = [num_tokens for num_tokens in done if num_tokens is not None]
    total = sum(known) if len(known) == len(done) else None
    return {
        "latency": latency_s,
        "output_tokens": total,
        "output_throughput": None if total is None else total / latency_s,
    }


def _details(task: Task, found: Sequence[Outcome]) -> Record:
    errors = Counter(o.reply.error for o in found if o.reply is not None and o.reply.error is not None)
    return {
        "errors": dict(errors.most_common()),
        "subjects": _counts(_by_subject(found)),
        "groups": _counts(_by_group(task, found)),
    }


def _counts(of: Mapping[str, tuple[int, int]]) -> Record:
    return {name: {"answered": answered, "correct": correct} for name, (answered, correct) in of.items()}


def _by_subject(found: Sequence[Outcome]) -> dict[str, tuple[int, int]]:
    """(answered, correct) of each subject, in the order in which they come."""
    answered = Counter(outcome.ask.question.subject for outcome in found if outcome.status == "answered")
    correct = Counter(outcome.ask.question.subject for outcome in found if outcome.right)
    names = dict.fromkeys(outcome.ask.question.subject for outcome in found)
    return {name: (answered[name], correct[name]) for name in names}


def _by_group(task: Task, found: Sequence[Outcome]) -> dict[str, tuple[int, int]]:
    """(answered, correct) of each of the task's groups that has subjects here."""
    subjects = _by_subject(found)
    members = {group: [subjects[name] for name in names if name in subjects] for group, names in task.groups.items()}
    return {group: (sum(n for n, _ in of), sum(n for _, n in of)) for group, of in members.items() if of}


def report(task: Task, record: Record, found: Sequence[Outcome]) -> None:
    """The figures for a person, on standard output."""
    console = Console(highlight=False, soft_wrap=True)
    subjects = _by_subject(found)
    if len(subjects) > 1:
        groups = {f"Overall-{name}": counts for name, counts in _by_group(task, found).items()}
        console.print(_table(subjects | groups))
    average = "Overall accuracy" if task.groups else "Average accuracy" if len(subjects) > 1 else "Accuracy"
    throughput = record["output_throughput"]
    lines = [
        f"{task.name}, {record['num_questions']} questions, {record['model']} ({record['backend']})",
        f"{average}: {_share(record['accuracy'])} ({record['correct']} of {record['answered']})",
        f"Invalid: {_share(record['invalid'])}",
        f"Latency: {record['latency']:.3f} s",
        f"Output throughput: {'not told' if throughput is None else f'{throughput:.3f} token/s'}",
        *_notes(task, record),
    ]
    for line in lines:
        console.print(line, markup=False)


def _table(subjects: dict[str, tuple[int, int]]) -> Table:
    table = Table("subject", "answered", "correct", "accuracy")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (answered, correct) in subjects.items():
        table.add_row(name, str(answered), str(correct), _share(correct / answered if answered else None))
    return table


def _notes(task: Task, record: Record) -> list[str]:
    notes = []
    if record["failed"]:
        reason, count = next(iter(record["errors"].items()))
        notes.append(f"{record['failed']} requests failed, and count neither as right nor as wrong; {count}: {reason}")
    if record["guessed"]:
        notes.append(f"{record['guessed']} answers could not be read; a guess drawn by the seed counts in their place")
    notes += [f"{count} questions not asked: {reason}" for reason, count in record["left_out"].items()]
    if record["skipped"]:
        notes.append(
            f"{record['skipped']} questions skipped: with {task.max_new_tokens} tokens for the answer they do not fit "
            f"into the context of {record['context_len']}, even without examples"
        )
    if record["fewer_shots"]:
        notes.append(f"{record['fewer_shots']} questions asked with fewer than {task.num_shots} examples, to fit")
    if record["skipped"] or record["fewer_shots"]:
        notes.append(f"tokens counted by {record['counting']}")
    return notes


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, if that is a terminal; gives the function to be called when one more is done."""
    console = Console(stderr=True)
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar_id = bar.add_task(what, total=total)
        yield lambda: bar.advance(bar_id)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--result-filename", type=Path, default=Path("result.jsonl"), help="a line of JSON is appended for each run"
    )
    parser.add_argument(
        "--answers", type=Path, help="write a line of JSON for each question, for benchmark/compare_answers.py"
    )


def positive(text: str) -> int:
    """An argument that is at least 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """An argument that is at least 0."""
    return _at_least(0, text)


def _at_least(low: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if value < low:
        raise argparse.ArgumentTypeError(f"must be at least {low}, not {value}")
    return value
