"""GPT-2, GPT-BigCode, GPT-NeoX and StarCoder2 in our engine against transformers, in float32."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parity import (
    CHECKS,
    CHUNKS,
    CONTEXT_LENGTH,
    PAGES,
    Case,
    Served,
    Tensors,
    check_anew,
    check_other_layout,
    check_quickly,
    check_two_ranks,
    engine_fixture,
    open_engine,
)

GPT2 = Case("gpt2", "GPT2LMHeadModel", dict(hidden_size=56), PAGES)
GPT_BIGCODE = Case("gpt-bigcode", "GPTBigCodeForCausalLM", dict(hidden_size=56), PAGES, slow=True)
GPT_NEOX = Case(
    "gpt-neox",
    "GPTNeoXForCausalLM",
    dict(hidden_size=60, num_attention_heads=6)
    | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}),
    CHUNKS,
)
STARCODER2 = Case("starcoder2", "Starcoder2ForCausalLM", dict(hidden_size=56, sliding_window=7), PAGES)

CASES = (
    GPT2,
    Case(
        "gpt2-scaled-untied",
        "GPT2LMHeadModel",
        dict(hidden_size=60, n_inner=44, num_hidden_layers=3, activation_function="relu", layer_norm_epsilon=1e-3)
        | dict(scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False, reorder_and_upcast_attn=True)
        | dict(tie_word_embeddings=False),
        CHUNKS,
        slow=True,
    ),
    Case(
        "gpt2-scaled",
        "GPT2LMHeadModel",
        dict(scale_attn_by_inverse_layer_idx=True, activation_function="gelu"),
        CHUNKS,
        slow=True,
    ),
    GPT_BIGCODE,
    Case(
        "gpt-bigcode-own-keys-untied",
        "GPTBigCodeForCausalLM",
        dict(hidden_size=60, multi_query=False, n_inner=44, scale_attn_weights=False, tie_word_embeddings=False)
        | dict(num_attention_heads=6, activation_function="relu", layer_norm_epsilon=1e-3),
        CHUNKS,
        slow=True,
    ),
    GPT_NEOX,
    Case(
        "gpt-neox-sequential-tied",
        "GPTNeoXForCausalLM",
        dict(hidden_size=60, num_attention_heads=3, use_parallel_residual=False, attention_bias=False)
        | dict(tie_word_embeddings=True, hidden_act="gelu_new", layer_norm_eps=1e-3)
        # A quarter of 20 components is odd.
        | dict(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0})
        | dict(rotary_pct=0.25),
        PAGES,
        slow=True,
    ),
    Case(
        "gpt-neox-dynamic",
        "GPTNeoXForCausalLM",
        dict(max_position_embeddings=64)
        | dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 1.0}),
        CHUNKS,
        slow=True,
    ),
    STARCODER2,
    Case(
        "starcoder2-without-biases-untied",
        "Starcoder2ForCausalLM",
        dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=3, head_dim=24, sliding_window=None)
        | dict(use_bias=False, tie_word_embeddings=False, hidden_act="relu", norm_epsilon=1e-3)
        | dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}),
        CHUNKS,
        slow=True,
    ),
)


engine_of_case = engine_fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_answers_are_those_of_transformers(engine_of_case: Served, check: Callable[[Served], None]) -> None:
    check_anew(check, engine_of_case)


@pytest.mark.xdist_group("tensor-parallel")
@pytest.mark.parametrize("case", [GPT2, GPT_BIGCODE, GPT_NEOX, STARCODER2], ids=lambda case: case.name)
@pytest.mark.slow
def test_two_ranks(case: Case, tmp_path: Path) -> None:
    check_two_ranks(case, tmp_path)


@pytest.mark.parametrize("case", [GPT_BIGCODE], ids=lambda case: case.name)
def test_one_prompt(case: Case, tmp_path: Path) -> None:
    check_quickly(case, tmp_path)


def test_gpt2_as_first_published(tmp_path: Path) -> None:
    """Names of the base model, and causal masks among the weights."""

    def change(tensors: Tensors) -> Tensors:
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 512, 512) for layer in range(4)}
        masks |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(4)}
        assert all(name.startswith("transformer.") for name in tensors)
        return masks | {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}

    check_other_layout(GPT2, tmp_path, change)


def test_gpt_neox_as_first_published(tmp_path: Path) -> None:
    """With buffers that are computed today."""

    def change(tensors: Tensors) -> Tensors:
        assert "embed_out.weight" in tensors
        layers = sorted({found[0] for name in tensors if (found := re.match(r"gpt_neox\.layers\.\d+", name))})
        buffers: Tensors = {}
        for layer in layers:
            buffers[f"{layer}.attention.bias"] = torch.ones(1, 1, 8, 8)
            buffers[f"{layer}.attention.masked_bias"] = torch.tensor(-1e9)
            buffers[f"{layer}.attention.rotary_emb.inv_freq"] = torch.ones(2)
        return tensors | buffers

    check_other_layout(GPT_NEOX, tmp_path, change)


def test_gpt2_is_not_served_past_its_positions(tmp_path: Path) -> None:
    model_dir = GPT2.make(tmp_path)
    with pytest.raises(Exception, match=f"takes {CONTEXT_LENGTH} tokens at most"):
        open_engine(model_dir, context_length=CONTEXT_LENGTH + 1)
