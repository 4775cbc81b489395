"""Models that keep a state of the sequence, in our engine against transformers, in float32.

Each checkpoint is asked in chunks, batched, from a warm cache, and for a second turn: prompts are cut within the chunks
that kernels compute together.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from parity import (
    CHECKS,
    CHUNKS,
    PAGES,
    Case,
    Served,
    Tensors,
    check_anew,
    check_quickly,
    check_two_ranks,
    disturb_correction_biases,
    engine_fixture,
    rewrite_tensors,
)
from rtp_llm.srt.models.registry import ModelRegistry

FULL, LINEAR = "full_attention", "linear_attention"
SlowCase = partial(Case, slow=True, has_states=True)
SIZES = dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, intermediate_size=44)
DELTA = SIZES | dict(
    head_dim=24, linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=10, linear_value_head_dim=14
)
EXPERTS = dict(num_experts=5, num_experts_per_tok=3, moe_intermediate_size=36)
SHARED = EXPERTS | dict(shared_expert_intermediate_size=28)
MROPE = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[2, 2, 2])
MROPE |= dict(mrope_interleaved=True)
MAMBA = dict(mamba_d_ssm=48, mamba_n_heads=6, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=14, mamba_chunk_size=8)
FACTORS = dict(embedding_multiplier=1.3, lm_head_multiplier=0.6, key_multiplier=0.8, attention_in_multiplier=1.1)
FACTORS |= dict(attention_out_multiplier=0.9, ssm_in_multiplier=1.2, ssm_out_multiplier=0.7)
FACTORS |= dict(mlp_multipliers=[0.8, 1.3], ssm_multipliers=[0.5, 1.5, 0.7, 1.2, 0.9])
NEMOTRON = SIZES | dict(
    head_dim=12, mamba_num_heads=6, mamba_head_dim=10, n_groups=2, ssm_state_size=14, chunk_size=8, n_routed_experts=6
)
# In transformers a step of one token does not heed the limits of step sizes, all others do.
NEMOTRON |= dict(num_experts_per_tok=3, moe_intermediate_size=36, moe_shared_expert_intermediate_size=28)
NEMOTRON |= dict(time_step_min=1e-9)

KIMI = dict(hidden_size=60, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=6, intermediate_size=44)
KIMI |= dict(linear_num_heads=4, linear_head_dim=12, kv_lora_rank=28, qk_rope_head_dim=8, qk_nope_head_dim=12)
KIMI |= dict(v_head_dim=10, num_experts=6, num_experts_per_token=3, moe_intermediate_size=36, num_shared_experts=2)
KIMI |= dict(num_expert_group=2, topk_group=1, routed_scaling_factor=1.7)


def disturb_expert_bias(model_dir: str) -> None:
    """They are zero in a model that was never trained."""

    def change(tensors: Tensors) -> Tensors:
        generator = torch.Generator().manual_seed(3)
        names = [name for name in tensors if name.endswith("expert_bias")]
        assert names
        return tensors | {name: 0.3 * torch.randn(tensors[name].shape, generator=generator) for name in names}

    rewrite_tensors(model_dir, change)


CASES = (
    SlowCase(
        "qwen3-next",
        "Qwen3NextForCausalLM",
        DELTA | SHARED | dict(num_hidden_layers=4, layer_types=[LINEAR, FULL, LINEAR, LINEAR])
        | dict(mlp_only_layers=[2], partial_rotary_factor=0.5),
        PAGES,
    ),
    SlowCase(
        "qwen3-next-dense-tied-bias",
        "Qwen3NextForCausalLM",
        DELTA | dict(linear_num_key_heads=6, linear_key_head_dim=16, linear_conv_kernel_dim=3, num_experts=0)
        | dict(num_hidden_layers=3, layer_types=[LINEAR, LINEAR, FULL], attention_bias=True, tie_word_embeddings=True),
        CHUNKS,
    ),
    SlowCase(
        "qwen3.5",
        "Qwen3_5ForCausalLM",
        DELTA | dict(num_hidden_layers=4, layer_types=[LINEAR, FULL, LINEAR, LINEAR], rope_parameters=MROPE),
        PAGES,
    ),
    SlowCase(
        "qwen3.5_moe",
        "Qwen3_5MoeForCausalLM",
        DELTA | SHARED | dict(num_hidden_layers=3, layer_types=[FULL, LINEAR, LINEAR], rope_parameters=MROPE),
        CHUNKS,
    ),
    SlowCase(
        "lfm2",
        "Lfm2ForCausalLM",
        SIZES | dict(num_hidden_layers=4, block_multiple_of=12, conv_bias=True)
        | dict(layer_types=["conv", FULL, "conv", "conv"]),
        PAGES,
    ),
    SlowCase(
        "lfm2-whole-untied",
        "Lfm2ForCausalLM",
        SIZES | dict(num_hidden_layers=3, block_auto_adjust_ff_dim=False, tie_word_embeddings=False, conv_L_cache=5)
        | dict(layer_types=["conv", "conv", FULL]),
        CHUNKS,
    ),
    SlowCase(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        SIZES | EXPERTS | dict(num_hidden_layers=4, num_dense_layers=1, layer_types=["conv", FULL, "conv", "conv"])
        | dict(routed_scaling_factor=1.7),
        CHUNKS,
        edit=disturb_expert_bias,
    ),
    SlowCase(
        "lfm2_moe-no-bias",
        "Lfm2MoeForCausalLM",
        SIZES | EXPERTS | dict(num_hidden_layers=3, num_dense_layers=2, layer_types=["conv", FULL, "conv"])
        | dict(use_expert_bias=False, norm_topk_prob=False),
        PAGES,
    ),
    SlowCase(
        "nemotron_h",
        "NemotronHForCausalLM",
        NEMOTRON | dict(layers_block_type=[LINEAR, FULL, "mlp", "moe", LINEAR], n_group=2, topk_group=1),
        PAGES,
        edit=disturb_correction_biases,
    ),
    SlowCase(
        "nemotron_h-latent-bias",
        "NemotronHForCausalLM",
        NEMOTRON | dict(layers_block_type=["moe", LINEAR, FULL], moe_latent_size=20, mlp_bias=True, use_bias=True)
        | dict(use_conv_bias=False, norm_topk_prob=False, routed_scaling_factor=1.7, n_groups=1),
        CHUNKS,
    ),
    SlowCase(
        "falcon_h1",
        "FalconH1ForCausalLM",
        SIZES | MAMBA | FACTORS | dict(num_hidden_layers=3, head_dim=12, mamba_rms_norm=True),
        PAGES,
    ),
    SlowCase(
        "falcon_h1-gates-first-bias-tied",
        "FalconH1ForCausalLM",
        SIZES | MAMBA | dict(num_hidden_layers=2, mamba_rms_norm=True, mamba_norm_before_gate=False, mlp_bias=True)
        | dict(mamba_proj_bias=True, projectors_bias=True, attention_bias=True, tie_word_embeddings=True),
        CHUNKS,
    ),
    SlowCase(
        "falcon_h1-no-norm",
        "FalconH1ForCausalLM",
        SIZES | MAMBA | dict(num_hidden_layers=2, mamba_conv_bias=False, mamba_n_groups=1),
        CHUNKS,
    ),
    SlowCase(
        "kimi_linear",
        "KimiLinearForCausalLM",
        KIMI | dict(layer_types=[LINEAR, FULL, LINEAR, LINEAR], mlp_layer_types=["dense", "sparse", "sparse", "dense"]),
        PAGES,
        edit=disturb_correction_biases,
    ),
    SlowCase(
        "kimi_linear-low-rank-queries-bias",
        "KimiLinearForCausalLM",
        KIMI | dict(layer_types=[FULL, LINEAR, LINEAR, LINEAR], mlp_layer_types=["sparse"] * 4, q_lora_rank=20)
        | dict(attention_bias=True, norm_topk_prob=False, num_expert_group=1),
        CHUNKS,
    ),
)  # fmt: skip


engine_of_case = engine_fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_answers_are_those_of_transformers(engine_of_case: Served, check: Callable[[Served], None]) -> None:
    check_anew(check, engine_of_case)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if "-" not in case.name[6:]])
def test_one_prompt(case: Case, tmp_path: Path) -> None:
    check_quickly(case, tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("tensor-parallel")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if "tied" not in case.name])
def test_two_ranks(case: Case, tmp_path: Path) -> None:
    check_two_ranks(case, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("Qwen3NextForCausalLM", {"layer_types": ["sliding_attention"]}, r"layer_types\[0\] must be"),
        ("Qwen3NextForCausalLM", {"layer_types": [LINEAR], "hidden_act": "gelu"}, "the activation must be 'silu'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(architecture: str, config: dict[str, Any], message: str) -> None:
    sizes = dict(vocab_size=8, num_hidden_layers=1) | DELTA
    hf_config = getattr(transformers, architecture).config_class(**(sizes | config))
    model_class, _ = ModelRegistry.resolve_model_cls([architecture])
    with pytest.raises(ValueError, match=message):
        model_class(hf_config)
