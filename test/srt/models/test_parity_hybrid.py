"""Models whose layers differ in windows and positions, in our engine against transformers, in float32.

Each checkpoint is asked in chunks, batched, from a warm cache, and for a second turn, with prompts past every window.
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
    disturb_layer_scalars,
    engine_fixture,
)
from rtp_llm.srt.models.registry import ModelRegistry

FULL, WINDOW = "full_attention", "sliding_attention"
SlowCase = partial(Case, slow=True)


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0} | parameters


LLAMA3 = rope(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
YARN = rope(rope_type="yarn", rope_theta=5e5, factor=4.0, original_max_position_embeddings=64, attention_factor=1.2)


CASES = (
    SlowCase(
        "olmo3",
        "Olmo3ForCausalLM",
        dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, sliding_window=7, rms_norm_eps=1e-3)
        | dict(layer_types=[WINDOW, WINDOW, FULL], num_hidden_layers=3)
        | dict(rope_parameters={WINDOW: rope(), FULL: YARN}),
        PAGES,
    ),
    SlowCase(
        "olmo3-bias-tied",
        "Olmo3ForCausalLM",
        dict(attention_bias=True, tie_word_embeddings=True, sliding_window=16, num_hidden_layers=5)
        | dict(rope_parameters={WINDOW: rope(rope_theta=500.0), FULL: rope()}),
        CHUNKS,
    ),
    SlowCase(
        "smollm3",
        "SmolLM3ForCausalLM",
        dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=5)
        | dict(no_rope_layer_interval=3, sliding_window=None),
        CHUNKS,
    ),
    SlowCase(
        "smollm3-windows-untied-bias",
        "SmolLM3ForCausalLM",
        dict(use_sliding_window=True, sliding_window=7, no_rope_layers=[1, 0, 0, 1], attention_bias=True)
        | dict(tie_word_embeddings=False, mlp_bias=True, rope_parameters=rope(rope_type="linear", factor=2.0)),
        PAGES,
    ),
    SlowCase(
        "exaone4",
        "Exaone4ForCausalLM",
        dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, sliding_window=7, sliding_window_pattern=3)
        | dict(rms_norm_eps=1e-3),
        PAGES,
    ),
    SlowCase(
        "exaone4-full-tied",
        "Exaone4ForCausalLM",
        dict(sliding_window=None, layer_types=[FULL] * 4, tie_word_embeddings=True, head_dim=10)
        | dict(rope_parameters=rope(rope_theta=1e6)),
        CHUNKS,
    ),
    SlowCase(
        "gemma4",
        "Gemma4ForCausalLM",
        dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, global_head_dim=24, sliding_window=7)
        | dict(layer_types=[WINDOW, FULL, WINDOW, FULL], num_kv_shared_layers=2, use_double_wide_mlp=True)
        | dict(final_logit_softcapping=3.0),
        PAGES,
        edit=disturb_layer_scalars,
    ),
    SlowCase(
        "gemma4-experts-values-of-keys",
        "Gemma4ForCausalLM",
        dict(layer_types=[WINDOW, WINDOW, FULL], num_hidden_layers=3, sliding_window=16, hidden_size_per_layer_input=0)
        | dict(attention_k_eq_v=True, num_global_key_value_heads=1, global_head_dim=20, num_key_value_heads=4)
        | dict(enable_moe_block=True, num_experts=5, top_k_experts=3, moe_intermediate_size=36)
        | dict(attention_bias=True, tie_word_embeddings=False, use_bidirectional_attention="vision"),
        CHUNKS,
        edit=disturb_layer_scalars,
    ),
    SlowCase(
        "llama4",
        "Llama4ForCausalLM",
        dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=4, floor_scale=16)
        | dict(attention_chunk_size=13)
        | dict(attn_scale=0.4, interleave_moe_layer_step=2, no_rope_layer_interval=3, num_local_experts=5)
        | dict(rope_parameters=LLAMA3),
        CHUNKS,
    ),
    SlowCase(
        "llama4-two-experts-no-norm-tied-bias",
        "Llama4ForCausalLM",
        dict(use_qk_norm=False, attn_temperature_tuning=False, num_experts_per_tok=2, attention_bias=True)
        | dict(tie_word_embeddings=True, no_rope_layers=[1, 0, 1, 1], attention_chunk_size=16)
        | dict(layer_types=[FULL] * 4),
        PAGES,
    ),
)


engine_of_case = engine_fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_answers_are_those_of_transformers(engine_of_case: Served, check: Callable[[Served], None]) -> None:
    check_anew(check, engine_of_case)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if "-" not in case.name])
def test_one_prompt(case: Case, tmp_path: Path) -> None:
    check_quickly(case, tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("tensor-parallel")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if "-" not in case.name])
def test_two_ranks(case: Case, tmp_path: Path) -> None:
    check_two_ranks(case, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("Olmo3ForCausalLM", {"sliding_window": None}, "sliding_window is null"),
        ("Exaone4ForCausalLM", {"layer_types": ["chunked_attention"]}, r"layer_types\[0\] must be"),
        ("Llama4ForCausalLM", {"layer_types": [WINDOW]}, r"layer_types\[0\] must be"),
        ("Gemma4ForCausalLM", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(architecture: str, config: dict[str, Any], message: str) -> None:
    sizes = dict(vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    hf_config = getattr(transformers, architecture).config_class(**(sizes | {"num_key_value_heads": 1} | config))
    model_class, _ = ModelRegistry.resolve_model_cls([architecture])
    with pytest.raises(ValueError, match=message):
        model_class(hf_config)
