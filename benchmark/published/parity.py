"""Whether our engine answers as transformers does, in float32, from the same GGUF file.

Prompts are asked one by one, all in one batch, in chunks, and again from the warm prefix cache; long ones are made of
each language's prompts with their answers, and of all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmark.published.models import PublishedModel, prompts, short_texts
from benchmark.published.reference import Reference, gap_at
from benchmark.published.results import Place, Record
from rtp_llm import Engine

NEW_TOKENS = 40
CHUNK_LEN = 64
TOLERANCE = 1e-3
ONE_BY_ONE, BATCHED, WARM, CHUNKED, WARM_CHUNKED = (
    "one by one", "one batch", "warm cache", "chunks of 64", "warm cache, chunks of 64",
)  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What transformers answers to a prompt; log-probabilities are those of its ids but the first."""

    name: str
    ids: list[int]
    output_ids: list[int]
    log_probs: list[float]


@dataclass(frozen=True)
class Answered:
    """How many of the prompts got transformers' ids, and the largest difference of a prompt's log-probabilities."""

    schedule: str
    num_prompts: int
    num_equal: int
    difference: float | None  # None: from the cache there are none
    parted: list[str]  # where ids differ first


def measure(model: PublishedModel, file: Path, folder: Path, place: Place) -> Record:
    """Return the record of all schedules. ``folder``: of transformers' reading."""
    reference = Reference(folder)
    expected = expectations(reference)
    with Engine(model_path=str(file), dtype="float32", device="cpu", max_total_tokens=32768) as engine:
        same_ids = sum(list(engine.tokenizer(text).input_ids) == reference.ids(text) for text in short_texts())
        found = [
            ask(engine, reference, expected, ONE_BY_ONE),
            ask(engine, reference, expected, WARM),
            ask(engine, reference, expected, BATCHED),
        ]
    options = {"chunked_prefill_size": CHUNK_LEN}
    with Engine(model_path=str(file), dtype="float32", device="cpu", max_total_tokens=32768, **options) as engine:
        found.append(ask(engine, reference, expected, CHUNKED))
        found.append(ask(engine, reference, expected, WARM_CHUNKED))
    return {
        "texts": len(short_texts()),
        "same_token_ids": same_ids,
        "prompt_lengths": sorted(len(each.ids) for each in expected),
        "schedules": [asdict(each) for each in found],
    }


def expectations(reference: Reference) -> list[Expected]:
    """Return transformers' answers to all prompts, and to long ones that are made of these."""
    short = {language: [expect(reference, language, text) for text in texts] for language, texts in prompts().items()}
    long = {language: joined(answers) for language, answers in short.items()}
    long["all"] = [token_id for ids in long.values() for token_id in ids]
    answers = [answer for of_language in short.values() for answer in of_language]
    return answers + [expect_ids(reference, f"long, {name}", ids) for name, ids in long.items()]


def expect(reference: Reference, name: str, text: str) -> Expected:
    return expect_ids(reference, name, reference.ids(text))


def expect_ids(reference: Reference, name: str, ids: list[int]) -> Expected:
    return Expected(name, ids, reference.greedy(ids, NEW_TOKENS), reference.log_probs(ids))


def joined(answers: Sequence[Expected]) -> list[int]:
    return [token_id for answer in answers for token_id in [*answer.ids, *answer.output_ids]]


def ask(engine: Any, reference: Reference, expected: Sequence[Expected], schedule: str) -> Answered:
    """Ask all prompts under a schedule; only a warm one leaves what is cached."""
    warm = schedule in (WARM, WARM_CHUNKED)
    options: dict[str, Any] = {} if warm else {"return_logprob": True, "logprob_start_len": 0}
    if not warm:
        engine.flush_cache()
    results = answers_of(engine, [each.ids for each in expected], schedule == BATCHED, options)
    parted = [
        where(reference, each, result["output_ids"])
        for each, result in zip(expected, results, strict=True)
        if result["output_ids"] != each.output_ids
    ]
    differences = [] if warm else [difference(each, result) for each, result in zip(expected, results, strict=True)]
    print(f"  {schedule}: {len(expected) - len(parted)} of {len(expected)} equal, {max(differences, default=0):.2g}")
    return Answered(schedule, len(expected), len(expected) - len(parted), max(differences, default=None), parted)


def answers_of(
    engine: Any, prompt_ids: Sequence[list[int]], together: bool, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True, "repetition_penalty": 1.0}
    if together:
        return engine.generate(input_ids=list(prompt_ids), sampling_params=params, **options)
    return [engine.generate(input_ids=ids, sampling_params=params, **options) for ids in prompt_ids]


def difference(expected: Expected, result: Mapping[str, Any]) -> float:
    """Return the largest difference of the log-probabilities of a prompt's ids."""
    ours = [entry[0] for entry in result["meta_info"]["input_token_logprobs"][1:]]
    return max((abs(a - b) for a, b in zip(ours, expected.log_probs, strict=True)), default=0.0)


def where(reference: Reference, expected: Expected, output_ids: Sequence[int]) -> str:
    """Return where ids differ first, and by how much transformers prefers its own there."""
    i = next(i for i, (a, b) in enumerate(zip(output_ids, expected.output_ids, strict=True)) if a != b)
    gap = gap_at(reference, [*expected.ids, *expected.output_ids[:i]])
    return f"{expected.name} {expected.ids[:3]}: token {i}, transformers' two best {gap:.2g} apart"


def table(records: Mapping[str, Record]) -> str:
    """Markdown, of the records of models by their titles."""
    lines = ["| | prompts | ids equal | log-probabilities, largest difference |", "|---|---|---|---|"]
    for title, record in records.items():
        for row in record["schedules"]:
            shown = "–" if row["difference"] is None else f"{row['difference']:.1e}"
            lines.append(f"| {title}: {row['schedule']} | {row['num_prompts']} | {row['num_equal']} | {shown} |")
    for title, record in records.items():
        lengths = record["prompt_lengths"]
        lines += ["", f"{title}: prompts of {lengths[0]} to {lengths[-1]} tokens; our tokenizer gives "]
        lines[-1] += f"transformers' ids for {record['same_token_ids']} of {record['texts']} texts."
        lines += [
            f"- {schedule['schedule']}: {parted}" for schedule in record["schedules"] for parted in schedule["parted"]
        ]
    return "\n".join(lines)
