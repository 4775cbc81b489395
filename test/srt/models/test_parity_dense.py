"""Gemma 2 and 3, Phi-3, OLMo 2, GLM-4, Granite and Command R7B in our engine against transformers, in float32.

Each checkpoint is asked in chunks, batched, from a warm cache, and for a second turn, with prompts past every window.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rtp_llm import Engine
from rtp_llm.models_py.olmo2 import Olmo2HeadsNorm
from rtp_llm.srt.distributed.parallel_state import TPGroup
from rtp_llm.srt.layers.linear import OutputShard
from rtp_llm.srt.models.registry import ModelRegistry
from tiny_models import Reference, assert_same_ids, make_tiny, random_prompts, reference

LENGTHS = (1, 18, 40, 130)
NEW_TOKENS = 12
LOGPROB_TOLERANCE = 1e-3
ORIGINAL_LEN = 53  # of LongRoPE: no prompt grows past it: at that point transformers' Phi-3 computes all keys anew
FULL, WINDOW = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Case:
    name: str
    architecture: str
    config: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)  # of the engine
    slow: bool = False

    @property
    def page_size(self) -> int:
        return self.options.get("page_size", 1)

    @property
    def has_windows(self) -> bool:
        return bool(self.config.get("sliding_window"))


CHUNKS = {"chunked_prefill_size": 16}
PAGES = CHUNKS | {"page_size": 4}


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


@dataclass(frozen=True)
class Served:
    """An engine, the prompts it is asked, and what transformers answers to them."""

    case: Case
    engine: Engine
    model_dir: str
    prompts: list[list[int]]
    references: list[Reference]

    def generate(self, input_ids: Any, **options: Any) -> Any:
        params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        return self.engine.generate(input_ids=input_ids, sampling_params=params, **options)


def open_engine(model_dir: str, **options: Any) -> Engine:
    options = {"dtype": "float32"} | options
    return Engine(
        model_path=model_dir,
        device="cpu",
        skip_tokenizer_init=True,
        context_length=512,
        max_total_tokens=2048,
        **options,
    )


def prompts_and_references(model_dir: str) -> tuple[list[list[int]], list[Reference]]:
    vocab_size = json.loads(Path(model_dir, "config.json").read_text())["vocab_size"]
    prompts = random_prompts(vocab_size, LENGTHS)
    return prompts, [reference(model_dir, tuple(prompt), NEW_TOKENS) for prompt in prompts]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            case,
            id=case.name,
            marks=[pytest.mark.xdist_group(case.name), *([pytest.mark.slow] if case.slow else [])],
        )
        for case in CASES
    ],
)
def engine_of_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    case: Case = request.param
    model_dir = make_tiny(case.architecture, tmp_path_factory.mktemp(case.name), **case.config)
    with open_engine(model_dir, **case.options) as engine:
        yield Served(case, engine, model_dir, *prompts_and_references(model_dir))


@pytest.fixture
def served(engine_of_case: Served) -> Served:
    flushed, message = engine_of_case.engine.flush_cache()
    assert flushed, message
    return engine_of_case


def check(served: Served, results: list[dict[str, Any]], what: str) -> None:
    for result, prompt, expected in zip(results, served.prompts, served.references, strict=True):
        assert_same_ids(result["output_ids"], expected, f"{served.case.name}, {what}, prompt of {len(prompt)}")


def check_logprobs(result: dict[str, Any], expected: Reference, tolerance: float = LOGPROB_TOLERANCE) -> None:
    prompt_logprobs = [entry[0] for entry in result["meta_info"]["input_token_logprobs"][1:]]
    assert prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=tolerance)
    if result["output_ids"] == expected.output_ids:
        output_logprobs = [entry[0] for entry in result["meta_info"]["output_token_logprobs"]]
        assert output_logprobs == pytest.approx(expected.output_logprobs, abs=tolerance)


def test_one_by_one(served: Served) -> None:
    check(served, [served.generate(prompt) for prompt in served.prompts], "one by one")


def test_batched_with_logprobs(served: Served) -> None:
    results = served.generate(served.prompts, return_logprob=True, logprob_start_len=0)
    check(served, results, "batched")
    for result, expected in zip(results, served.references, strict=True):
        check_logprobs(result, expected)


def test_from_a_warm_cache(served: Served) -> None:
    served.generate(served.prompts)
    results = [served.generate(prompt) for prompt in served.prompts]
    check(served, results, "warm")
    for result, prompt in zip(results, served.prompts, strict=True):
        cached = result["meta_info"]["cached_tokens"]
        most = (len(prompt) - 1) // served.case.page_size * served.case.page_size
        # With windows, the page that one reaches back into may be gone.
        assert cached <= most if served.case.has_windows and served.case.page_size > 1 else cached == most


def test_a_second_turn(served: Served) -> None:
    for first in (served.prompts[1], served.prompts[2]):
        prompt = [*first, *served.generate(first)["output_ids"], 3, 1, 4]
        expected = reference(served.model_dir, tuple(prompt), NEW_TOKENS)
        assert_same_ids(served.generate(prompt)["output_ids"], expected, f"{served.case.name}, second turn")


class FirstOfTwoRanks(TPGroup):
    """Sums with what the second rank is said to give."""

    def __init__(self, given_by_second: torch.Tensor) -> None:
        super().__init__(rank=0, world_size=2)
        self.given_by_second = given_by_second

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.given_by_second


@pytest.mark.parametrize("num_parts", [1, 2], ids=["same-heads", "half-of-the-heads"])
def test_olmo2_norms_the_heads_of_all_ranks(num_parts: int) -> None:
    x, weight = torch.randn(5, 12), torch.randn(12)
    whole = Olmo2HeadsNorm(OutputShard("k", 12, part=0, num_parts=1), TPGroup(0, 1), eps=1e-2)
    whole.weight_loader(whole.weight, weight)
    size = 12 // num_parts
    other_heads = x if num_parts == 1 else x[:, size:]
    group = FirstOfTwoRanks(other_heads.square().mean(dim=-1, keepdim=True))
    half = Olmo2HeadsNorm(OutputShard("k", size, part=0, num_parts=num_parts), group, eps=1e-2)
    half.weight_loader(half.weight, weight)
    torch.testing.assert_close(half(x[:, :size]), whole(x)[:, :size])


TP_CASES = ("gemma2", "phi3-longrope", "olmo2", "olmo2-wide-heads-tied", "cohere2")


@pytest.mark.slow
@pytest.mark.xdist_group("tensor-parallel")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.name in TP_CASES])
def test_two_ranks(case: Case, tmp_path: Path) -> None:
    """OLMo 2 norms queries and keys over all heads, also where ranks share a head; Phi-3's projections come fused."""
    model_dir = make_tiny(case.architecture, tmp_path, **case.config)
    prompts, references = prompts_and_references(model_dir)
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    with open_engine(model_dir, tp_size=2, **case.options) as engine:
        results = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True, logprob_start_len=0)
    for result, expected in zip(results, references, strict=True):
        assert_same_ids(result["output_ids"], expected, f"{case.name}, two ranks")
        check_logprobs(result, expected)


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
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
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
