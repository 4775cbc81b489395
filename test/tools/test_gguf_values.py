"""Transformers' model of a GGUF: its weights are the file's, with what the converter changed undone."""

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from gguf_conversions import CONVERSIONS
from gguf_writing import write_gguf
from rtp_llm.srt.configs.model_path import resolve_model_path
from rtp_llm.tools.reference import TransformersModel
from tiny_models import make_tiny

IDS = [5, 17, 40, 3, 22]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def logits(folder: str) -> torch.Tensor:
    return TransformersModel(folder, "float32", "cpu").prompt_logits(IDS)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_it_answers_as_that_of_the_checkpoint(architecture: str, tmp_path: Path) -> None:
    made = make_tiny(architecture, tmp_path / "made", sliding_window=None)
    file = write_gguf(made, tmp_path / "made.gguf", CONVERSIONS[architecture])
    ours, theirs = logits(resolve_model_path(str(file), with_tokenizer=False)), logits(made)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_blocks_are_computed(tmp_path: Path) -> None:
    made = make_tiny("LlamaForCausalLM", tmp_path / "made", hidden_size=64, intermediate_size=96)
    file = write_gguf(made, tmp_path / "made.gguf", CONVERSIONS["LlamaForCausalLM"], GGMLQuantizationType.Q8_0)
    ours, theirs = logits(resolve_model_path(str(file), with_tokenizer=False)), logits(made)
    assert 0 < (ours - theirs).abs().mean() < 0.05 * theirs.std()
