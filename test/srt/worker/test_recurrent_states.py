"""Models with recurrent states, and with nothing else, through the whole engine: every answer is exactly right."""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from history_models import VOCAB_SIZE, HistoryForCausalLM, HybridHistoryForCausalLM, answer, write_checkpoint

from rtp_llm import Engine, ModelRegistry

KINDS = (HistoryForCausalLM, HybridHistoryForCausalLM)
NEW_TOKENS = 12
Open = Callable[..., AbstractContextManager[Engine]]


@pytest.fixture(params=KINDS, ids=["alone", "hybrid"])
def kind(request: pytest.FixtureRequest) -> type:
    return request.param


@pytest.fixture
def open_engine(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setitem(ModelRegistry.models, kind.__name__, kind)
    model_path = write_checkpoint(tmp_path, kind)

    def open_it(**options: Any) -> Engine:
        options = {"max_total_tokens": 2048, "context_length": 1024, "load_format": "dummy"} | options
        return Engine(model_path=model_path, device="cpu", dtype="float32", skip_tokenizer_init=True, **options)

    yield open_it


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def ask(engine: Engine, kind: type, asked: list[list[int]], num_new: int = NEW_TOKENS) -> list[dict[str, Any]]:
    """Ask all at once, and check every answer."""
    params = {"temperature": 0, "max_new_tokens": num_new, "ignore_eos": True}
    results = engine.generate(input_ids=asked, sampling_params=params)
    for prompt, result in zip(asked, results, strict=True):
        assert result["output_ids"] == answer(prompt, num_new, kind.has_attention)
    return results


@pytest.mark.parametrize(
    "options",
    [{}, {"chunked_prefill_size": 16}, {"page_size": 4, "chunked_prefill_size": 7}, {"disable_radix_cache": True}],
    ids=str,
)
def test_answers_are_right(open_engine: Open, kind: type, options: dict[str, Any]) -> None:
    with open_engine(**options) as engine:
        for prompt in prompts(1, 5, 40):
            ask(engine, kind, [prompt])
        asked = prompts(1, 3, 17, 130, 16, 64, 65, 90, 2, 33, seed=1)
        ask(engine, kind, asked)
        results = ask(engine, kind, asked)  # a warm cache
        ask(engine, kind, [[*prompt, *r["output_ids"], 5, 7] for prompt, r in zip(asked, results, strict=True)])
