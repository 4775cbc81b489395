"""Models with layer norms and rotated or learned positions, in our engine against transformers, in float32."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers

from parity import (
    CHECKS,
    CHUNKS,
    CONTEXT_LENGTH,
    PAGES,
    Case,
    Served,
    check_anew,
    check_quickly,
    check_two_ranks,
    engine_fixture,
    open_engine,
)
from rtp_llm.srt.models.registry import ModelRegistry

SlowCase = partial(Case, slow=True)


def partly(rotated: float, **parameters: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": rotated} | parameters
    return {"rope_parameters": rope}


SIX_HEADS = dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2)
CASES = (
    SlowCase("gptj", "GPTJForCausalLM", dict(hidden_size=60, num_attention_heads=6, rotary_dim=6, n_inner=44), PAGES),
    SlowCase(
        "gptj-tied",
        "GPTJForCausalLM",
        dict(tie_word_embeddings=True, activation_function="relu", layer_norm_epsilon=1e-3, rotary_dim=16),
        CHUNKS,
    ),
    SlowCase("opt", "OPTForCausalLM", dict(hidden_size=60, num_attention_heads=6, word_embed_proj_dim=60), PAGES),
    SlowCase(
        "opt-norms-after-projected",
        "OPTForCausalLM",
        dict(hidden_size=48, word_embed_proj_dim=28, do_layer_norm_before=False, activation_function="gelu"),
        CHUNKS,
    ),
    SlowCase(
        "opt-plain-norms-no-biases-untied",
        "OPTForCausalLM",
        dict(layer_norm_elementwise_affine=False, enable_bias=False, tie_word_embeddings=False, ffn_dim=52),
        CHUNKS,
    ),
    SlowCase("opt-no-last-norm", "OPTForCausalLM", dict(_remove_final_layer_norm=True), PAGES),
    SlowCase("phi", "PhiForCausalLM", SIX_HEADS | partly(0.4), PAGES),
    SlowCase(
        "phi-normed-heads-tied",
        "PhiForCausalLM",
        SIX_HEADS
        | partly(0.4, rope_type="linear", factor=3.0)
        | dict(hidden_act="relu", layer_norm_eps=1e-3)
        | dict(qk_layernorm=True, tie_word_embeddings=True),
        CHUNKS,
    ),
    SlowCase("stablelm", "StableLmForCausalLM", SIX_HEADS | partly(0.4) | dict(use_qkv_bias=True), PAGES),
    SlowCase(
        "stablelm-parallel-normed-heads",
        "StableLmForCausalLM",
        SIX_HEADS | partly(0.8) | dict(use_parallel_residual=True, qk_layernorm=True, layer_norm_eps=1e-3),
        CHUNKS,
    ),
    SlowCase("stablelm-tied-gelu", "StableLmForCausalLM", dict(tie_word_embeddings=True, hidden_act="gelu"), CHUNKS),
    SlowCase("nemotron", "NemotronForCausalLM", SIX_HEADS | partly(0.6) | dict(head_dim=14), CHUNKS),
    SlowCase(
        "nemotron-biases-tied",
        "NemotronForCausalLM",
        dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, hidden_act="silu", norm_eps=1e-3),
        PAGES,
    ),
    SlowCase("persimmon", "PersimmonForCausalLM", dict(hidden_size=60, num_attention_heads=6) | partly(0.4), PAGES),
    SlowCase(
        "persimmon-plain-heads-tied",
        "PersimmonForCausalLM",
        dict(qk_layernorm=False, tie_word_embeddings=True, hidden_act="gelu", layer_norm_eps=1e-3),
        CHUNKS,
    ),
)
BY_NAME = {case.name: case for case in CASES}
QUICK = [BY_NAME[name] for name in ("gptj", "opt", "phi", "stablelm", "nemotron", "persimmon")]
TWO_RANKS = [*QUICK, BY_NAME["opt-norms-after-projected"], BY_NAME["stablelm-parallel-normed-heads"]]


engine_of_case = engine_fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_answers_are_those_of_transformers(engine_of_case: Served, check: Callable[[Served], None]) -> None:
    check_anew(check, engine_of_case)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in QUICK])
def test_one_prompt(case: Case, tmp_path: Path) -> None:
    check_quickly(case, tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("tensor-parallel")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in TWO_RANKS])
def test_two_ranks(case: Case, tmp_path: Path) -> None:
    check_two_ranks(case, tmp_path)


def test_opt_is_not_served_past_its_positions(tmp_path: Path) -> None:
    model_dir = BY_NAME["opt"].make(tmp_path)
    with pytest.raises(Exception, match=f"{CONTEXT_LENGTH} tokens"):
        open_engine(model_dir, context_length=CONTEXT_LENGTH + 1)


def test_gptj_without_rotation_is_refused() -> None:
    model_class, _ = ModelRegistry.resolve_model_cls(["GPTJForCausalLM"])
    with pytest.raises(ValueError, match="rotary_dim must be the number of components of a head that are rotated"):
        model_class(transformers.GPTJConfig(vocab_size=8, n_embd=16, n_head=2, n_layer=1, rotary_dim=0))
