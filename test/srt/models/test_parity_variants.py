"""Variants of Llama in our engine against transformers, in float32.

Each checkpoint is asked in chunks, batched, from a warm cache, and for a second turn.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers

from parity import (
    CHECKS,
    CHUNKS,
    PAGES,
    Case,
    Served,
    check_anew,
    check_quickly,
    check_two_ranks,
    engine_fixture,
)
from rtp_llm.srt.models.registry import ModelRegistry

SlowCase = partial(Case, slow=True)


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0} | parameters


YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0)
LLAMA3 = rope(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
SIX_HEADS = dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3)
CASES = (
    SlowCase("ernie4.5", "Ernie4_5ForCausalLM", SIX_HEADS | dict(use_bias=True, head_dim=14), PAGES),
    SlowCase(
        "ernie4.5-untied-no-bias",
        "Ernie4_5ForCausalLM",
        dict(tie_word_embeddings=False, rope_parameters=rope(rope_type="linear", factor=3.0)),
        CHUNKS,
    ),
    SlowCase("seed-oss", "SeedOssForCausalLM", SIX_HEADS | dict(head_dim=14), CHUNKS),
    SlowCase(
        "seed-oss-other-biases-tied",
        "SeedOssForCausalLM",
        dict(attention_bias=False, attention_out_bias=True, mlp_bias=True, tie_word_embeddings=True)
        | dict(rope_parameters=rope(rope_theta=500.0)),
        PAGES,
    ),
    SlowCase(
        "hunyuan",
        "HunYuanDenseV1ForCausalLM",
        SIX_HEADS
        | dict(head_dim=14, rms_norm_eps=1e-3, rope_parameters=rope(rope_type="dynamic", alpha=30.0, factor=1.0)),
        PAGES,
    ),
    SlowCase(
        "hunyuan-bias-tied",
        "HunYuanDenseV1ForCausalLM",
        dict(attention_bias=True, tie_word_embeddings=True, hidden_act="gelu"),
        CHUNKS,
    ),
    SlowCase(
        "apertus",
        "ApertusForCausalLM",
        SIX_HEADS | dict(head_dim=14, rms_norm_eps=1e-3, rope_parameters=rope(rope_theta=500.0)),
        CHUNKS,
    ),
    SlowCase(
        "apertus-bias-tied-relu2",
        "ApertusForCausalLM",
        dict(attention_bias=True, tie_word_embeddings=True, hidden_act="relu2", rope_parameters=LLAMA3),
        PAGES,
    ),
    SlowCase(
        "internlm3",
        "InternLM3ForCausalLM",
        SIX_HEADS | dict(head_dim=14, rope_parameters=rope(rope_type="dynamic", factor=6.0)),
        CHUNKS,
    ),
    SlowCase(
        "internlm3-bias-tied",
        "InternLM3ForCausalLM",
        dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        PAGES,
    ),
    SlowCase(
        "ministral3",
        "Ministral3ForCausalLM",
        SIX_HEADS | dict(head_dim=14, sliding_window=None, rope_parameters=YARN | {"llama_4_scaling_beta": 0.4}),
        PAGES,
    ),
    SlowCase(
        "ministral3-window-tied",
        "Ministral3ForCausalLM",
        dict(sliding_window=7, tie_word_embeddings=True)
        | dict(rope_parameters=YARN | {"llama_4_scaling_beta": 0.1, "rope_theta": 500.0}),
        CHUNKS,
    ),
)
QUICK = ("apertus", "ernie4.5", "seed-oss", "hunyuan", "internlm3", "ministral3")


engine_of_case = engine_fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_answers_are_those_of_transformers(engine_of_case: Served, check: Callable[[Served], None]) -> None:
    check_anew(check, engine_of_case)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.name in QUICK])
def test_one_prompt(case: Case, tmp_path: Path) -> None:
    check_quickly(case, tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("tensor-parallel")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.name in QUICK])
def test_two_ranks(case: Case, tmp_path: Path) -> None:
    check_two_ranks(case, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("HunYuanDenseV1ForCausalLM", {"use_cla": True}, "use_cla=True is not supported for hunyuan_v1_dense"),
        ("Ministral3ForCausalLM", {"rope_parameters": rope()}, "rope_parameters must have llama_4_scaling_beta"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(architecture: str, config: dict[str, Any], message: str) -> None:
    sizes = dict(vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    hf_config = getattr(transformers, architecture).config_class(**(sizes | {"num_key_value_heads": 1} | config))
    model_class, _ = ModelRegistry.resolve_model_cls([architecture])
    with pytest.raises(ValueError, match=message):
        model_class(hf_config)
