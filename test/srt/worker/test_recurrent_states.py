"""Models with recurrent states, and with nothing else, through the whole engine: every answer is exactly right."""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from history_models import VOCAB_SIZE, HistoryForCausalLM, HybridHistoryForCausalLM, answer, write_checkpoint

from rtp_llm import Engine, ModelRegistry
from rtp_llm.srt.checkpoint import read_model_config
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.devices.cpu.graphs import CpuGraph
from rtp_llm.srt.engine.executor import InProcessExecutor
from rtp_llm.srt.worker.worker import WorkerConfig
from rtp_llm.tools.step_driver import StepDriver

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


def alike(common: int, count: int, seed: int = 2) -> list[list[int]]:
    """Prompts that share ``common`` tokens."""
    [prefix, *rest] = prompts(common, *range(5, 5 + 9 * count, 9), seed=seed)
    return [[*prefix, place % VOCAB_SIZE, *own] for place, own in enumerate(rest)]


@pytest.mark.parametrize("options", [{}, {"chunked_prefill_size": 100}, {"page_size": 8}], ids=str)
def test_a_common_prefix_is_resumed_amid_chunks(open_engine: Open, kind: type, options: dict[str, Any]) -> None:
    """Its states are saved amid a chunk, at intervals and where prompts part."""
    asked = alike(205, 7)
    with open_engine(state_checkpoint_interval=64, **options) as engine:
        [first, *others] = [result["meta_info"]["cached_tokens"] for result in ask(engine, kind, asked)]
        assert first == 0 and all(tokens in (192, 200, 205) for tokens in others)
        longer = [[*prompt, 3, 1, 4, 1, 5] for prompt in asked]
        assert all(result["meta_info"]["cached_tokens"] >= 192 for result in ask(engine, kind, longer))


def test_slots_for_two_requests_and_one_checkpoint(open_engine: Open, kind: type) -> None:
    with open_engine(max_running_requests=2, state_cache_fraction=0.0, chunked_prefill_size=32) as engine:
        runner: Any = engine._runner
        assert (runner.core.info.max_running_requests, runner.core.states.num_slots) == (2, 3)
        assert runner.core.info.state_bytes == 2 * 4 + 3 * 2
        ask(engine, kind, [*alike(70, 8), *prompts(*range(1, 40, 5), seed=3)], num_new=5)


def test_requests_that_are_retracted(open_engine: Open, kind: type) -> None:
    """A model without attention has no pages to run out of."""
    with open_engine(max_total_tokens=160, context_length=128) as engine:
        results = ask(engine, kind, prompts(20, 21, 22, 23, seed=4), num_new=60)
    assert (sum(result["meta_info"]["num_retractions"] for result in results) > 0) == kind.has_attention


def test_a_chat_computes_each_token_once(open_engine: Open, kind: type) -> None:
    with open_engine() as engine:
        ids: list[int] = []
        for turn, said in enumerate(prompts(9, 70, 3, 1, seed=5)):
            known, ids = len(ids), [*ids, *said]
            (result,) = ask(engine, kind, [ids])
            assert result["meta_info"]["cached_tokens"] == (known - 1 if turn else 0)
            ids = [*ids, *result["output_ids"]]


def test_prompt_logprobs_beside_a_warm_cache(open_engine: Open, kind: type) -> None:
    [prompt] = prompts(150, seed=6)
    with open_engine() as engine:
        params = {"temperature": 0, "max_new_tokens": 3}
        asked = {"sampling_params": params, "return_logprob": True, "logprob_start_len": 100}
        cold, warm = (engine.generate(input_ids=prompt, **asked)["meta_info"] for _ in range(2))
    assert cold["input_token_logprobs"] == warm["input_token_logprobs"] and len(cold["input_token_logprobs"]) == 50
    assert (cold["cached_tokens"], warm["cached_tokens"]) == (0, 0), "no checkpoint lies before the first logprob"


@pytest.mark.slow
def test_two_ranks(open_engine: Open, kind: type) -> None:
    with open_engine(tp_size=2) as engine:
        ask(engine, kind, [*alike(70, 4), *prompts(1, 30, seed=7)], num_new=4)


def test_steps_without_a_scheduler(open_engine: Open, kind: type, tmp_path: Path) -> None:
    """As ``verify`` and ``bench_one_batch`` run them."""
    args = ServerArgs(model_path=str(tmp_path), device="cpu", dtype="float32", load_format="dummy")
    executor = InProcessExecutor(WorkerConfig(args, read_model_config(args), "cpu"))
    num_groups = len(executor.load().layout.groups)
    executor.init_cache([200] * num_groups, 3, 100, num_state_slots=3)
    driver = StepDriver(executor, num_groups, page_size=1)
    for batch in (prompts(10, 11, 12, seed=8), prompts(7, 9, seed=9)):
        driver.start(batch, 9)
        driver.step([4] * len(batch))
        results = [driver.step([len(prompt) - 4 for prompt in batch])]
        results += [driver.step([1] * len(batch)) for _ in range(8)]
        for row, prompt in enumerate(batch):
            assert [r.rows[row].token_ids[0] for r in results] == answer(prompt, 9, kind.has_attention)
    recorder: Any = executor.worker.runner.recorder
    assert any(isinstance(graph, CpuGraph) for graph in recorder._graphs.values()), "decode steps were recorded"
