"""Spellings of config.json that programs have written over the years."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from rtp_llm.srt.configs.config_json import modernized
from rtp_llm.srt.configs.model_config import ModelConfig, ModelConfigError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}


def load(directory: Path, without: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    config = {key: value for key, value in (CONFIG | changes).items() if key not in without}
    (directory / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_pretrained(str(directory))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("bfloat16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("BFloat16", "bfloat16"),
        ("bf16", "bfloat16"),
        ("torch.float16", "float16"),
        ("half", "float16"),
        ("fp16", "float16"),
        ("torch.half", "float16"),
        ("float", "float32"),
        (" float32 ", "float32"),
        ("fp32", "float32"),
        ("auto", "float32"),
        ("", "float32"),
        (None, "float32"),
    ],
)
def test_dtypes(key: str, spelling: str | None, expected: str, tmp_path: Path) -> None:
    assert load(tmp_path, **{key: spelling}).dtype == expected
    text = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32, key: spelling}
    assert load(tmp_path, model_type="llava", text_config=text).dtype == expected


def test_a_dtype_that_is_not_computed_in_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"config.json asks for dtype 'float64'"):
        load(tmp_path, torch_dtype="torch.float64")


@pytest.mark.parametrize("missing", [None, [], "", "gone"])
@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("llama", "LlamaForCausalLM"), ("qwen3", "Qwen3ForCausalLM"), ("gpt2", "GPT2LMHeadModel")],
)
def test_missing_architectures_follow_from_the_model_type(
    missing: Any, model_type: str, expected: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = ("architectures",) if missing == "gone" else ()
    config = load(tmp_path, without, model_type=model_type, architectures=missing)
    assert config.architectures == config.hf_config.architectures == [expected]
    assert f"names no `architectures`; taken to be {expected}" in caplog.text


def test_missing_architectures_of_a_model_that_sees(tmp_path: Path) -> None:
    text = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32}
    config = load(tmp_path, ("architectures",), model_type="llava", text_config=text)
    assert config.architectures == ["LlavaForConditionalGeneration"]


def test_architectures_may_be_one_name(tmp_path: Path) -> None:
    config = load(tmp_path, architectures="LlamaForCausalLM")
    assert config.architectures == config.hf_config.architectures == ["LlamaForCausalLM"]


def test_a_model_type_that_generates_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"names no `architectures`.* `model_type` 'clip_vision_model'"):
        load(tmp_path, ("architectures",), model_type="clip_vision_model")


@pytest.mark.parametrize(
    ("changes", "bias", "theta"),
    [
        ({"model_type": "aquila"}, False, 10000.0),
        ({"model_type": "xverse"}, False, 10000.0),
        ({"model_type": "internlm", "bias": True}, True, 10000.0),
        ({"model_type": "internlm", "bias": False, "rotary": {"base": 500, "type": "dynamic"}}, False, 500),
        ({"model_type": "internlm"}, True, 10000.0),
    ],
)
def test_copies_of_llama_are_read_as_llama(changes: dict, bias: bool, theta: float, tmp_path: Path) -> None:
    config = load(tmp_path, **changes, auto_map={"AutoConfig": "own.OwnConfig"}).hf_config
    assert (config.model_type, config.attention_bias) == ("llama", bias)
    assert config.rope_parameters["rope_theta"] == theta


def test_what_needs_no_change_is_transformers_own(tmp_path: Path) -> None:
    config = CONFIG | {"eos_token_id": [2, 5], "torch_dtype": "bfloat16", "text_config": {"bos_token_id": 1}}
    assert modernized(config, "config.json") == config
    assert load(tmp_path, eos_token_id=7).hf_config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
