"""Rotary embeddings against transformers' own modules, for every kind."""

import math
import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from dense_forward import make_batch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb as apply_complex
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave as apply_deepseek
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as apply_interleaved
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as apply_neox
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial
from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

from rtp_llm.srt.cache.spec import LengthScaling
from rtp_llm.srt.layers.rope_scaling import yarn_get_mscale
from rtp_llm.srt.layers.rotary import (
    RotaryEmbedding,
    get_rope,
    get_rope_config,
    rope_lens,
    share_ropes,
)

MAX_POSITION = 96  # what the length-dependent kinds take as original length, unless they name another
ORIGINAL_LEN = 40


def random_parameters(kind: str, draw: random.Random, head_dim: int) -> dict[str, Any]:
    factor = draw.uniform(1.5, 9.0)
    original = {"original_max_position_embeddings": ORIGINAL_LEN}
    factors = {name: [draw.uniform(1, 5) for _ in range(head_dim // 2)] for name in ("short_factor", "long_factor")}
    return {
        "default": {},
        "linear": {"factor": factor},
        "dynamic": {"factor": factor},
        "llama3": {"factor": factor, "low_freq_factor": draw.uniform(0.5, 2), "high_freq_factor": draw.uniform(3, 8)}
        | original,
        "yarn": {"factor": factor} | original,
        "yarn-attention-factor": {"factor": factor, "attention_factor": draw.uniform(0.5, 2)} | original,
        "yarn-mscale": {"factor": factor, "mscale": draw.uniform(0.5, 2), "mscale_all_dim": draw.uniform(0.5, 2)}
        | original,
        "yarn-betas": {"factor": factor, "beta_fast": draw.uniform(8, 64), "beta_slow": draw.uniform(0.5, 4)}
        | {"truncate": False}
        | original,
        "longrope": factors | original,
        "longrope-factor": factors | {"factor": factor} | original,
        "longrope-attention-factor": factors | {"attention_factor": draw.uniform(0.5, 2)} | original,
        "proportional": {"partial_rotary_factor": draw.choice([0.25, 0.5, 1.0])},
        "proportional-factor": {"partial_rotary_factor": 0.5, "factor": factor},
    }[kind] | {"rope_type": kind.split("-")[0], "rope_theta": draw.choice([1e4, 5e5, 1234.5])}


KINDS = ["default", "linear", "dynamic", "llama3", "yarn", "yarn-attention-factor", "yarn-mscale", "yarn-betas"]
KINDS += ["longrope", "longrope-factor", "longrope-attention-factor", "proportional", "proportional-factor"]


def llama_config(head_dim: int, rope: dict[str, Any]) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=3 * head_dim,
        num_attention_heads=3,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITION,
        rope_parameters=dict(rope),
    )


def our_rope(config: Any, head_dim: int, is_neox_style: bool = True, layer_type: str | None = None) -> RotaryEmbedding:
    base, scaling, partial_factor = get_rope_config(config, layer_type)
    return get_rope(
        head_dim,
        max_position=config.max_position_embeddings,
        base=base,
        rope_scaling=scaling,
        partial_rotary_factor=partial_factor,
        is_neox_style=is_neox_style,
    )


def compare(ours: RotaryEmbedding, theirs: Any, apply: Any, head_dim: int, steps: list[tuple[int, int]]) -> None:
    """Rotates the same random heads, step by step; the first step is the prompt."""
    prompt_len = steps[0][1]
    for start, end in steps:
        q, k = torch.randn(end - start, 3, head_dim), torch.randn(end - start, 1, head_dim)
        batch = make_batch([0] * (end - start), start, prompt_len)
        ours.prepare_for_forward(batch)
        our_q, our_k = ours(batch.positions, q, k)
        flat_q, flat_k = ours(batch.positions, q.flatten(1), k.flatten(1))
        cos, sin = theirs(q, batch.positions[None])
        their_q, their_k = apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        torch.testing.assert_close(our_q, their_q[0].transpose(0, 1), atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(our_k, their_k[0].transpose(0, 1), atol=2e-6, rtol=2e-6)
        assert torch.equal(flat_q, our_q.flatten(1)) and torch.equal(flat_k, our_k.flatten(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_kind_as_transformers(kind: str, seed: int) -> None:
    draw = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    head_dim = draw.choice([8, 10, 32, 64])
    config = llama_config(head_dim, random_parameters(kind, draw, head_dim))
    for prompt_len in (5, ORIGINAL_LEN, MAX_POSITION + 1, 1500):
        ours, theirs = our_rope(config, head_dim), LlamaRotaryEmbedding(config)
        later = [(prompt_len + i, prompt_len + i + 1) for i in range(3)]
        compare(ours, theirs, apply_neox, head_dim, [(0, prompt_len), *later])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_decoding_across_the_original_length(kind: str) -> None:
    config = llama_config(32, random_parameters(kind, random.Random(7), 32))
    start = (MAX_POSITION if kind == "dynamic" else ORIGINAL_LEN) - 3
    steps = [(0, start), *[(start + i, start + i + 1) for i in range(8)]]
    compare(our_rope(config, 32), LlamaRotaryEmbedding(config), apply_neox, 32, steps)


def test_far_positions_need_no_preparation() -> None:
    config = llama_config(64, {"rope_type": "default", "rope_theta": 1e4})
    ours, positions = our_rope(config, 64), torch.tensor([0, 7, 10_000, 1_000_000])
    q = torch.randn(4, 2, 64)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    expected = apply_neox(q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos, sin)[0][0].transpose(0, 1)
    torch.testing.assert_close(ours(positions, q, q)[0], expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.3125])  # the last rotates an odd number, rounded up to pairs
def test_partial_as_stablelm(factor: float) -> None:
    config = transformers.StableLmConfig(
        hidden_size=48, num_attention_heads=3, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": factor}
    )
    ours, rotary_dim = our_rope(config, 16), math.ceil(16 * factor / 2) * 2
    x = torch.randn(9, 3, 16)
    positions = torch.arange(9)
    cos, sin = StableLmRotaryEmbedding(config)(x, positions[None])
    heads = x.transpose(0, 1)[None]
    rotated, _ = apply_neox(heads[..., :rotary_dim], heads[..., :rotary_dim], cos, sin)
    expected = torch.cat((rotated, heads[..., rotary_dim:]), dim=-1)[0].transpose(0, 1)
    torch.testing.assert_close(ours(positions, x, x)[0], expected, atol=2e-6, rtol=2e-6)
    assert torch.equal(ours(positions, x, x)[1][..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_interleaved_as_glm(factor: float) -> None:
    rope = {"rope_theta": 1e4, "partial_rotary_factor": factor}
    config = transformers.GlmConfig(hidden_size=48, num_attention_heads=3, head_dim=16, rope_parameters=rope)
    ours = our_rope(config, 16, is_neox_style=False)
    compare(ours, GlmRotaryEmbedding(config), apply_interleaved, 16, [(0, 33), (33, 34), (34, 35)])


def test_partial_longrope_as_phi3() -> None:
    draw = random.Random(3)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    rope |= {name: [draw.uniform(1, 5) for _ in range(6)] for name in ("short_factor", "long_factor")}
    sizes = dict(hidden_size=48, num_attention_heads=3, max_position_embeddings=128, pad_token_id=0)
    config = transformers.Phi3Config(**sizes, original_max_position_embeddings=ORIGINAL_LEN, rope_parameters=rope)
    steps = [(0, ORIGINAL_LEN - 1), *[(ORIGINAL_LEN - 1 + i, ORIGINAL_LEN + i) for i in range(4)]]
    compare(our_rope(config, 16), Phi3RotaryEmbedding(config), apply_partial, 16, steps)


def test_two_bases_as_gemma3() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = transformers.Gemma3TextConfig(head_dim=12, num_hidden_layers=6, rope_parameters=rope)
    theirs = Gemma3RotaryEmbedding(config)
    for layer_type in rope:
        ours = our_rope(config, 12, layer_type=layer_type)
        compare(ours, partial(theirs, layer_type=layer_type), apply_neox, 12, [(0, 33), (33, 34)])


def deepseek_rope() -> dict[str, Any]:
    scaling = {"factor": 7.0, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 32, "beta_slow": 1}
    return scaling | {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL_LEN}


def test_yarn_as_deepseek_v2() -> None:
    sizes = dict(hidden_size=48, num_attention_heads=3, qk_rope_head_dim=16, head_dim=16)
    config = transformers.DeepseekV2Config(**sizes, max_position_embeddings=448, rope_parameters=deepseek_rope())
    theirs = DeepseekV2RotaryEmbedding(config)

    def rotation(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, None]:
        return theirs(x, positions), None

    def apply(q: torch.Tensor, k: torch.Tensor, rotation: torch.Tensor, _: None) -> tuple[torch.Tensor, torch.Tensor]:
        return apply_complex(q, k, rotation)

    compare(our_rope(config, 16, is_neox_style=False), rotation, apply, 16, [(0, 400), (400, 401)])


def test_yarn_as_deepseek_v3() -> None:
    """Its rotated components come in another order, the same for queries and keys: scores are what must be equal."""
    sizes = dict(hidden_size=48, num_attention_heads=3, qk_rope_head_dim=16, head_dim=16)
    config = transformers.DeepseekV3Config(**sizes, max_position_embeddings=448, rope_parameters=deepseek_rope())
    ours, theirs = our_rope(config, 16, is_neox_style=False), DeepseekV3RotaryEmbedding(config)
    q, k, positions = torch.randn(90, 3, 16), torch.randn(90, 1, 16), torch.arange(0, 450, 5)
    our_q, our_k = ours(positions, q, k)
    rotated = apply_deepseek(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *theirs(q, positions[None]))
    their_q, their_k = (x[0].transpose(0, 1) for x in rotated)
    scores, expected = (torch.einsum("qhd,kgd->hqk", *x) for x in ((our_q, our_k), (their_q, their_k)))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    model = DeepseekV3Attention(config, 0)
    assert yarn_get_mscale(7.0, 1.3) ** 2 * config.qk_head_dim**-0.5 == pytest.approx(model.scaling)
    assert yarn_get_mscale(1.0, 1.3) == yarn_get_mscale(0.5) == 1.0


@pytest.mark.parametrize(
    ("given", "factor"),
    [
        ({}, yarn_get_mscale(7.0)),
        ({"mscale_all_dim": 1}, 1.0),
        ({"mscale": 0.7}, yarn_get_mscale(7.0, 0.7)),
        ({"mscale": 0.7, "mscale_all_dim": 1.3}, yarn_get_mscale(7.0, 0.7) / yarn_get_mscale(7.0, 1.3)),
    ],
)
def test_yarn_as_deepseeks_own_code(given: dict[str, float], factor: float) -> None:
    """Where model files of vLLM ask for it: ``mscale`` is 1 by default, ``mscale_all_dim`` 0 (DeepSeek-V2, 2024)."""
    rope = {name: value for name, value in deepseek_rope().items() if not name.startswith("mscale")} | given
    ours = get_rope(16, max_position=448, rope_parameters=rope | {"rope_type": "deepseek_yarn"})
    assert ours.attention_factor == pytest.approx(factor)


def test_chunks_are_rotated_for_the_whole_prompt() -> None:
    ours = our_rope(llama_config(16, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}), 16)
    q = torch.randn(300, 2, 16)
    whole = make_batch([0] * 300, 0, 300)
    ours.prepare_for_forward(whole)
    expected, _ = ours(whole.positions, q, q)
    for start in range(0, 300, 70):
        chunk = make_batch([0] * min(70, 300 - start), start, 300)
        ours.prepare_for_forward(chunk)
        part, _ = ours(chunk.positions, q[start : start + 70], q[start : start + 70])
        torch.testing.assert_close(part, expected[start : start + 70], atol=1e-6, rtol=0)


def test_rope_lens_of_several_rows() -> None:
    batch: Any = SimpleNamespace(
        prompt_lens_cpu=[5, 3, 9], extend_prefix_lens_cpu=[0, 3, 8], extend_seq_lens_cpu=[4, 1, 3]
    )
    assert rope_lens(batch).tolist() == [5, 5, 5, 5, 4, 9, 10, 11]
    empty: Any = SimpleNamespace(prompt_lens_cpu=[], extend_prefix_lens_cpu=[], extend_seq_lens_cpu=[])
    assert rope_lens(empty).tolist() == []


def test_length_scaling_is_told() -> None:
    def told(kind: str) -> LengthScaling | None:
        return our_rope(llama_config(16, random_parameters(kind, random.Random(0), 16)), 16).length_scaling

    assert told("default") is told("linear") is told("yarn") is told("llama3") is None
    assert told("dynamic") == LengthScaling(MAX_POSITION, per_length=True)
    assert told("longrope") == LengthScaling(ORIGINAL_LEN, per_length=False)


def test_length_dependent_kinds_insist_on_preparation() -> None:
    ours = our_rope(llama_config(16, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), 16)
    with pytest.raises(RuntimeError, match="prepare_for_forward"):
        ours(torch.arange(3), torch.randn(3, 16), torch.randn(3, 16))


@pytest.mark.parametrize("shape", [(5, 64), (5, 4, 16)])
def test_queries_alone(shape: tuple[int, ...]) -> None:
    rope, positions, q = get_rope(16), torch.arange(5) * 7, torch.randn(shape)
    rotated, none = rope(positions, q, None)
    assert none is None
    assert torch.equal(rotated, rope(positions, q, q)[0]) and rotated.shape == shape


def test_no_tokens() -> None:
    ours = get_rope(16)
    q, k = ours(torch.empty(0, dtype=torch.int64), torch.empty(0, 32), torch.empty(0, 1, 16))
    assert q.shape == (0, 32) and k.shape == (0, 1, 16)


def test_dtype_of_the_queries_is_kept() -> None:
    q = torch.randn(5, 32, dtype=torch.bfloat16)
    rotated, _ = get_rope(16)(torch.arange(5), q, q)
    assert rotated.dtype == torch.bfloat16


def test_step_results_stay_in_place_and_in_any_grad_mode() -> None:
    ours = get_rope(16)
    with torch.inference_mode():
        ours.prepare_for_forward(make_batch([0] * 9, 0, 9))
    address = ours._step_cos_sin.data_ptr()
    with torch.no_grad():
        batch = make_batch([0] * 4, 9, 9)
        ours.prepare_for_forward(batch)
    assert ours._step_cos_sin.data_ptr() == address
    q = torch.randn(4, 16)
    assert torch.equal(ours(batch.positions, q, q)[0], ours(batch.positions.clone(), q, q)[0])


def test_sharing_ends_with_the_build() -> None:
    with share_ropes():
        first, second, other = get_rope(16), get_rope(16), get_rope(16, base=5e5)
    assert first is second is not other
    assert get_rope(16) is not get_rope(16)


def test_rope_config_in_all_spellings() -> None:
    def config(**fields: Any) -> Any:
        return SimpleNamespace(**fields)

    assert get_rope_config(config()) == (10000.0, None, 1.0)
    assert get_rope_config(config(rope_theta=5e5, rope_scaling=None)) == (5e5, None, 1.0)
    old = config(rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2.0}, partial_rotary_factor=0.5)
    assert get_rope_config(old) == (1e6, {"type": "linear", "factor": 2.0}, 0.5)
    new = config(rope_parameters={"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.25})
    assert get_rope_config(new) == (7.0, None, 0.25)
    su = config(rope_scaling={"type": "su"}, original_max_position_embeddings=8)
    assert get_rope_config(su)[1] == {"type": "su", "original_max_position_embeddings": 8}
    assert get_rope_config(new, "full_attention") == (7.0, None, 0.25)
    nested = config(rope_parameters={"full_attention": {"rope_theta": 3.0, "rope_type": "linear", "factor": 2.0}})
    assert get_rope_config(nested, "full_attention") == (3.0, {"rope_type": "linear", "factor": 2.0}, 1.0)
    for layer_type in (None, "sliding_attention"):
        with pytest.raises(ValueError, match=rf"must pick one of \['full_attention'\] per layer, not {layer_type}"):
            get_rope_config(nested, layer_type)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"unknown rope kind 'spiral'; have \['default', 'dynamic', 'linear'"):
        get_rope(16, rope_scaling={"rope_type": "spiral"})
    with pytest.raises(ValueError, match="'linear' needs 'factor'"):
        get_rope(16, rope_scaling={"rope_type": "linear"})
    with pytest.raises(ValueError, match="needs 8 numbers in 'short_factor', got 3"):
        get_rope(16, rope_scaling={"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 8})
    with pytest.raises(ValueError, match="cannot rotate 32 components of heads of size 16"):
        get_rope(16, rotary_dim=32)
