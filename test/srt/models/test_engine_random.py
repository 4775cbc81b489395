"""Random requests under random engine options give what each gives alone in a roomy engine, and leak nothing."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rtp_llm import Engine
from tiny_models import TIE_GAP, TINY_MODELS, is_close_race, tiny_model

CONTEXT_LEN = 200
STORIES = "stories260K"
MODELS = [STORIES, "qwen3-mixed-window7-tied", "mistral-window16-yarn", "llama-dynamic-mlp-bias"]
WAYS = ["plain", "plain", "stream", "stream", "close", "abort"]
STOPS = ["was", "ly.", ". She", "e", "the ", "\n", "Lily", "zz", " d"]
LISTS = ["input_token_logprobs", "output_token_logprobs"]
LISTS_OF_LISTS = ["input_top_logprobs", "output_top_logprobs", "input_token_ids_logprobs", "output_token_ids_logprobs"]


class Job(NamedTuple):
    input_ids: list[int]
    sampling_params: dict[str, Any]
    options: dict[str, Any]

    def arguments(self, **changed_params: Any) -> dict[str, Any]:
        return {"input_ids": self.input_ids, "sampling_params": self.sampling_params | changed_params}


class Answer(NamedTuple):
    """What a roomy engine gives: with the job's options, and the distributions of all its output tokens."""

    result: dict[str, Any]
    distributions: dict[str, Any]


class Corpus(NamedTuple):
    model: dict[str, Any]
    jobs: list[Job]
    answers: list[Answer]


def random_job(draw: random.Random, vocab_size: int, prefixes: list[list[int]], has_text: bool) -> Job:
    prefix = draw.choice(prefixes)
    own = [draw.randrange(3, vocab_size - 1) for _ in range(draw.choice([0, 1, 3, 10, 40]))]
    ids = [*prefix[: draw.choice([1, len(prefix) // 2 + 1, len(prefix)])], *own]
    room = CONTEXT_LEN - len(ids)
    params = {
        "temperature": draw.choice([0, 0.9, 1.3]),
        "seed": draw.randrange(1 << 40),
        "max_new_tokens": min(room, draw.choice([0, 1, 2, 10, 40, room])),
        "ignore_eos": draw.random() < 0.5,
        "frequency_penalty": draw.choice([0, 0, -0.5, 0.7]),
        "presence_penalty": draw.choice([0, 0, -0.3, 0.9]),
        "stop_token_ids": [draw.randrange(vocab_size) for _ in range(draw.choice([0, 0, 20]))],
        "stop": draw.sample(STOPS, draw.choice([0, 1, 2])) if has_text else [],
    }
    params["min_new_tokens"] = min(params["max_new_tokens"], draw.choice([0, 0, 1, 5, 20]))
    options: dict[str, Any] = {"cache_salt": draw.choice([None, None, "a", "b"])}
    if draw.random() < 0.5:
        options |= {
            "return_logprob": True,
            "logprob_start_len": draw.choice([-1, 0, len(ids) - 1, len(ids), draw.randint(0, len(ids))]),
            "top_logprobs_num": draw.choice([0, 3]),
            "token_ids_logprob": [draw.randrange(vocab_size) for _ in range(draw.choice([0, 2]))],
        }
    return Job(ids, params, options)


@pytest.fixture(scope="module", params=MODELS)
def corpus(request: pytest.FixtureRequest, data_dir: Path) -> Iterator[Corpus]:
    has_text = request.param == STORIES
    if has_text and not (data_dir / "models/stories260K-hf").is_dir():
        pytest.skip("no trained model")
    path = str(data_dir / "models/stories260K-hf") if has_text else tiny_model(request.param)
    vocab_size = 512 if has_text else TINY_MODELS[request.param].vocab_size
    model = {"model_path": path, "dtype": "float32", "device": "cpu", "context_length": CONTEXT_LEN}
    model["skip_tokenizer_init"] = not has_text
    draw = random.Random(request.param)
    prefixes = [[draw.randrange(3, vocab_size - 1) for _ in range(length)] for length in (5, 20, 60, 100)]
    jobs = [random_job(draw, vocab_size, prefixes, has_text) for _ in range(30)]
    with Engine(**model, max_total_tokens=2000, disable_radix_cache=True, chunked_prefill_size=-1) as roomy:
        answers = [
            Answer(
                roomy.generate(**job.arguments(), **job.options),
                roomy.generate(**job.arguments(stop=[]), return_logprob=True, top_logprobs_num=vocab_size),
            )
            for job in jobs
        ]
    yield Corpus(model, jobs, answers)


def random_options(draw: random.Random) -> dict[str, Any]:
    return {
        "chunked_prefill_size": draw.choice([1, 2, 7, 16, 64, -1]),
        "page_size": draw.choice([1, 1, 2, 4, 16]),
        "max_running_requests": draw.choice([1, 2, 5, 50]),
        "max_total_tokens": draw.choice([CONTEXT_LEN + 8, CONTEXT_LEN + 60, 400, 3000]),
        "schedule_policy": draw.choice(["lpm", "fcfs"]),
        "disable_radix_cache": draw.random() < 0.25,
        "max_prefill_tokens": draw.choice([1, 8, 50, 16384]),
        "swa_full_tokens_ratio": draw.choice([0.01, 0.3, 0.8, 1.0]),
    }


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_random_requests_under_random_options(corpus: Corpus, seed: int) -> None:
    draw = random.Random(seed)
    options = random_options(draw)
    ways = [(draw.choice(WAYS), draw.randint(1, 12)) for _ in corpus.jobs]
    with Engine(**corpus.model, **options) as engine, ThreadPoolExecutor(len(corpus.jobs)) as pool:
        lengths = [len(job.input_ids) + job.sampling_params["max_new_tokens"] for job in corpus.jobs]
        fits = [length <= engine.info["max_req_len"] for length in lengths]
        futures = [
            pool.submit(run, engine, job, *way, f"r{i}")
            for i, (job, way) in enumerate(zip(corpus.jobs, ways, strict=True))
            if fits[i]
        ]
        results = iter([future.result(timeout=120) for future in futures])
        for job, answer, way, fit in zip(corpus.jobs, corpus.answers, ways, fits, strict=True):
            if fit:
                compare(job, answer, next(results), partial=way[0] in ("close", "abort"))
        check_nothing_is_left(engine)


def run(engine: Engine, job: Job, way: str, num_results: int, rid: str) -> dict[str, Any]:
    """The job's last result. ``close`` and ``abort`` end it after ``num_results`` of a stream."""
    if way == "plain":
        return engine.generate(**job.arguments(), **job.options)
    stream: Any = engine.generate(**job.arguments(), **job.options, stream=True, rid=rid)
    text, result = "", {}
    for count, result in enumerate(stream, 1):
        assert result["text"].startswith(text)
        text = result["text"]
        if count == num_results and way == "close":
            stream.close()
        elif count == num_results and way == "abort":
            engine.abort(rid)
    return result


def compare(job: Job, answer: Answer, got: dict[str, Any], partial: bool) -> None:
    expected, ids = answer.result, got["output_ids"]
    drawn = answer.distributions["output_ids"]
    step = next((step for step, (a, b) in enumerate(zip(drawn, ids, strict=False)) if a != b), None)
    if step is not None:
        assert is_tie(job, answer.distributions, step, ids[step]), f"token {step} differs: {job}"
        print(f"tie accepted at token {step}: {job}")
        return
    reason = got["meta_info"]["finish_reason"]
    if partial and (reason is None or reason["type"] == "abort"):
        # Ids that a stop string may still cut are in a stream's results already.
        assert (drawn if reason is None else expected["output_ids"])[: len(ids)] == ids
        assert expected["text"].startswith(got["text"])
        return
    assert (ids, got["text"]) == (expected["output_ids"], expected["text"])
    assert reason == expected["meta_info"]["finish_reason"]
    compare_logprobs(got["meta_info"], expected["meta_info"])


def compare_logprobs(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in LISTS:
        assert [entry[1] for entry in got.get(key, [])] == [entry[1] for entry in expected.get(key, [])]
        assert numbers([got.get(key)]) == pytest.approx(numbers([expected.get(key)]), abs=1e-3)
    for key in LISTS_OF_LISTS:
        assert [None if e is None else len(e) for e in got.get(key, [])] == [
            None if e is None else len(e) for e in expected.get(key, [])
        ]
        assert numbers(got.get(key, [])) == pytest.approx(numbers(expected.get(key, [])), abs=1e-3)


def numbers(lists: list[Any]) -> list[float]:
    return [entry[0] for entries in lists for entry in entries or [] if entry[0] is not None]


def is_tie(job: Job, full: dict[str, Any], step: int, other_id: int) -> bool:
    """Whether rounding decides between the step's token and ``other_id``: two equal logits, or a close race."""
    params, own_id, before = job.sampling_params, full["output_ids"][step], full["output_ids"][:step]
    entries = full["meta_info"]["output_top_logprobs"][step]
    logits = torch.zeros(len(entries), dtype=torch.float64)
    for logprob, token_id, _ in entries:
        logits[token_id] = logprob
    for token_id in set(before):
        logits[token_id] -= params["presence_penalty"] + params["frequency_penalty"] * before.count(token_id)
    if params["temperature"] == 0:
        return abs(float(logits[own_id] - logits[other_id])) < TIE_GAP
    return is_close_race(logits, params, len(job.input_ids) + step, (other_id, own_id))


def check_nothing_is_left(engine: Engine) -> None:
    """Every page in use is the prefix cache's own, and flushing frees them all."""
    scheduler = engine._runner.core.scheduler
    deadline = time.monotonic() + 20
    while engine._client.num_live or not scheduler.idle:
        assert time.monotonic() < deadline, "requests that were left are still running"
        time.sleep(0.005)
    scheduler.check_integrity()
    memory = scheduler.memory
    for group, allocator in enumerate(memory.allocators):
        cached = 0 if scheduler.config.disable_radix_cache else memory.cache.num_pages(group)
        assert allocator.num_used == cached
    assert engine.flush_cache()
    assert all(allocator.num_used == 0 for allocator in memory.allocators)
