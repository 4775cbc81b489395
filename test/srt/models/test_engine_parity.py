"""Our engine against transformers: the same greedy ids and log-probabilities under every schedule.

Every tiny checkpoint is served with whole prompts and with chunks of 16, with pages of one token and of four. One
engine per configuration is used for all its tests, and its cache is emptied before each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from rtp_llm import Engine
from tiny_models import TINY_MODELS, Reference, TinyModel, assert_same_ids, random_prompts, reference, tiny_model

LENGTHS = (5, 1, 17, 52, 200)  # one grows past the original length of 64, one is long past it and past any window
NEW_TOKENS = 20
LOGPROB_TOLERANCE = 1e-3
CONFIGURATIONS: dict[str, dict[str, int]] = {
    "page1": {},
    "page1-chunk16": {"chunked_prefill_size": 16},
    "page4-chunk16": {"page_size": 4, "chunked_prefill_size": 16},
}
PARITY_MODELS = [name for name in TINY_MODELS if not name.endswith("-tp")]
# Chunks and large pages are the cache's matter, not the model's: these kinds of cache stand for all in the quick run.
QUICK_IN_CHUNKS = ("llama-default", "llama-dynamic-mlp-bias", "mistral-window7", "qwen3-mixed-window7-tied")


def marks(name: str, configuration: str) -> list[pytest.MarkDecorator]:
    slow = configuration != "page1" and name not in QUICK_IN_CHUNKS
    return [pytest.mark.xdist_group(name), *([pytest.mark.slow] if slow else [])]


@dataclass(frozen=True)
class Served:
    """An engine, the prompts it is asked, and what transformers answers to them."""

    engine: Engine
    model: TinyModel
    page_size: int
    prompts: list[list[int]]
    references: list[Reference]

    def generate(self, input_ids: Any, max_new_tokens: int = NEW_TOKENS, **options: Any) -> Any:
        params = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        return self.engine.generate(input_ids=input_ids, sampling_params=params, **options)

    def most_cached(self, limit: int) -> int:
        """The longest prefix of at most ``limit`` tokens that whole pages can hold."""
        return limit // self.page_size * self.page_size


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, configuration), id=f"{name}-{configuration}", marks=marks(name, configuration))
        for name in PARITY_MODELS
        for configuration in CONFIGURATIONS
    ],
)
def engine_of_case(request: pytest.FixtureRequest) -> Iterator[Served]:
    name, configuration = request.param
    model, options = TINY_MODELS[name], CONFIGURATIONS[configuration]
    prompts = random_prompts(model.vocab_size, LENGTHS)
    references = [reference(tiny_model(name), tuple(prompt), NEW_TOKENS) for prompt in prompts]
    with Engine(
        model_path=tiny_model(name),
        dtype="float32",
        device="cpu",
        skip_tokenizer_init=True,
        context_length=512,
        max_total_tokens=4096,
        **options,
    ) as engine:
        yield Served(engine, model, options.get("page_size", 1), prompts, references)


@pytest.fixture
def served(engine_of_case: Served) -> Served:
    flushed, message = engine_of_case.engine.flush_cache()
    assert flushed, message
    return engine_of_case


def check_ids(served: Served, results: list[dict[str, Any]], what: str) -> None:
    for result, prompt, expected in zip(results, served.prompts, served.references, strict=True):
        assert_same_ids(result["output_ids"], expected, f"{served.model.name}, {what}, prompt of {len(prompt)}")
        assert result["meta_info"]["prompt_tokens"] == len(prompt)
        assert result["meta_info"]["completion_tokens"] == NEW_TOKENS
        assert result["meta_info"]["finish_reason"] == {"type": "length", "length": NEW_TOKENS}


def check_prompt_logprobs(result: dict[str, Any], prompt: list[int], expected: Reference, start: int) -> None:
    """Entries are ``(logprob, id, text)`` of tokens ``start ...``; the first has no logprob."""
    entries = result["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in entries] == prompt[start:]
    if entries:
        assert entries[0][0] is None
    ours = [entry[0] for entry in entries[1:]]
    assert ours == pytest.approx(expected.prompt_logprobs[start:], abs=LOGPROB_TOLERANCE)


def test_one_by_one(served: Served) -> None:
    results = [served.generate(prompt) for prompt in served.prompts]
    check_ids(served, results, "one by one")
    assert results[0]["meta_info"]["cached_tokens"] == 0


def test_batched_with_unequal_lengths(served: Served) -> None:
    check_ids(served, served.generate(served.prompts), "batched")


def test_from_a_warm_cache(served: Served) -> None:
    check_ids(served, served.generate(served.prompts), "cold")
    for prompt, expected in zip(served.prompts, served.references, strict=True):
        result = served.generate(prompt)
        assert_same_ids(result["output_ids"], expected, f"{served.model.name}, warm, prompt of {len(prompt)}")
        cached, most = result["meta_info"]["cached_tokens"], served.most_cached(len(prompt) - 1)
        if served.model.windows and served.page_size > 1:
            assert cached <= most  # the page that a window reaches back into may be gone
        else:
            assert cached == most


def test_warm_and_batched(served: Served) -> None:
    served.generate(served.prompts)
    check_ids(served, served.generate(served.prompts), "warm and batched")


def test_prompt_and_output_logprobs_from_a_cold_cache(served: Served) -> None:
    results = served.generate(served.prompts, return_logprob=True, logprob_start_len=0)
    check_ids(served, results, "with logprobs")
    for result, prompt, expected in zip(results, served.prompts, served.references, strict=True):
        check_prompt_logprobs(result, prompt, expected, start=0)
        if result["output_ids"] == expected.output_ids:  # else a tie was accepted above
            ours = [entry[0] for entry in result["meta_info"]["output_token_logprobs"]]
            assert ours == pytest.approx(expected.output_logprobs, abs=LOGPROB_TOLERANCE)


def test_prompt_logprobs_from_a_warm_cache(served: Served) -> None:
    served.generate(served.prompts)
    for prompt, expected in zip(served.prompts, served.references, strict=True):
        start = len(prompt) * 2 // 3
        result = served.generate(prompt, return_logprob=True, logprob_start_len=start)
        assert_same_ids(result["output_ids"], expected, f"{served.model.name}, warm with logprobs")
        check_prompt_logprobs(result, prompt, expected, start)
        cached = result["meta_info"]["cached_tokens"]
        assert cached <= start
        if not served.model.windows:
            assert cached == served.most_cached(start)


def test_a_longer_prompt_reuses_a_shorter_one(served: Served) -> None:
    """The cached part was computed under another schedule, and perhaps for another length."""
    for length in (30, 60, 120):
        prompt = served.prompts[-1][:length]
        expected = reference(tiny_model(served.model.name), tuple(prompt), NEW_TOKENS)
        assert_same_ids(served.generate(prompt)["output_ids"], expected, f"{served.model.name}, first {length} tokens")


def test_a_conversation_goes_on_from_generated_tokens(served: Served) -> None:
    """The second prompt holds the first answer, whose keys were computed one by one."""
    for first in (served.prompts[0], served.prompts[3]):
        answer = served.generate(first)["output_ids"]
        prompt = [*first, *answer, 3, 1, 4]
        expected = reference(tiny_model(served.model.name), tuple(prompt), NEW_TOKENS)
        assert_same_ids(served.generate(prompt)["output_ids"], expected, f"{served.model.name}, second turn")
