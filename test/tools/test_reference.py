"""A reference is the checkpoint's, wholly; and what is said of near ties in 16 bits."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import rtp_llm
from parity import rewrite_tensors
from rtp_llm.tools.reference import (
    HalfLoadedError,
    NoProcessorError,
    TransformersModel,
    drawn_image,
    near_ties,
    ties_text,
)
from rtp_llm.tools.verify.pixels import pixels_note
from rtp_llm.tools.verify.prompts import Prompt
from rtp_llm.tools.verify.ties import parting
from tiny_models import make_tiny

REFERENCE_HF = Path(rtp_llm.__file__).parents[1] / "scripts" / "playground" / "reference_hf.py"


def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without one tensor, with one of another shape, and with one that the model has no place for."""
    kept = {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    return kept | {"model.norm.weight": torch.zeros(65), "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}


def test_what_transformers_makes_up_is_no_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_dir = make_tiny("MistralForCausalLM", tmp_path)
    TransformersModel(model_dir, device="cpu")
    rewrite_tensors(model_dir, changed)
    with pytest.raises(HalfLoadedError, match="initialised them at random") as caught:
        TransformersModel(model_dir, device="cpu")
    for name in ("layers.1.mlp.up_proj.weight", "model.norm.weight", "layers.0.self_attn.q_proj.bias"):
        assert name in str(caught.value)
    reference_hf: dict[str, Any] = runpy.run_path(str(REFERENCE_HF))
    assert reference_hf["main"](["--model-path", model_dir, "--device", "cpu"]) == 2
    assert "is no reference for" in capsys.readouterr().err


def test_images_are_not_left_out_where_there_is_no_processor(tmp_path: Path) -> None:
    """transformers gives the tokenizer instead, which takes images and does nothing with them."""
    model_dir = make_tiny("MistralForCausalLM", tmp_path)
    model = TransformersModel(model_dir, device="cpu")
    with pytest.raises(NoProcessorError, match="no processor of transformers for images, only a tokenizer"):
        model.encode_with_images("What is it?", [drawn_image()])
    note = pixels_note(model_dir, False, model.model, "What is it?", [drawn_image()], Prompt("", [1]))
    assert "There are no others to compare them with" in note


def test_near_ties_are_told_in_16_bits() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1)
    logits[torch.arange(4), best] += 5.0
    logits[2, 0] = logits[2].max() - 0.01
    assert near_ties(logits, torch.float32) == [] and [row for row, _ in near_ties(logits, torch.bfloat16)] == [2]
    text = ties_text([[], near_ties(logits, torch.bfloat16)], torch.bfloat16)
    assert "prompt 1, token 2 (two tokens 0.01 apart)" in text and "--dtype float32" in text
    assert ties_text([[], []], torch.bfloat16) == ""


def test_where_texts_part() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.5, 0.75], [2.0, 2.00001]])
    assert parting([0, 1, 0], logits) is None  # the last is a tie
    found = parting([0, 0, 0], logits)
    assert found is not None and (found.index, found.token_id, found.gap) == (1, 1, 0.25)
