"""Further models that keep a state of the sequence, in our engine against transformers, in float32.

Each checkpoint is asked in chunks, batched, from a warm cache, and for a second turn: prompts are cut within the chunks
that kernels compute together.
"""

import json
import shutil
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
    engine_fixture,
    generate,
    open_engine,
    rewrite_tensors,
)
from rtp_llm.srt.models.registry import ModelRegistry
from tiny_models import random_prompts

FULL, LINEAR = "full_attention", "linear_attention"
SlowCase = partial(Case, slow=True, has_states=True)
SIZES = dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, intermediate_size=44)
DELTA = dict(linear_num_key_heads=6, linear_num_value_heads=6, linear_key_head_dim=10, linear_value_head_dim=14)
ROPE = dict(rope_type="default", rope_theta=500.0)
MAMBA = dict(mamba_n_heads=6, mamba_d_head=20, mamba_n_groups=2, mamba_d_state=14, mamba_chunk_size=8)
GRANITE = SIZES | MAMBA | dict(embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.6)
GRANITE |= dict(logits_scaling=1.5, shared_intermediate_size=28)
# Transformers counts the tokens before a step by the keys of layer 0, which lightning attention has not.
MINIMAX = SIZES | dict(num_hidden_layers=4, layer_types=[FULL, LINEAR, FULL, LINEAR], num_local_experts=5)
MINIMAX |= dict(sliding_window=None, num_experts_per_tok=3, block_size=8)
MINIMAX |= dict(linear_attn_alpha_factor=1.3, linear_attn_beta_factor=0.7)
MINIMAX |= dict(full_attn_alpha_factor=0.8, full_attn_beta_factor=1.2, mlp_alpha_factor=1.1, mlp_beta_factor=0.9)
HEAD_DIM, ROTARY_DIM, THETA = 16, 8, 500.0  # of a published checkpoint of MiniMax


def part_convolutions(model_dir: str) -> None:
    """Part the filters of queries, keys and values as published checkpoints do: transformers saves equal thirds."""
    config = json.loads(Path(model_dir, "config.json").read_text())
    key_size = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    value_size = config["linear_num_value_heads"] * config["linear_value_head_dim"]

    def change(tensors: Tensors) -> Tensors:
        firsts = [name for name in tensors if name.endswith("q_conv1d.weight")]
        assert firsts
        changed = dict(tensors)
        for first in firsts:
            names = [first.replace("q_conv1d", f"{x}_conv1d") for x in "qkv"]
            whole = torch.cat([tensors[name] for name in names])
            changed |= dict(zip(names, whole.split([key_size, key_size, value_size]), strict=True))
        return changed

    rewrite_tensors(model_dir, change)


def publish_minimax(original: Path, twin: Path) -> str:
    """Spell a checkpoint as MiniMax does: other names in config.json, and half of each head rotated.

    Transformers' class rotates whole heads, so the original gets pairs of features that stay as they are. The two
    features of a pair lie half of what is rotated apart, so the features of the twin's heads have another order.
    """
    shutil.copytree(original, twin, dirs_exist_ok=True, ignore=shutil.ignore_patterns(twin.name))
    path = original / "config.json"
    config = json.loads(path.read_text())
    rope = dict(rope_type="proportional", rope_theta=THETA ** (HEAD_DIM / ROTARY_DIM), partial_rotary_factor=0.5)
    path.write_text(json.dumps(config | {"rope_parameters": rope}))
    half = ROTARY_DIM // 2
    first, second = torch.arange(HEAD_DIM).chunk(2)
    order = torch.cat((first[:half], second[:half], first[half:], second[half:]))

    def change(tensors: Tensors) -> Tensors:
        turned = {name: tensor for name, tensor in tensors.items() if "q_proj" in name or "k_proj" in name}
        assert turned
        return tensors | {
            name: tensor.unflatten(0, (-1, HEAD_DIM))[:, order].flatten(0, 1) for name, tensor in turned.items()
        }

    rewrite_tensors(str(twin), change)
    named = {f"layernorm_{kind}_attention_{name}": config[f"{kind}_attn_{name}_factor"] for kind in ("full", "linear")
             for name in ("alpha", "beta")}  # fmt: skip
    named |= {f"layernorm_mlp_{name}": config[f"mlp_{name}_factor"] for name in ("alpha", "beta")}
    left_out = ("rope_parameters", "layer_types", "block_size")
    kept = {name: value for name, value in config.items() if name not in left_out and not name.endswith("_factor")}
    published = kept | named | {
        "model_type": "minimax_text_01", "rope_theta": THETA,
        "rotary_dim": ROTARY_DIM, "postnorm": True, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid",
        "attn_type_list": [int(kind == FULL) for kind in config["layer_types"]],
    }  # fmt: skip
    (twin / "config.json").write_text(json.dumps(published))
    return str(twin)


CASES = (
    SlowCase(
        "olmo_hybrid",
        "OlmoHybridForCausalLM",
        SIZES | DELTA | dict(num_hidden_layers=4, layer_types=[LINEAR, FULL, LINEAR, FULL]),
        PAGES,
        edit=part_convolutions,
    ),
    SlowCase(
        "olmo_hybrid-positions-tied",
        "OlmoHybridForCausalLM",
        SIZES
        | DELTA
        | dict(num_hidden_layers=3, layer_types=[FULL, LINEAR, LINEAR], rope_parameters=ROPE, tie_word_embeddings=True)
        | dict(linear_num_key_heads=2, linear_allow_neg_eigval=False, linear_conv_kernel_dim=3, attention_bias=True),
        CHUNKS,
    ),
    SlowCase(
        "minimax",
        "MiniMaxForCausalLM",
        MINIMAX | dict(head_dim=14),
        PAGES,
    ),
    SlowCase(
        "minimax-window-tied",
        "MiniMaxForCausalLM",
        SIZES | dict(num_hidden_layers=2, sliding_window=24, tie_word_embeddings=True, rope_parameters=ROPE),
        CHUNKS,
    ),
    SlowCase(
        "minimax-published",
        "MiniMaxText01ForCausalLM",
        MINIMAX | dict(head_dim=HEAD_DIM, layer_types=[LINEAR, LINEAR, LINEAR, FULL]),  # in the published order
        PAGES,
        twin=publish_minimax,
    ),
    SlowCase(
        "minimax-m1",
        "MiniMaxM1ForCausalLM",
        MINIMAX | dict(head_dim=HEAD_DIM, layer_types=[FULL, LINEAR], num_hidden_layers=2),
        CHUNKS,
        twin=publish_minimax,
    ),
    SlowCase(
        "mamba2",
        "Mamba2ForCausalLM",
        dict(hidden_size=60, num_heads=6, head_dim=20, n_groups=2, state_size=14, chunk_size=8),
        PAGES,
    ),
    SlowCase(
        "mamba2-bias-tied",
        "Mamba2ForCausalLM",
        dict(hidden_size=60, num_heads=6, head_dim=20, n_groups=1, state_size=14, chunk_size=8, num_hidden_layers=2)
        | dict(use_bias=True, use_conv_bias=False, conv_kernel=3, residual_in_fp32=False, tie_word_embeddings=True),
        CHUNKS,
    ),
    SlowCase(
        "granite4",
        "GraniteMoeHybridForCausalLM",
        GRANITE | dict(num_hidden_layers=4, layer_types=[LINEAR, FULL, LINEAR, LINEAR], num_local_experts=5),
        PAGES,
    ),
    SlowCase(
        "granite4-dense-positions-tied",
        "GraniteMoeHybridForCausalLM",
        GRANITE
        | dict(num_hidden_layers=3, layer_types=[FULL, LINEAR, LINEAR], num_local_experts=0, rope_parameters=ROPE)
        | dict(position_embedding_type="rope", tie_word_embeddings=True, mamba_proj_bias=True, mamba_n_groups=1),
        CHUNKS,
    ),
)
QUICK = ("olmo_hybrid", "minimax", "minimax-published", "minimax-m1", "mamba2", "granite4")
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


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.name in QUICK])
def test_little_memory(case: Case, tmp_path: Path) -> None:
    """Requests that are retracted amid their answers, and wait for a slot for their states, go on as they began."""
    model_dir = case.make(tmp_path)
    prompts = random_prompts(90, [20 + 3 * i for i in range(9)])
    with open_engine(model_dir, **case.options) as engine:
        roomy = [generate(engine, prompt, max_new_tokens=50) for prompt in prompts]
    options = case.options | {"max_total_tokens": 200, "max_running_requests": 4, "context_length": 128}
    with open_engine(model_dir, **options) as engine:
        tight = generate(engine, prompts, max_new_tokens=50)
    assert [result["output_ids"] for result in tight] == [result["output_ids"] for result in roomy]
    has_attention = case.architecture != "Mamba2ForCausalLM"  # else there are no pages to run out of
    assert (sum(result["meta_info"]["num_retractions"] for result in tight) > 0) == has_attention


@pytest.mark.parametrize("architecture", ["GraniteMoeHybridForCausalLM", "OlmoHybridForCausalLM", "MiniMaxForCausalLM"])
def test_unknown_kinds_of_layers_are_refused(architecture: str) -> None:
    config: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "vocab_size": 8}
    hf_config = getattr(transformers, architecture).config_class(**(SIZES | MAMBA | config))
    hf_config.layer_types = ["sliding_attention", FULL]
    model_class, _ = ModelRegistry.resolve_model_cls([architecture])
    with pytest.raises(ValueError, match=r"layer_types\[0\] must be 'linear_attention' or 'full_attention'"):
        model_class(hf_config)


@pytest.mark.parametrize(("field", "value"), [("postnorm", False), ("shared_intermediate_size", 12)])
def test_what_minimax_would_compute_wrongly_is_refused(field: str, value: Any) -> None:
    model_class, _ = ModelRegistry.resolve_model_cls(["MiniMaxForCausalLM"])
    hf_config = transformers.MiniMaxConfig(**(SIZES | {"num_hidden_layers": 1, "vocab_size": 8}))
    setattr(hf_config, field, value)
    with pytest.raises(ValueError, match=f"{field}={value} is not supported"):
        model_class(hf_config)
