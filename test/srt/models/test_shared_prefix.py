"""Prefixes that attention reads once for several requests: the answers are those of reading them each time."""

from pathlib import Path
from typing import Any

import pytest

from rtp_llm import Engine
from rtp_llm.srt.devices.cpu.build import kernels_work
from rtp_llm.srt.scheduler import sharing
from tiny_models import TINY_MODELS, assert_same_ids, make_tiny, random_prompts, reference, tiny_model

pytestmark = pytest.mark.skipif(not kernels_work(), reason="there is no C++ compiler")


NEW_TOKENS = 12


def answers(model_dir: str, prompts: list[list[int]], **options: Any) -> tuple[list[dict[str, Any]], int]:
    """Results, and how many tokens attention did not have to read."""
    greedy = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    with Engine(
        model_path=model_dir,
        dtype="float32",
        device="cpu",
        skip_tokenizer_init=True,
        context_length=256,
        inline=True,
        **options,
    ) as engine:
        results = engine.generate(input_ids=prompts, sampling_params=greedy, return_logprob=True)
        return results, engine._runner.core.scheduler.stats.shared_tokens


@pytest.fixture(autouse=True)
def short_prefixes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "MIN_PREFIX_TOKENS", 64)


@pytest.mark.parametrize("options", [{"page_size": 4}, {"max_total_tokens": 400}], ids=["pages", "little memory"])
@pytest.mark.parametrize("name", ["llama-default", "qwen2-mixed-window16"])
def test_answers_are_equal(name: str, options: dict[str, int]) -> None:
    """24 requests share 100 tokens, and 6 of them 70 more."""
    prefix, more = random_prompts(TINY_MODELS[name].vocab_size, (100, 70))
    prompts = [[*prefix, *(more if i % 4 == 0 else []), 1 + i, 2 + i // 2, 3] for i in range(24)]
    options = {"max_total_tokens": 4000, **options}
    shared, saved = answers(tiny_model(name), prompts, **options)
    alone, none_saved = answers(tiny_model(name), prompts, disable_prefix_sharing=True, **options)
    assert saved > 0 and none_saved == 0
    for ours, expected in zip(shared, alone, strict=True):
        assert ours["output_ids"] == expected["output_ids"]
        ours_logprobs, expected_logprobs = (
            [entry[0] for entry in result["meta_info"]["output_token_logprobs"]] for result in (ours, expected)
        )
        assert ours_logprobs == pytest.approx(expected_logprobs, abs=1e-4)


def test_biases_by_distance(tmp_path: Path) -> None:
    """With ALiBi keys have no positions in them, so that a prefix is the same wherever queries stand."""
    model_dir = make_tiny("BloomForCausalLM", tmp_path)
    prefix = random_prompts(90, [100])[0]
    prompts = [[*prefix, 1 + i, *range(3, 3 + i)] for i in range(8)]
    shared, saved = answers(model_dir, prompts, max_total_tokens=4000)
    alone, none_saved = answers(model_dir, prompts, max_total_tokens=4000, disable_prefix_sharing=True)
    assert saved > 0 and none_saved == 0
    for prompt, ours, other in zip(prompts, shared, alone, strict=True):
        expected = reference(model_dir, tuple(prompt), NEW_TOKENS)
        assert_same_ids(ours["output_ids"], expected, "shared")
        assert_same_ids(other["output_ids"], expected, "alone")


def test_plain_torch_shares_nothing() -> None:
    prompts = [[*range(1, 100), 100 + i, 7] for i in range(4)]
    _, saved = answers(tiny_model("llama-default"), prompts, attention_backend="torch_native", max_total_tokens=2000)
    assert saved == 0
