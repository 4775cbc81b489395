"""DeepSeek-V2 and V3 in our engine, which attends over latents, against transformers, which makes keys and values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parity import (
    CHECKS,
    CHUNKS,
    PAGES,
    Case,
    Served,
    Tensors,
    check_anew,
    check_other_layout,
    check_two_ranks,
    disturb_correction_biases,
    engine_fixture,
    open_engine,
)

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8,
    "beta_slow": 1,
}


V2 = Case(
    "deepseek-v2",
    "DeepseekV2ForCausalLM",
    dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=6, q_lora_rank=None, v_head_dim=12)
    | dict(n_routed_experts=6, n_shared_experts=2, num_experts_per_tok=3, topk_method="greedy", n_group=None)
    | dict(routed_scaling_factor=1.7, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}),
    PAGES,
)
V3 = Case(
    "deepseek-v3",
    "DeepseekV3ForCausalLM",
    dict(hidden_size=56, v_head_dim=12, q_lora_rank=20, n_routed_experts=8, num_experts_per_tok=3)
    | dict(n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, attention_bias=True)
    | dict(num_hidden_layers=3, num_nextn_predict_layers=1)
    | dict(rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}),
    CHUNKS,
    edit=disturb_correction_biases,
)

CASES = (
    V2,
    Case(
        "deepseek-v2-groups",
        "DeepseekV2ForCausalLM",
        dict(hidden_size=64, q_lora_rank=20, attention_bias=True, mlp_bias=True, first_k_dense_replace=0)
        | dict(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, topk_method="group_limited_greedy")
        | dict(routed_scaling_factor=3.0, n_shared_experts=1, tie_word_embeddings=True, rms_norm_eps=1e-3),
        CHUNKS,
        slow=True,
    ),
    V3,
    Case(
        "deepseek-v3-halves-plain-weights",
        "DeepseekV3ForCausalLM",
        dict(rope_interleave=False, q_lora_rank=None, norm_topk_prob=False, n_routed_experts=6, n_group=2, topk_group=1)
        | dict(first_k_dense_replace=2, v_head_dim=20, qk_nope_head_dim=10, hidden_act="gelu")
        | dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "mscale_all_dim": 1.0}),
        PAGES,
        edit=disturb_correction_biases,
        slow=True,
    ),
)


engine_of_case = engine_fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_answers_are_those_of_transformers(engine_of_case: Served, check: Callable[[Served], None]) -> None:
    check_anew(check, engine_of_case)


@pytest.mark.usefixtures("warm_processes")
@pytest.mark.xdist_group("tensor-parallel")
@pytest.mark.parametrize("case", [pytest.param(V2, id=V2.name), pytest.param(V3, id=V3.name, marks=pytest.mark.slow)])
def test_two_ranks(case: Case, tmp_path: Path) -> None:
    check_two_ranks(case, tmp_path)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    num_layers = V3.config["num_hidden_layers"]

    def change(tensors: Tensors) -> Tensors:
        last = f"model.layers.{num_layers - 1}."
        extra = {name.replace(last, f"model.layers.{num_layers}."): t for name, t in tensors.items() if last in name}
        others = ("eh_proj.weight", "enorm.weight", "hnorm.weight", "embed_tokens.weight", "shared_head.head.weight")
        return tensors | extra | {f"model.layers.{num_layers}.{name}": torch.ones(2, 2) for name in others}

    check_other_layout(V3, tmp_path, change)


@pytest.mark.parametrize(
    ("case", "config", "message"),
    [
        (V2, {"norm_topk_prob": True}, "norm_topk_prob"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method"),
        (V2, {"topk_method": "group_limited_greedy", "n_group": 4}, "n_group=4 must divide n_routed_experts=6"),
        (V3, {"scoring_func": "softmax"}, "scoring_func"),
    ],
)
def test_other_routings_are_refused(case: Case, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message):
        open_engine(Case(case.name, case.architecture, case.config | config).make(tmp_path))
