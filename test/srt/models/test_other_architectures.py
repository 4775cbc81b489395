"""Checkpoints whose `architectures` is another name for one that is supported: bare models, copies, historic names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.models.weight_loading import WeightLoadError
from tiny_models import make_tiny

BARE = {
    "LlamaForCausalLM": "LlamaModel",
    "MistralForCausalLM": "MistralModel",
    "Qwen2ForCausalLM": "Qwen2Model",
    "Qwen3ForCausalLM": "Qwen3Model",
    "Qwen3MoeForCausalLM": "Qwen3MoeModel",
    "Gemma2ForCausalLM": "Gemma2Model",
    "Gemma3ForCausalLM": "Gemma3TextModel",
    "Phi3ForCausalLM": "Phi3Model",
    "GPT2LMHeadModel": "GPT2Model",
    "GPTNeoXForCausalLM": "GPTNeoXModel",
}


def weights_of(directory: str | Path) -> dict[str, torch.Tensor]:
    return load_model(ModelConfig.from_pretrained(str(directory)), str(directory)).state_dict()


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in expected.items())


def save_bare(architecture: str, directory: Path, is_tied: bool) -> str:
    """A checkpoint saved from the model below the head; returns the one of the whole model."""
    whole = make_tiny(architecture, directory / "whole", tie_word_embeddings=is_tied)
    AutoModelForCausalLM.from_pretrained(whole).base_model.save_pretrained(directory / "bare")
    return whole


@pytest.mark.parametrize("architecture", BARE)
def test_a_bare_model_with_tied_embeddings_is_the_whole(architecture: str, tmp_path: Path) -> None:
    whole = save_bare(architecture, tmp_path, is_tied=True)
    named = json.loads((tmp_path / "bare" / "config.json").read_text())["architectures"]
    assert named == [BARE[architecture]]
    assert_same(weights_of(tmp_path / "bare"), weights_of(whole))


@pytest.mark.parametrize("architecture", BARE)
def test_a_bare_model_without_a_head_is_refused_as_such(architecture: str, tmp_path: Path) -> None:
    save_bare(architecture, tmp_path, is_tied=False)
    with pytest.raises(WeightLoadError, match="the bare model without a head, which gives hidden states"):
        weights_of(tmp_path / "bare")


@pytest.mark.parametrize("changes", [
    {"architectures": ["LLaMAForCausalLM"]},
    {"architectures": "LlamaForCausalLM"},
    {"architectures": None},
    {"architectures": ["AquilaForCausalLM"], "model_type": "aquila"},
    {"architectures": ["AquilaModel"], "model_type": "aquila"},
    {"architectures": ["XverseForCausalLM"], "model_type": "xverse", "auto_map": {"AutoConfig": "own.Config"}},
    {"architectures": ["InternLMForCausalLM"], "model_type": "internlm", "bias": True, "attention_bias": None},
])  # fmt: skip
def test_other_names_load_the_same_weights(changes: dict[str, Any], tmp_path: Path) -> None:
    plain = make_tiny("LlamaForCausalLM", tmp_path, attention_bias=changes.get("bias", False))
    expected = weights_of(plain)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    if config["attention_bias"] is None:
        del config["attention_bias"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(weights_of(plain), expected)
