"""Whether the engine's pooled outputs are transformers' own, in float32: what tests of such models share."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rtp_llm import Engine
from tiny_models import make_tiny, random_prompts

LENGTHS = (1, 19, 5, 40, 19)
TOLERANCE = 1e-5
Expect = Callable[[Any, Any], torch.Tensor]  # (transformers' model, its outputs for one input) -> the raw output


def hidden(model: Any, outputs: Any) -> torch.Tensor:
    """[tokens, hidden_size], after the last norm."""
    return outputs.last_hidden_state[0] if hasattr(outputs, "last_hidden_state") else outputs.hidden_states[-1][0]


@dataclass(frozen=True)
class PooledCase:
    """A tiny checkpoint, and its outputs.

    ``expected``: task -> how its raw numbers (``normalize=False``) follow from transformers' outputs. ``edit`` may
    change the checkpoint's directory. ``reference``: the architecture that transformers builds, if it is another.
    """

    name: str
    architecture: str
    expected: dict[str, Expect]
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # of the engine
    edit: Callable[[Path], None] | None = None
    slow: bool = False
    reference: str | None = None

    @property
    def of_transformers(self) -> str:
        return self.reference or self.architecture

    def make(self, directory: Path) -> str:
        model_dir = make_tiny(self.of_transformers, directory, **self.config)
        if self.edit is not None:
            self.edit(directory)
        return model_dir


def params_of(cases: Sequence[PooledCase]) -> list[Any]:
    return [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in cases]


@lru_cache(maxsize=1)
def reference_model(model_dir: str, architecture: str) -> Any:
    return getattr(transformers, architecture).from_pretrained(model_dir, dtype=torch.float32).eval()


def reference_outputs(model_dir: str, architecture: str, ids: Sequence[int], **inputs: Any) -> Any:
    model = reference_model(model_dir, architecture)
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True, **inputs)


def prompts_for(model_dir: str, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Random inputs without the smallest ids, among which a model's padding is."""
    vocab_size = json.loads(Path(model_dir, "config.json").read_text())["vocab_size"]
    return [[3 + token % (vocab_size - 4) for token in prompt] for prompt in random_prompts(vocab_size, lengths)]


def open_pooled(model_dir: str, **options: Any) -> Engine:
    return Engine(
        model_path=model_dir,
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        **{"max_total_tokens": 2048} | options,
    )


def numbers(result: dict[str, Any]) -> torch.Tensor:
    """The output of one input; an error of its request fails the test."""
    assert result["embedding"] is not None, result["meta_info"]["finish_reason"]
    value = result["embedding"]
    if isinstance(value, list):
        return torch.stack([torch.tensor(line) for line in value]) if value else torch.zeros(0)
    return torch.tensor(value)


def check_parity(case: PooledCase, directory: Path) -> None:
    """Batched with unequal lengths, and each input alone: all of the case's outputs are transformers'."""
    model_dir = case.make(directory)
    prompts = prompts_for(model_dir)
    with open_pooled(model_dir, **case.options) as engine:
        for task, expect in case.expected.items():
            assert task in engine.tasks
            together = engine.encode(input_ids=prompts, task=task, normalize=False)
            for prompt, result in zip(prompts, together, strict=True):
                alone = engine.encode(input_ids=prompt, task=task, normalize=False)
                outputs = reference_outputs(model_dir, case.of_transformers, prompt)
                wanted = expect(reference_model(model_dir, case.of_transformers), outputs).detach()
                for ours in (numbers(result), numbers(alone)):
                    ours = ours.reshape(wanted.shape)
                    torch.testing.assert_close(ours, wanted, atol=TOLERANCE, rtol=TOLERANCE)
