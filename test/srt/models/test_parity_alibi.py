"""Models whose scores are biased by distance, and their relatives, in our engine against transformers, in float32."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

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
    engine_fixture,
)
from rtp_llm.srt.models.registry import ModelRegistry

SlowCase = partial(Case, slow=True)
OLD_FALCON = dict(alibi=True, multi_query=False, parallel_attn=False, bias=True)
CASES = (
    # Falcon's slopes are rounded to bfloat16, and so are biases in transformers; those of these heads are exact.
    SlowCase("falcon", "FalconForCausalLM", dict(hidden_size=60, num_attention_heads=6, num_kv_heads=6), PAGES),
    SlowCase("falcon-alibi", "FalconForCausalLM", dict(hidden_size=48, num_kv_heads=4) | OLD_FALCON, CHUNKS),
    SlowCase(
        "falcon-alibi-one-key-head-untied",
        "FalconForCausalLM",
        dict(alibi=True, hidden_size=60, num_attention_heads=6, tie_word_embeddings=False, activation="relu"),
        PAGES,
    ),
    SlowCase(
        "falcon-new",
        "FalconForCausalLM",
        dict(new_decoder_architecture=True, hidden_size=60, num_attention_heads=6, num_kv_heads=2, ffn_hidden_size=44)
        | dict(layer_norm_epsilon=1e-3),
        CHUNKS,
    ),
    SlowCase(
        "falcon-new-one-norm-scaled",
        "FalconForCausalLM",
        dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, bias=True)
        | dict(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}),
        PAGES,
    ),
    SlowCase(
        "falcon-sequential-one-key-head",
        "FalconForCausalLM",
        dict(parallel_attn=False, hidden_size=60, num_attention_heads=3, bias=True),
        CHUNKS,
    ),
    SlowCase("bloom", "BloomForCausalLM", dict(hidden_size=60, num_attention_heads=6, layer_norm_epsilon=1e-3), PAGES),
    SlowCase(
        "bloom-adding-to-norms-untied",
        "BloomForCausalLM",
        dict(hidden_size=48, apply_residual_connection_post_layernorm=True, tie_word_embeddings=False)
        | dict(num_hidden_layers=2),
        CHUNKS,
    ),
    SlowCase("mpt", "MptForCausalLM", dict(hidden_size=60, num_attention_heads=6, layer_norm_epsilon=1e-3), CHUNKS),
    SlowCase(
        "mpt-clipped-scaled-untied",
        "MptForCausalLM",
        dict(hidden_size=48, attn_config={"clip_qkv": 0.7, "softmax_scale": 0.4}) | dict(tie_word_embeddings=False),
        PAGES,
    ),
)
BY_NAME = {case.name: case for case in CASES}
QUICK = [BY_NAME[name] for name in ("falcon", "falcon-alibi", "bloom", "mpt")]
TWO_RANKS = [*QUICK, BY_NAME["falcon-new"]]


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


def test_mpt_heeds_its_largest_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As MosaicML's code does, with which StoryWriter was trained, and transformers' does not."""

    def build(self: Any, num_heads: int, num_tokens: int, device: Any = None) -> torch.Tensor:
        return build_mpt_alibi_tensor(num_heads, num_tokens, 5, device)

    monkeypatch.setattr(transformers.MptModel, "build_mpt_alibi_tensor", build)
    check_quickly(Case("mpt-other-largest-bias", "MptForCausalLM", dict(attn_config={"alibi_bias_max": 5})), tmp_path)


@pytest.mark.slow
def test_bloom_as_first_published(tmp_path: Path) -> None:
    """With names of the base model."""

    def change(tensors: Tensors) -> Tensors:
        assert all(name.startswith("transformer.") for name in tensors)
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}

    check_other_layout(BY_NAME["bloom"], tmp_path, change)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("FalconForCausalLM", {"new_decoder_architecture": True, "parallel_attn": False}, "needs parallel_attn"),
        ("FalconForCausalLM", {"num_ln_in_parallel_attn": 2}, "must be 1, or 2 with new_decoder_architecture; got 2"),
        ("BloomForCausalLM", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact leaves biases out"),
        ("MptForCausalLM", {"no_bias": False}, "no_bias=False is not supported for MPT"),
        ("MptForCausalLM", {"logit_scale": 0.5}, "logit_scale=0.5 is not supported for MPT"),
        ("MptForCausalLM", {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln=True is not supported for MPT"),
        ("MptForCausalLM", {"attn_config": {"alibi": False}}, "attn_config.alibi=False is not supported for MPT"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(architecture: str, config: dict[str, Any], message: str) -> None:
    hf_config = getattr(transformers, architecture).config_class(vocab_size=8, **config)
    model_class, _ = ModelRegistry.resolve_model_cls([architecture])
    with pytest.raises(ValueError, match=message):
        model_class(hf_config)
