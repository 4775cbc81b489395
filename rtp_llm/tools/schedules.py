"""Whether a model answers alike under each of the engine's schedules, and as transformers does.

The same questions are asked one by one, in one batch, in chunks of the prompt, from a warm prefix cache, for a second
turn, in pages of several tokens, and on two ranks. Every answer is held against logits that transformers computes over
prompt and answer, so that a token which is chosen by a tie makes no difference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.entrypoints.engine import Engine
from rtp_llm.srt.models.registry import reason
from rtp_llm.tools.auto_classes import computed, forget_last_prompt

ONE_BY_ONE, BATCHED, CHUNKED, WARM, SECOND_TURN, PAGES, TWO_RANKS = (
    "one by one", "batched", "chunked", "warm cache", "second turn", "pages", "two ranks",
)  # fmt: skip
ON_ONE_RANK = (ONE_BY_ONE, BATCHED, CHUNKED, WARM, SECOND_TURN, PAGES)
SCHEDULES = (*ON_ONE_RANK, TWO_RANKS)
PAGE_SIZE = 4  # tokens in a page of the engine that has pages of several
CHUNK_LEN = 16  # prompt tokens in a step of the engine that cuts prompts
NEW_TOKENS = 8
TOLERANCE = 1e-3  # of log-probabilities in float32
FOLLOW_UP = (3, 1, 4)  # the ids that a second turn adds to prompt and answer


@dataclass(frozen=True)
class Question:
    """A prompt as both sides get it.

    Args:
        name: for the report.
        ids: the prompt's ids; where media stand, the placeholders that transformers expects.
        call: what ``Engine.generate`` is called with; empty: these ids.
        extras: further arguments of transformers' forward, such as pixels.
        is_cached: whether the prefix cache may keep what is computed of it.
    """

    name: str
    ids: list[int]
    call: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    is_cached: bool = True

    def followed_by(self, output_ids: Sequence[int]) -> "Question":
        """Return the second turn: prompt, answer, and a few ids more. Only of a prompt without media."""
        return Question(f"{self.name}, second turn", [*self.ids, *output_ids, *FOLLOW_UP])


@dataclass(frozen=True)
class ScheduleResult:
    """How one schedule went.

    Args:
        difference: the largest one between log-probabilities of ours and of transformers, of all prompt and output
            tokens; a token that is not transformers' best counts as far as it lies below the best.
        question: the name of the one with that difference.
        median: the difference of half of the tokens is no larger.
        failure: why there is no answer.
        error: what was raised then.
    """

    schedule: str
    difference: float = 0.0
    question: str = ""
    failure: str = ""
    tolerance: float = TOLERANCE
    error: BaseException | None = field(default=None, compare=False, repr=False)
    median: float = 0.0

    @property
    def agrees(self) -> bool:
        return not self.failure and self.difference <= self.tolerance


class Teacher:
    """Transformers' model, which computes the log-probabilities of a prompt with a given answer.

    The answer is computed one token at a time from transformers' own cache; results are kept.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._known: dict[tuple[int, ...], torch.Tensor] = {}  # by the ids of prompt and answer

    @torch.inference_mode()
    def log_probs(self, question: Question, output_ids: Sequence[int]) -> torch.Tensor:
        """Return the log-probabilities [prompt + output - 1, vocab_size], float32: row i is of the token i + 1."""
        key = (*question.ids, *output_ids) if not question.extras else ()
        if key and key in self._known:
            return self._known[key]
        forget_last_prompt(self.model)
        logits, cache = computed(self.model, question.ids, **question.extras)
        rows = [logits[0]]
        for token_id in output_ids[:-1]:
            logits, cache = computed(self.model, [token_id], cache)
            rows.append(logits[0])
        result = torch.cat(rows).float().log_softmax(-1).cpu()
        if key:
            self._known[key] = result
        return result


def random_questions(vocab_size: int, lengths: Sequence[int], seed: int = 0) -> list[Question]:
    """Return one question of random ids per length; none of the first three ids, which tiny checkpoints end texts by,
    nor of the last one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(3, vocab_size - 1, (length,), generator=generator).tolist() for length in lengths]
    return [Question(f"{len(ids)} random ids", ids) for ids in drawn]


def run_schedules(
    args: ServerArgs,
    teacher: Teacher,
    questions: Sequence[Question],
    schedules: Sequence[str] = ON_ONE_RANK,
    tolerance: float = TOLERANCE,
    num_new: int = NEW_TOKENS,
) -> list[ScheduleResult]:
    """Ask an engine under each schedule; return what became of each, in order.

    Whatever the engine raises becomes the ``failure`` of the schedules that needed it.

    Args:
        args: of the engine. ``skip_tokenizer_init`` suits questions of ids.
        schedules: of SCHEDULES. They are served by four engines, one after the other: prompts whole; prompts in chunks
            of CHUNK_LEN tokens; these with pages of PAGE_SIZE tokens; and two ranks, to which a class that was
            registered in this process must be importable.
    """
    unknown = [name for name in schedules if name not in SCHEDULES]
    if unknown:
        raise ValueError(f"unknown schedules {', '.join(unknown)}; have {', '.join(SCHEDULES)}")
    engines = (
        (replace(args, chunked_prefill_size=-1), (ONE_BY_ONE, BATCHED)),
        (replace(args, chunked_prefill_size=CHUNK_LEN), (CHUNKED, WARM, SECOND_TURN)),
        (replace(args, chunked_prefill_size=CHUNK_LEN, page_size=PAGE_SIZE), (PAGES,)),
        (replace(args, tp_size=2), (TWO_RANKS,)),
    )
    found: dict[str, ScheduleResult] = {}
    for options, names in engines:
        wanted = [name for name in names if name in schedules]
        if wanted:
            found |= _run(options, teacher, questions, wanted, tolerance, num_new)
    return [found[name] for name in schedules]


def _run(
    args: ServerArgs, teacher: Teacher, questions: Sequence[Question], names: Sequence[str], tolerance: float, num: int
) -> dict[str, ScheduleResult]:
    """Run the schedules of one engine."""
    try:
        engine = Engine(server_args=args, inline=args.num_ranks == 1)
    except Exception as error:  # whatever a model file may raise: it is what the report is about
        return {name: ScheduleResult(name, failure=reason(error), error=error) for name in names}
    with engine:
        return {name: _run_one(name, Asker(engine, teacher, num), questions, tolerance) for name in names}


def _run_one(name: str, asker: "Asker", questions: Sequence[Question], tolerance: float) -> ScheduleResult:
    try:
        flushed, message = asker.engine.flush_cache()
        if not flushed:
            raise NotAnsweredError(message)
        differences = _WAYS[name](asker, questions)
    except Exception as error:  # whatever a model file may raise while it computes; it stops the engine
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return ScheduleResult(name, failure=reason(cause), error=cause)
    if not differences:
        return ScheduleResult(name, tolerance=tolerance)
    question, worst = max(differences, key=lambda item: float(item[1].max()))
    median = float(torch.cat([tokens for _, tokens in differences]).median())
    return ScheduleResult(name, float(worst.max()), question, tolerance=tolerance, median=median)


Differences = list[tuple[str, torch.Tensor]]  # (question, differences of its tokens)


class NotAnsweredError(RuntimeError):
    """The engine ended a request otherwise than with the wanted number of tokens, or cached nothing of it."""


@dataclass(frozen=True)
class Asker:
    """Asks an engine, and holds the answers against the teacher's."""

    engine: Engine
    teacher: Teacher
    num_new: int = NEW_TOKENS

    def ask(self, questions: Sequence[Question], **options: Any) -> list[dict[str, Any]]:
        """Ask at once, and return the answers, all of ``num_new`` greedy tokens."""
        params = {"temperature": 0, "max_new_tokens": self.num_new, "ignore_eos": True}
        calls = [dict(question.call or {"input_ids": question.ids}) for question in questions]
        names = dict.fromkeys(name for call in calls for name in call)
        merged: Any = {name: [call.get(name) for call in calls] for name in names}
        results: Any = self.engine.generate(sampling_params=params, return_logprob=True, **merged, **options)
        for question, result in zip(questions, results, strict=True):
            if len(result["output_ids"]) != self.num_new:
                raise NotAnsweredError(f"{question.name}: {result['meta_info']['finish_reason']}")
        return results

    def differences(self, questions: Sequence[Question], results: Sequence[Mapping[str, Any]]) -> Differences:
        return [
            (question.name, self._difference(question, result))
            for question, result in zip(questions, results, strict=True)
        ]

    def _difference(self, question: Question, result: Mapping[str, Any]) -> torch.Tensor:
        meta, output_ids = result["meta_info"], list(result["output_ids"])
        expected = self.teacher.log_probs(question, output_ids)
        ids = torch.tensor([*question.ids, *output_ids])[1:]
        entries = [*meta.get("input_token_logprobs", [])[1:], *meta["output_token_logprobs"]]
        ours = torch.tensor([entry[0] for entry in entries])
        expected, ids = expected[-len(ours) :], ids[-len(ours) :]
        chosen = expected.gather(1, ids[:, None])[:, 0]
        below_best = (expected.max(-1).values - chosen)[-len(output_ids) :]
        difference = (ours - chosen).abs()
        difference[-len(output_ids) :] = torch.maximum(difference[-len(output_ids) :], below_best)
        return difference.nan_to_num(float("inf"))


def _one_by_one(asker: Asker, questions: Sequence[Question]) -> Differences:
    return [pair for question in questions for pair in asker.differences([question], asker.ask([question]))]


def _batched(asker: Asker, questions: Sequence[Question]) -> Differences:
    return asker.differences(questions, asker.ask(questions, logprob_start_len=0))


def _warm(asker: Asker, questions: Sequence[Question]) -> Differences:
    """Ask a third time: of a model with states, the second leaves some where it could have begun.

    Of short prompts no states are kept; so it is the longest that must be cached.
    """
    for _ in range(2):
        asker.ask(questions)
    found, page_size = [], asker.engine.server_args.page_size
    longest = max(questions, key=lambda question: len(question.ids))
    for question in questions:
        results = asker.ask([question])
        must_be_cached = question is longest and question.is_cached and len(question.ids) > page_size
        if must_be_cached and not results[0]["meta_info"]["cached_tokens"]:
            raise NotAnsweredError(f"{question.name}: nothing of it was in the prefix cache at the third time")
        found += asker.differences([question], results)
    return found


def _second_turn(asker: Asker, questions: Sequence[Question]) -> Differences:
    """Ask prompts that hold the first answers, whose keys were computed one by one."""
    texts = [question for question in questions if not question.extras]
    results = asker.ask(texts) if texts else []
    seconds = [q.followed_by(result["output_ids"]) for q, result in zip(texts, results, strict=True)]
    return _one_by_one(asker, seconds)


def _cold_and_warm(asker: Asker, questions: Sequence[Question]) -> Differences:
    return [*_batched(asker, questions), *_one_by_one(asker, questions)]


_WAYS: dict[str, Callable[[Asker, Sequence[Question]], Differences]] = {
    ONE_BY_ONE: _one_by_one,
    BATCHED: _batched,
    CHUNKED: _batched,
    WARM: _warm,
    SECOND_TURN: _second_turn,
    PAGES: _cold_and_warm,
    TWO_RANKS: _cold_and_warm,
}
