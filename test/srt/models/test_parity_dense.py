"""Gemma 2 and 3, Phi-3, OLMo 2, GLM-4, Granite and Command R7B in our engine against transformers, in float32.

Each checkpoint is asked in chunks, batched, from a warm cache, and for a second turn, with prompts past every window.
"""

from collections.abc import Callable
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
    check_anew,
    check_two_ranks,
    engine_fixture,
    open_engine,
    prompts_and_references,
)
from rtp_llm.models_py.olmo2 import Olmo2HeadsNorm
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.layers.linear import OutputShard
from rtp_llm.srt.models.registry import ModelRegistry
from tiny_models import make_tiny

ORIGINAL_LEN = 53  # of LongRoPE: no prompt grows past it: at that point transformers' Phi-3 computes all keys anew
FULL, WINDOW = "full_attention", "sliding_attention"


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0} | parameters


def longrope(half: int) -> dict[str, Any]:
    factors = {
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [1.5 + 0.7 * i for i in range(half)],
    }
    return rope(rope_type="longrope", original_max_position_embeddings=ORIGINAL_LEN, **factors)


CASES = (
    Case(
        "gemma2",
        "Gemma2ForCausalLM",
        dict(hidden_size=56, sliding_window=7, query_pre_attn_scalar=20)
        | dict(attn_logit_softcapping=3.0, final_logit_softcapping=2.5, num_hidden_layers=3),
        PAGES,
    ),
    Case(
        "gemma2-uncapped-untied-bias",
        "Gemma2ForCausalLM",
        dict(head_dim=10, num_key_value_heads=1, layer_types=[FULL, WINDOW, WINDOW, FULL], sliding_window=16)
        | dict(attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True)
        | dict(
            tie_word_embeddings=False, hidden_activation="silu", rope_parameters=rope(rope_type="linear", factor=3.0)
        ),
        CHUNKS,
        slow=True,
    ),
    Case(
        "gemma3",
        "Gemma3ForCausalLM",
        dict(hidden_size=56, layer_types=[WINDOW, WINDOW, FULL], num_hidden_layers=3, sliding_window=7)
        | dict(query_pre_attn_scalar=30, head_dim=24)
        | dict(rope_parameters={WINDOW: rope(), FULL: rope(rope_type="linear", factor=4.0, rope_theta=1e6)}),
        CHUNKS,
    ),
    Case(
        "gemma3-capped-logits-untied-bias",
        "Gemma3ForCausalLM",
        dict(final_logit_softcapping=2.0, tie_word_embeddings=False, attention_bias=True, num_hidden_layers=7)
        | dict(num_key_value_heads=1, sliding_window=16)
        | dict(rope_parameters={WINDOW: rope(rope_theta=500.0), FULL: rope(rope_type="dynamic", factor=3.0)})
        | dict(max_position_embeddings=64),
        PAGES,
        slow=True,
    ),
    Case(
        "phi3-longrope",
        "Phi3ForCausalLM",
        dict(hidden_size=64, num_key_value_heads=2, original_max_position_embeddings=ORIGINAL_LEN)
        | dict(rope_parameters=longrope(6) | {"partial_rotary_factor": 0.75}),
        CHUNKS,
    ),
    Case(
        "phi3-window-tied",
        "Phi3ForCausalLM",
        dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=3, sliding_window=11, tie_word_embeddings=True)
        | dict(hidden_act="gelu"),
        PAGES,
        slow=True,
    ),
    Case(
        "olmo2",
        "Olmo2ForCausalLM",
        dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, attention_bias=True, rms_norm_eps=1e-3),
        CHUNKS,
    ),
    Case(
        "olmo2-wide-heads-tied",
        "Olmo2ForCausalLM",
        dict(head_dim=24, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=rope(rope_theta=5e5)),
        PAGES,
        slow=True,
    ),
    Case(
        "glm4",
        "Glm4ForCausalLM",
        dict(hidden_size=56, head_dim=20, num_key_value_heads=1, rope_parameters=rope(partial_rotary_factor=0.5)),
        CHUNKS,
    ),
    Case(
        "glm4-whole-heads-tied",
        "Glm4ForCausalLM",
        dict(attention_bias=False, tie_word_embeddings=True, rope_parameters=rope(partial_rotary_factor=1.0)),
        PAGES,
        slow=True,
    ),
    Case(
        "granite",
        "GraniteForCausalLM",
        dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, attention_bias=True, mlp_bias=True)
        | dict(embedding_multiplier=6.0, attention_multiplier=0.4, residual_multiplier=0.6, logits_scaling=3.0),
        CHUNKS,
    ),
    Case(
        "granite-tied",
        "GraniteForCausalLM",
        dict(embedding_multiplier=12, attention_multiplier=0.2, residual_multiplier=0.3, logits_scaling=0.5)
        | dict(tie_word_embeddings=True),
        PAGES,
        slow=True,
    ),
    Case(
        "cohere2",
        "Cohere2ForCausalLM",
        dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, sliding_window=7, logit_scale=0.7)
        | dict(layer_norm_eps=1e-3),
        PAGES,
    ),
    Case(
        "cohere2-untied-bias",
        "Cohere2ForCausalLM",
        dict(layer_types=[FULL, WINDOW, FULL, WINDOW], sliding_window=16, attention_bias=True, logit_scale=2.0)
        | dict(tie_word_embeddings=False, rope_parameters=rope(rope_type="linear", factor=2.0)),
        CHUNKS,
        slow=True,
    ),
)


engine_of_case = engine_fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_answers_are_those_of_transformers(engine_of_case: Served, check: Callable[[Served], None]) -> None:
    check_anew(check, engine_of_case)


class FirstOfTwoRanks(RankGroup):
    """Sums with what the second rank is said to give."""

    def __init__(self, given_by_second: torch.Tensor) -> None:
        super().__init__(rank=0, world_size=2)
        self.given_by_second = given_by_second

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.given_by_second


@pytest.mark.parametrize("num_parts", [1, 2], ids=["same-heads", "half-of-the-heads"])
def test_olmo2_norms_the_heads_of_all_ranks(num_parts: int) -> None:
    x, weight = torch.randn(5, 12), torch.randn(12)
    whole = Olmo2HeadsNorm(OutputShard("k", 12, part=0, num_parts=1), RankGroup(0, 1), eps=1e-2)
    whole.weight_loader(whole.weight, weight)
    size = 12 // num_parts
    other_heads = x if num_parts == 1 else x[:, size:]
    group = FirstOfTwoRanks(other_heads.square().mean(dim=-1, keepdim=True))
    half = Olmo2HeadsNorm(OutputShard("k", size, part=0, num_parts=num_parts), group, eps=1e-2)
    half.weight_loader(half.weight, weight)
    torch.testing.assert_close(half(x[:, :size]), whole(x)[:, :size])


TP_CASES = (
    "gemma2", "gemma3", "glm4", "granite", "phi3-longrope", "olmo2", "olmo2-wide-heads-tied", "cohere2",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.xdist_group("tensor-parallel")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.name in TP_CASES])
def test_two_ranks(case: Case, tmp_path: Path) -> None:
    """OLMo 2 norms queries and keys over all heads, also where ranks share a head; Phi-3's projections come fused."""
    check_two_ranks(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if not case.slow])
def test_bfloat16(case: Case, tmp_path: Path) -> None:
    """With a tied head, so that logits are small: bfloat16 itself is 6e-2 coarse at 10."""
    model_dir = make_tiny(case.architecture, tmp_path, **(case.config | {"tie_word_embeddings": True}))
    prompt = prompts_and_references(model_dir)[0][2]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(prompt)[1:, None])[:, 0].tolist()
    with open_engine(model_dir, dtype="bfloat16", **case.options) as engine:
        result = engine.generate(
            input_ids=prompt, sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=0
        )
    ours = [entry[0] for entry in result["meta_info"]["input_token_logprobs"][1:]]
    assert ours == pytest.approx(expected, abs=5e-2)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 30.0}, "Gemma 3 does not cap attention scores"),
        ("Gemma2ForCausalLM", {"sliding_window": None}, "sliding_window is null"),
        ("Cohere2ForCausalLM", {"layer_types": ["chunked_attention"]}, r"layer_types\[0\] must be"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(architecture: str, config: dict[str, Any], message: str) -> None:
    sizes = dict(vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    hf_config = getattr(transformers, architecture).config_class(**(sizes | {"num_key_value_heads": 1} | config))
    model_class, _ = ModelRegistry.resolve_model_cls([architecture])
    with pytest.raises(ValueError, match=message):
        model_class(hf_config)
