"""config.json made of a GGUF's metadata."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from gguf_files import arrays_of, llama_metadata, write_gguf
from rtp_llm.srt.gguf.config import config_json
from rtp_llm.srt.gguf.file import GGUFFile
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.gguf.generation import generation_config
from rtp_llm.srt.gguf.header import GGUFError
from rtp_llm.srt.gguf.rope import llama3_factors
from rtp_llm.srt.layers.rope_scaling import FREQUENCIES, RopeSpec
from rtp_llm.srt.models.registry import DuplicateModelError, ModelRegistry


@pytest.fixture
def read(tmp_path: Path):
    def read_config(metadata: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
        path = write_gguf(tmp_path / "toy.gguf", metadata, arrays_of() if arrays is None else arrays)
        return config_json(GGUFFile.open(path))

    return read_config


@pytest.fixture
def registered(monkeypatch):
    """Registers a class of the given forms, under a name."""

    def register(name: str, *forms: GGUFForm, **attributes: Any) -> type:
        model_class = type(name, (nn.Module,), {"gguf": forms, **attributes})
        monkeypatch.setitem(ModelRegistry.models.overrides, name, model_class)
        return model_class

    return register


def test_llama(read):
    config = read(llama_metadata())
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 256,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": 64,
        "dtype": "float32",
        "quantization_config": {"quant_method": "gguf"},
    }


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("qwen2", {"rope__dimension_count": None}),
        ("qwen3", {"attention__key_length": 16, "attention__value_length": 16}),
        ("gemma3", {"attention__key_length": 16, "attention__value_length": 16, "attention__sliding_window": 32}),
    ],
)
def test_as_transformers_reads_it(tmp_path, architecture, changes):
    path = write_gguf(tmp_path / "toy.gguf", llama_metadata(architecture, **changes), arrays_of("output.weight"))
    ours = config_json(GGUFFile.open(path))
    theirs = load_gguf_checkpoint(str(path))["config"]
    known = {key: _rounded(value) for key, value in theirs.items() if key in ours}
    assert {"hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings"} <= known.keys()
    assert {key: _rounded(ours[key]) for key in known} == known


def _rounded(value: Any) -> Any:
    return np.float32(value) if isinstance(value, float) else value


def test_gemma3_makes_what_its_config_json_would(read):
    sizes = {"attention__key_length": 16, "attention__value_length": 16, "attention__sliding_window": 32}
    scaling = {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}
    said = read(llama_metadata("gemma3", block_count=3, **sizes, **scaling))
    config = AutoConfig.for_model(**said)
    assert config.query_pre_attn_scalar == 16 and config.sliding_window == 32
    assert config.layer_types == ["sliding_attention"] * 3
    full, sliding = config.rope_parameters["full_attention"], config.rope_parameters["sliding_attention"]
    assert (full["rope_theta"], full["rope_type"], full["factor"]) == (5e5, "linear", 8.0)
    assert (sliding["rope_theta"], sliding["rope_type"]) == (10_000.0, "default")
    without = read(llama_metadata("gemma3", attention__key_length=16, attention__value_length=16))
    assert without["layer_types"] == ["full_attention"] * 2


def test_a_gemma_of_27b_scales_its_scores_otherwise(read):
    sizes = {"attention__key_length": 16, "attention__value_length": 16}
    metadata = llama_metadata("gemma3", block_count=62, **sizes)
    config = read(metadata, arrays_of(*(f"blk.{i}.ffn_norm.weight" for i in range(62))))
    assert config["query_pre_attn_scalar"] == 32 // 4


# Rotary positions


def test_linear_and_yarn(read):
    linear = read(llama_metadata(rope__scaling__type="linear", rope__scaling__factor=4.0))
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 16.0}
    config = read(llama_metadata(**{f"rope__scaling__{key}": value for key, value in yarn.items()}))
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
    }
    assert "rope_scaling" not in read(llama_metadata(rope__scaling__type="none"))


def frequencies(scaling: dict[str, Any], base: float) -> torch.Tensor:
    return FREQUENCIES[scaling["rope_type"]](RopeSpec(64, 64, 131072, base, True, scaling, torch.float32))[0]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3s_factors_become_its_scaling(read, factor):
    wanted = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = (frequencies({"rope_type": "default"}, 5e5) / frequencies(wanted, 5e5)).numpy()
    assert factors == pytest.approx(llama3_factors(5e5, 32, factor), rel=1e-5)
    config = read(llama_metadata(), arrays_of() | {"rope_freqs.weight": factors})
    assert config["rope_scaling"] == wanted


def test_other_factors_stay_as_they_are(read):
    factors = np.array([1, 1.5, 2, 3], np.float32)
    config = read(llama_metadata(), arrays_of() | {"rope_freqs.weight": factors})
    assert config["rope_scaling"] == {
        "rope_type": "longrope",
        "long_factor": factors.tolist(),
        "short_factor": factors.tolist(),
        "attention_factor": 1.0,
        "original_max_position_embeddings": 256,
    }


def test_longrope(read):
    arrays = {"rope_factors_long.weight": np.array([2, 4], np.float32), "rope_factors_short.weight": np.ones(2, "f4")}
    keys = {"rope__scaling__original_context_length": 128, "rope__scaling__attn_factor": 1.25}
    config = read(llama_metadata(**keys), arrays_of() | arrays)
    assert config["rope_scaling"] == {
        "rope_type": "longrope",
        "long_factor": [2.0, 4.0],
        "short_factor": [1.0, 1.0],
        "original_max_position_embeddings": 128,
        "attention_factor": 1.25,
    }


def test_a_part_of_each_head_may_be_rotated(read):
    assert read(llama_metadata(rope__dimension_count=2))["partial_rotary_factor"] == 0.25
    assert "partial_rotary_factor" not in read(llama_metadata(rope__dimension_count=8))
    assert read(llama_metadata(rope__dimension_count=16))["head_dim"] == 16  # files that do not say it otherwise


# What tensors say


def test_tensors_say_what_keys_do_not(read):
    names = ("output.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate.bias")
    config = read(llama_metadata(vocab_size=60), arrays_of(*names, num_rows=80))
    assert config["vocab_size"] == 80  # padded
    assert not config["tie_word_embeddings"] and config["attention_bias"] and config["mlp_bias"]


def test_quantized_files_are_computed_in_bfloat16(read):
    half = {"output.weight": np.zeros((64, 32), np.float16)}
    assert read(llama_metadata(), arrays_of() | half)["dtype"] == "bfloat16"


def test_equal_values_of_layers_are_one(read):
    assert read(llama_metadata(attention__head_count_kv=[2, 2]))["num_key_value_heads"] == 2


# The model class


def test_a_registered_class_reads_its_files(read, registered):
    def adapt(metadata: Any, config: dict[str, Any]) -> None:
        config["heads"] = metadata["zeta.attention.head_count"] * config["depth"]
        del config["hidden_size"]

    names = {"embedding_length": "width", "zeta_only": "own", "not_there": "missing"}
    form = GGUFForm("zeta", names, {"depth": 3, "width": 1}, {"output.weight": "has_head"}, adapt)
    registered("ZetaForCausalLM", form, config_class=type("ZetaConfig", (), {"model_type": "zeta9"}))
    with pytest.raises(GGUFError, match=r"zeta: KeyError\('hidden_size'\)"):
        read(llama_metadata("zeta", zeta_only="x"))
    form = GGUFForm("zeta", names, {"depth": 3, "hidden_size": 1}, {"output.weight": "has_head"}, adapt)
    registered("ZetaForCausalLM", form, config_class=type("ZetaConfig", (), {"model_type": "zeta9"}))
    config = read(llama_metadata("zeta", zeta_only="x"))
    assert config["architectures"] == ["ZetaForCausalLM"] and config["model_type"] == "zeta9"
    assert (config["width"], config["own"], config["heads"], config["has_head"]) == (32, "x", 12, False)
    assert "missing" not in config


def test_metadata_decide_between_classes_of_one_architecture(read, registered):
    registered("Plain", GGUFForm("zeta"))
    registered("Sparse", GGUFForm("zeta", matches=lambda metadata: metadata.get("zeta.expert_count", 0) > 0))
    assert read(llama_metadata("zeta"))["architectures"] == ["Plain"]
    assert read(llama_metadata("zeta", expert_count=4))["architectures"] == ["Sparse"]
    registered("Other", GGUFForm("zeta"))
    with pytest.raises(GGUFError, match="several classes read its architecture 'zeta': Plain, Other"):
        read(llama_metadata("zeta"))


def test_a_class_from_outside_wins(read, registered):
    registered("MineForCausalLM", GGUFForm("llama", defaults={"model_type": "llama"}))
    config = read(llama_metadata())
    assert config["architectures"] == ["MineForCausalLM"] and config["model_type"] == "llama"


def test_an_unknown_architecture_lists_what_there_is(read):
    with pytest.raises(GGUFError, match=r"toy\.gguf: no model here .* 'nobodys'; have .*gemma3, .*llama.*qwen3"):
        read(llama_metadata("nobodys"))


# Hostile values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_length": None}, "`llama.embedding_length` is missing"),
        ({"block_count": None}, "`llama.block_count` is missing"),
        ({"context_length": None}, "`llama.context_length` is missing"),
        ({"attention__head_count": None}, "`llama.attention.head_count` is missing"),
        ({"attention__layer_norm_rms_epsilon": None}, "`llama.attention.layer_norm_rms_epsilon` is missing"),
        ({"block_count": 2**31}, r"`llama.block_count` must be an integer from 0 to 134217728, not 2147483648"),
        ({"block_count": 4000}, "`llama.block_count` is 4000, but there are only 3 tensors"),
        ({"block_count": 0}, "`llama.block_count` must be a positive integer, not 0"),
        ({"attention__head_count": 0}, "`llama.attention.head_count` must be a positive integer, not 0"),
        ({"block_count": [2]}, "`llama.block_count` must be a positive integer, not "),
        ({"rope__dimension_count": [2]}, "`llama.rope.dimension_count` must be an integer"),
        ({"embedding_length": "wide"}, "`llama.embedding_length` must be an integer .*, not 'wide'"),
        ({"embedding_length": 64}, "`llama.embedding_length` is 64, but tensor 'token_embd.weight' has 32"),
        ({"attention__head_count_kv": [2, 1]}, "`llama.attention.head_count_kv` differs from layer to layer"),
        ({"attention__head_count_kv": ["a"]}, "`llama.attention.head_count_kv` must be an integer"),
        ({"feed_forward_length": True}, "`llama.feed_forward_length` must be an integer"),
        ({"rope__freq_base": math.inf}, "`llama.rope.freq_base` must be a finite number"),
        ({"rope__freq_base": math.nan}, "`llama.rope.freq_base` must be a finite number"),
        ({"attention__key_length": 8, "attention__value_length": 4}, "`llama.attention.value_length` is 4"),
        ({"rope__scaling__type": "wavy"}, "`llama.rope.scaling.type` is 'wavy'"),
        ({"rope__scaling__type": "linear"}, "`llama.rope.scaling.factor` must be a positive number, not None"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0}, "original_context_length` must be"),
        ({"rope__dimension_count": "half"}, "`llama.rope.dimension_count` must be an integer"),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_key(read, changes, message):
    with pytest.raises(GGUFError, match=f"toy.gguf: .*{message}"):
        read(llama_metadata(**changes))


def test_what_is_no_language_model_is_refused(read):
    with pytest.raises(GGUFError, match=r"`general\.type` is 'adapter'"):
        read(llama_metadata() | {"general.type": "adapter"})
    with pytest.raises(GGUFError, match="vision part"):
        read({"general.architecture": "clip"})
    with pytest.raises(GGUFError, match="no tensors"):
        read(llama_metadata(), {})
    with pytest.raises(GGUFError, match=r"'token_embd\.weight' is missing"):
        read(llama_metadata(), {"output.weight": np.zeros(4, np.float32)})
    with pytest.raises(GGUFError, match=r"has 64 tokens, but tensor 'token_embd\.weight' only 8 rows"):
        read(llama_metadata(), arrays_of(num_rows=8))


def test_impossible_factors_are_refused(read):
    for factors in (np.array([1, -1], "f4"), np.array([1, math.nan], "f4"), np.ones((2, 2), "f4"), np.ones(2, "f2")):
        with pytest.raises(GGUFError, match=r"tensor 'rope_freqs\.weight'"):
            read(llama_metadata(), arrays_of() | {"rope_freqs.weight": factors})


def test_two_files_that_claim_a_class_are_told(read, monkeypatch):
    def twice(architecture: str) -> list:
        raise DuplicateModelError("claimed by several files")

    monkeypatch.setattr(ModelRegistry, "gguf_classes", twice)
    with pytest.raises(DuplicateModelError):
        read(llama_metadata())


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-5, 2**40), st.floats(), st.text(max_size=2), st.booleans()), max_size=4),
)
MORE_KEYS = {
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.sliding_window": 32,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.freq_base_swa": 1e4,
    "expert_count": 4,
    "expert_used_count": 2,
}


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_is_used_or_refused_by_key(tmp_path, architecture, data):
    metadata = llama_metadata(architecture, **{name.replace(".", "__"): value for name, value in MORE_KEYS.items()})
    metadata |= {"general.type": "model", "general.sampling.temp": 0.5, "tokenizer.ggml.eot_token_id": 3}
    path = tmp_path / "toy.gguf"
    if not path.exists():
        write_gguf(path, metadata, arrays_of())
    tensors = GGUFFile.open(path).tensors
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), max_size=3)):
        metadata[key] = data.draw(VALUES)
    metadata["general.architecture"] = architecture
    try:
        file = GGUFFile((path,), {key: value for key, value in metadata.items() if value is not None}, tensors)
        json.dumps([config_json(file), generation_config(file)], allow_nan=False)
    except GGUFError as error:
        assert "toy.gguf" in str(error)
