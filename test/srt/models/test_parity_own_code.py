"""InternLM2 and Ling, which transformers has no class for, in our engine against plain models, in float32.

Each checkpoint is asked in chunks, batched, from a warm cache, and for a second turn.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

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
    open_engine,
)

SlowCase = partial(Case, slow=True)
SIX_HEADS = dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3)
CASES = (
    SlowCase("internlm2", "InternLM2ForCausalLM", SIX_HEADS | dict(bias=True, rope_theta=500.0), PAGES),
    SlowCase("internlm2-one-key-head", "InternLM2ForCausalLM", dict(num_key_value_heads=1), CHUNKS),
    SlowCase(
        "ling",
        "BailingMoeForCausalLM",
        SIX_HEADS
        | dict(head_dim=14, num_experts=5, num_experts_per_tok=3, num_shared_experts=2, use_qkv_bias=True)
        | dict(rope_theta=500.0, first_k_dense_replace=0),
        CHUNKS,
    ),
    SlowCase("ling-not-normed", "BailingMoeForCausalLM", dict(norm_topk_prob=False, num_shared_experts=0), PAGES),
    SlowCase(
        "ling-2",
        "BailingMoeV2ForCausalLM",
        SIX_HEADS
        | dict(head_dim=12, num_experts=8, num_experts_per_tok=3, use_qk_norm=True, partial_rotary_factor=0.5)
        | dict(n_group=4, topk_group=2, routed_scaling_factor=2.5),
        PAGES,
    ),
)
QUICK = ("internlm2", "ling", "ling-2")
ONE_OF_EACH = [pytest.param(case, id=case.name) for case in CASES if case.name in QUICK]


engine_of_case = engine_fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_answers_are_those_of_plain_models(engine_of_case: Served, check: Callable[[Served], None]) -> None:
    check_anew(check, engine_of_case)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_one_prompt(case: Case, tmp_path: Path) -> None:
    check_quickly(case, tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("tensor-parallel")
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_two_ranks(case: Case, tmp_path: Path) -> None:
    check_two_ranks(case, tmp_path)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ling", {"norm_head": True}, "norm_head=True is not supported for bailing_moe"),
        ("ling", {"use_bias": True}, "use_bias=True"),
        ("ling", {"score_function": "sigmoid"}, "score_function='sigmoid'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    name: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    case = next(case for case in CASES if case.name == name)
    with pytest.raises(Exception, match=message):
        open_engine(Case(case.name, case.architecture, case.config | config).make(tmp_path))
