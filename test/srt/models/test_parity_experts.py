"""More models with experts in our engine against transformers, in float32.

Each checkpoint is asked in chunks, batched, from a warm cache, and for a second turn.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from parity import (
    CHECKS,
    CHUNKS,
    PAGES,
    Case,
    Served,
    Tensors,
    check_anew,
    check_other_layout,
    check_quickly,
    check_two_ranks,
    disturb_correction_biases,
    engine_fixture,
    open_engine,
)
from rtp_llm.models_py.phimoe import sparse_mixer

SlowCase = partial(Case, slow=True)


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0} | parameters


SIX_HEADS = dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3)
YARN = rope(rope_type="yarn", factor=8.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.5)
LONGROPE = rope(
    rope_type="longrope",
    short_factor=[1.0 + 0.1 * i for i in range(5)],
    long_factor=[1.5 + 0.7 * i for i in range(5)],
    short_mscale=1.2,
    long_mscale=1.2,
    original_max_position_embeddings=400,  # no prompt is longer: transformers keeps the short factors
)
LATENT = dict(hidden_size=56, v_head_dim=12, q_lora_rank=20, n_routed_experts=8, num_experts_per_tok=3)
CASES = (
    SlowCase("olmoe", "OlmoeForCausalLM", SIX_HEADS | dict(num_experts=5, intermediate_size=44, clip_qkv=0.8), PAGES),
    SlowCase(
        "olmoe-normed-bias-tied",
        "OlmoeForCausalLM",
        dict(norm_topk_prob=True, attention_bias=True, tie_word_embeddings=True, num_key_value_heads=1),
        CHUNKS,
    ),
    SlowCase(
        "granite-moe",
        "GraniteMoeForCausalLM",
        SIX_HEADS
        | dict(num_local_experts=5, num_experts_per_tok=3, intermediate_size=44, embedding_multiplier=6.0)
        | dict(attention_multiplier=0.4, residual_multiplier=0.6, logits_scaling=3.0),
        CHUNKS,
    ),
    SlowCase(
        "granite-moe-shared",
        "GraniteMoeSharedForCausalLM",
        dict(shared_intermediate_size=52, attention_bias=True, tie_word_embeddings=True, attention_multiplier=0.2)
        | dict(residual_multiplier=0.5),
        PAGES,
    ),
    SlowCase(
        "phimoe",
        "PhimoeForCausalLM",
        SIX_HEADS
        | dict(num_local_experts=5, intermediate_size=44, router_jitter_noise=0.3, attention_bias=True)
        | dict(lm_head_bias=True, rope_parameters=LONGROPE, sliding_window=None, head_dim=10),
        CHUNKS,
    ),
    SlowCase("phimoe-window-tied", "PhimoeForCausalLM", dict(sliding_window=7, tie_word_embeddings=True), PAGES),
    SlowCase(
        "ernie4.5-moe",
        "Ernie4_5_MoeForCausalLM",
        SIX_HEADS
        | dict(moe_num_experts=5, moe_k=3, use_bias=True, tie_word_embeddings=False, moe_intermediate_size=36)
        | dict(moe_norm_min=0.5),
        PAGES,
        edit=disturb_correction_biases,
    ),
    SlowCase(
        "ernie4.5-moe-some-layers-tied",
        "Ernie4_5_MoeForCausalLM",
        dict(num_hidden_layers=6, moe_layer_start_index=1, moe_layer_end_index=4, moe_layer_interval=2)
        | dict(moe_num_shared_experts=0),
        CHUNKS,
    ),
    SlowCase(
        "hunyuan-moe",
        "HunYuanMoEV1ForCausalLM",
        SIX_HEADS
        | dict(num_experts=5, moe_topk=[1, 2, 3], intermediate_size=44, head_dim=14)
        | dict(rope_parameters=rope(rope_type="dynamic", alpha=30.0, factor=1.0)),
        CHUNKS,
    ),
    SlowCase(
        "hunyuan-moe-tied-bias",
        "HunYuanMoEV1ForCausalLM",
        dict(num_experts=4, moe_topk=2, tie_word_embeddings=True, attention_bias=True),
        PAGES,
    ),
    SlowCase(
        "glm4-moe",
        "Glm4MoeForCausalLM",
        SIX_HEADS
        | dict(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, use_qk_norm=True, head_dim=12)
        | dict(routed_scaling_factor=1.7, attention_bias=True, n_shared_experts=2),
        PAGES,
        edit=disturb_correction_biases,
    ),
    SlowCase(
        "glm4-moe-tied-no-norm",
        "Glm4MoeForCausalLM",
        dict(tie_word_embeddings=True, norm_topk_prob=False, first_k_dense_replace=2)
        | dict(rope_parameters=rope(partial_rotary_factor=1.0)),
        CHUNKS,
    ),
    SlowCase(
        "glm4-moe-lite",
        "Glm4MoeLiteForCausalLM",
        LATENT
        | dict(n_group=4, topk_group=2, routed_scaling_factor=2.5, num_hidden_layers=3, rope_parameters=YARN)
        | dict(mlp_layer_types=["sparse", "dense", "sparse"]),
        CHUNKS,
        edit=disturb_correction_biases,
    ),
    SlowCase(
        "glm4-moe-lite-halves-bias-tied",
        "Glm4MoeLiteForCausalLM",
        dict(rope_interleave=False, q_lora_rank=None, attention_bias=True, tie_word_embeddings=True),
        PAGES,
    ),
    SlowCase(
        "minimax-m2",
        "MiniMaxM2ForCausalLM",
        SIX_HEADS | dict(num_local_experts=5, num_experts_per_tok=3, intermediate_size=44, head_dim=14, rotary_dim=6),
        PAGES,
        edit=disturb_correction_biases,
    ),
    SlowCase("minimax-m2-tied", "MiniMaxM2ForCausalLM", dict(tie_word_embeddings=True, num_key_value_heads=1), CHUNKS),
    SlowCase(
        "deepseek-v3.2",
        "DeepseekV32ForCausalLM",
        LATENT
        | dict(n_group=4, topk_group=2, num_hidden_layers=3, first_k_dense_replace=1, rope_parameters=YARN)
        | dict(index_topk=600),
        CHUNKS,
        edit=disturb_correction_biases,
    ),
)
QUICK = ("olmoe", "granite-moe", "granite-moe-shared", "phimoe", "ernie4.5-moe", "hunyuan-moe", "glm4-moe")
QUICK += ("glm4-moe-lite", "minimax-m2", "deepseek-v3.2")
ONE_OF_EACH = [pytest.param(case, id=case.name) for case in CASES if case.name in QUICK]


engine_of_case = engine_fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_answers_are_those_of_transformers(engine_of_case: Served, check: Callable[[Served], None]) -> None:
    check_anew(check, engine_of_case)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_one_prompt(case: Case, tmp_path: Path) -> None:
    check_quickly(case, tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("tensor-parallel")
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_two_ranks(case: Case, tmp_path: Path) -> None:
    check_two_ranks(case, tmp_path)


def test_ernie_leaves_out_what_predicts_further_tokens(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "ernie4.5-moe")

    def change(tensors: Tensors) -> Tensors:
        names = ("mtp_emb_norm.0.weight", "mtp_linear_proj.0.weight", "mtp_block.0.mlp.up_proj.weight")
        return tensors | {f"model.{name}": torch.ones(2, 2) for name in names}

    check_other_layout(case, tmp_path, change)


@pytest.mark.parametrize("jitter", [0.01, 0.3])
def test_the_sparse_mixer_is_that_of_transformers(jitter: float) -> None:
    logits = torch.randn(200, 7)
    weights, ids = sparse_mixer(logits, jitter)
    expected_weights, expected_ids = sparsemixer(logits, jitter_eps=jitter, training=False)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("deepseek-v3.2", {"index_topk": 64}, "takes 64 tokens at most, but requests may be of 512"),
        ("phimoe", {"rope_parameters": LONGROPE | {"long_mscale": 1.3}}, "equal short_mscale and long_mscale"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok=3"),
        ("hunyuan-moe", {"num_shared_expert": [1, 2, 1]}, "num_shared_expert of layer 1 must be 1, not 2"),
        ("minimax-m2", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("glm4-moe-lite", {"rope_parameters": rope(partial_rotary_factor=0.5)}, "partial_rotary_factor=0.5"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    name: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    case = next(case for case in CASES if case.name == name)
    with pytest.raises(Exception, match=message):
        open_engine(Case(case.name, case.architecture, case.config | config).make(tmp_path))
