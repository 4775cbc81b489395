"""Encoders that have no model file, run by transformers' own code: its outputs, or a refusal with the reason."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_fallback import AGREE, REFUSED
from pooled import TOLERANCE, numbers, open_pooled, prompts_for, reference_model, reference_outputs

from rtp_llm.srt.layers.fallback.encoders import EMBED, encoder_kind, max_positions
from rtp_llm.srt.managers.pooled import PoolingPrompt
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.registry import UnknownArchitectureError
from rtp_llm.tools.tiny_checkpoint import make_tiny_checkpoint

QUICK = ("DebertaV2ForSequenceClassification", "MPNetModel")
REFUSED_QUICK = ("XLNetModel",)


def make(architecture: str, directory: Path) -> str:
    kind = encoder_kind([architecture])
    assert kind is not None
    return make_tiny_checkpoint(architecture, directory, overrides={} if kind[1] == EMBED else {"num_labels": 3})


def params(names: Any, quick: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


def expected(architecture: str, model_dir: str, ids: list[int], **inputs: Any) -> torch.Tensor:
    """The first output of transformers' class: of a bare model hidden states, else logits."""
    if encoder_kind([architecture]) == (architecture, EMBED):
        with torch.no_grad():
            return reference_model(model_dir, architecture).base_model(torch.tensor([ids]), **inputs)[0][0]
    return reference_outputs(model_dir, architecture, ids, **inputs).logits[0]


@pytest.mark.parametrize("architecture", params(AGREE, QUICK))
def test_agrees_with_transformers(architecture: str, tmp_path: Path) -> None:
    model_dir = make(architecture, tmp_path)
    prompts = prompts_for(model_dir, (19, 5, 40, 19, 7))
    with open_pooled(model_dir, model_impl="transformers") as engine:
        task = "token_embed" if "token_embed" in engine.tasks else engine.tasks[0]
        together = engine.encode(input_ids=prompts, task=task, normalize=False)
        alone = [engine.encode(input_ids=prompt, task=task, normalize=False) for prompt in prompts]
    for prompt, first, second in zip(prompts, together, alone, strict=True):
        wanted = expected(architecture, model_dir, prompt)
        for result in (first, second):
            torch.testing.assert_close(numbers(result), wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("architecture", params(REFUSED, REFUSED_QUICK))
def test_is_refused_with_the_reason(architecture: str, tmp_path: Path) -> None:
    model_dir = make(architecture, tmp_path)
    with pytest.raises(ModelBuildError, match=re.escape(REFUSED[architecture])):
        open_pooled(model_dir, model_impl="transformers")


def test_types_of_pairs_and_limits_of_positions(tmp_path: Path) -> None:
    architecture = "ElectraForSequenceClassification"
    model_dir = make_tiny_checkpoint(architecture, tmp_path, overrides={"num_labels": 1, "max_position_embeddings": 64})
    [prompt] = prompts_for(model_dir, (23,))
    assert max_positions(reference_model(model_dir, architecture)) == 64
    with open_pooled(model_dir) as engine:  # without a file of ours, transformers' code is taken by itself
        assert engine.tasks == ["classify", "score"]
        pair = PoolingPrompt("score", input_ids=prompt, pair_start=9, options={"normalize": False})
        [completion] = engine._run(Asked([pair]))
        with pytest.raises(ValueError, match="maximum context length is 64"):
            engine.encode(input_ids=prompt * 3, task="classify")
    types = torch.tensor([[0] * 9 + [1] * 14])
    wanted = expected(architecture, model_dir, prompt, token_type_ids=types)
    torch.testing.assert_close(torch.tensor(completion.output.numbers()), wanted, atol=TOLERANCE, rtol=TOLERANCE)


class Asked:
    """What ``Engine._run`` computes: prompts, in one round."""

    def __init__(self, prompts: list[PoolingPrompt]) -> None:
        self.prompts = prompts

    def rounds(self, completions: Any) -> list[list[PoolingPrompt]]:
        return [self.prompts]


def test_conversions_are_for_models_of_ours(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitectureError, match="--convert embed is for models with a file here"):
        open_pooled(make("DebertaV2ForSequenceClassification", tmp_path), convert="embed")
