"""The checkpoints and the reference that parity tests stand on are themselves worth something."""

import json
import statistics
from pathlib import Path

import pytest
import torch
import transformers

from tiny_models import ORIGINAL_LEN, TIE_GAP, TINY_MODELS, assert_same_ids, random_prompts, reference, tiny_model

# All are made and read by the same code: one of each architecture, with other positions each, stands for them.
QUICK = ("llama-dynamic-mlp-bias", "mistral-window16-yarn", "qwen2-mixed-window16", "qwen3-mixed-window7-tied")
NAMES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in TINY_MODELS]


@pytest.mark.parametrize("name", NAMES)
def test_reference_equals_plain_generation_by_a_fresh_model(name: str) -> None:
    model_dir = tiny_model(name)
    prompt = random_prompts(TINY_MODELS[name].vocab_size, [ORIGINAL_LEN - 4])[0]
    reference(model_dir, tuple(random_prompts(TINY_MODELS[name].vocab_size, [150])[0]), 4)  # must leave no trace
    found = reference(model_dir, tuple(prompt), 12)

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert_same_ids(expected[0, len(prompt) :].tolist(), found, name)
    assert len(found.prompt_logprobs) == len(prompt) - 1


@pytest.mark.parametrize("name", NAMES)
def test_answers_vary_and_have_few_ties(name: str) -> None:
    answers = [
        reference(tiny_model(name), tuple(prompt), 24)
        for prompt in random_prompts(TINY_MODELS[name].vocab_size, [5, 30, 100])
    ]
    assert min(len(set(answer.output_ids)) for answer in answers) >= 6
    assert answers[0].output_ids != answers[1].output_ids != answers[2].output_ids
    gaps = [gap for answer in answers for gap in answer.gaps]
    assert sum(gap < TIE_GAP for gap in gaps) <= 1
    assert statistics.median(gaps) > 100 * TIE_GAP


def test_the_checkpoints_cover_what_the_engine_promises() -> None:
    configs = [json.loads((Path(tiny_model(name)) / "config.json").read_text()) for name in TINY_MODELS]
    assert {config["architectures"][0] for config in configs} == {
        f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
    }
    kinds = {config["rope_parameters"]["rope_type"] for config in configs}
    assert kinds == {"default", "linear", "dynamic", "llama3", "yarn", "longrope"}
    # each family with another base than the usual one, or nobody would notice that a model file forgets to hand it on
    unusual = {config["architectures"][0] for config in configs if config["rope_parameters"]["rope_theta"] != 1e4}
    assert len(unusual) == 4
    assert {config["tie_word_embeddings"] for config in configs} == {True, False}
    assert {config.get("sliding_window") for config in configs} == {None, 7, 16}
    assert {config.get("attention_bias", False) for config in configs} == {True, False}
    assert any(config.get("mlp_bias") for config in configs)
    assert any(config.get("head_dim", 0) * config["num_attention_heads"] != config["hidden_size"] for config in configs)
