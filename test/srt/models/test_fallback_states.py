"""Models of transformers that keep a state, run by its own code: the same answers in every schedule, or a refusal."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recurrent_fallback import AGREE, NOTES, OVERRIDES, REFUSED, UNBOUNDED
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rtp_llm import Engine
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.tools.schedules import Question, Teacher, random_questions, run_schedules
from rtp_llm.tools.tiny_check import LENGTHS, load_reference, tiny_server_args
from rtp_llm.tools.tiny_checkpoint import make_tiny_checkpoint
from rtp_llm.tools.tiny_config import VOCAB_SIZE

STATEFUL = re.compile(r"_conv_state\(|_recurrent_state\(|linear_cache\(|_is_stateful = True")
QUICK = ("Lfm2ForCausalLM",)


class PlainTeacher(Teacher):
    """Transformers' model without a cache: some keep their states where a Teacher does not look for them."""

    @torch.inference_mode()
    def log_probs(self, question: Question, output_ids: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([[*question.ids, *output_ids]])
        return self.model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in AGREE]
)
def test_agrees_under_every_schedule(architecture: str, tmp_path: Path) -> None:
    make_tiny_checkpoint(architecture, tmp_path, overrides=OVERRIDES.get(architecture))
    results = run_schedules(
        tiny_server_args(tmp_path, model_impl="transformers"),
        PlainTeacher(load_reference(tmp_path, architecture)),
        random_questions(VOCAB_SIZE, LENGTHS),
    )
    assert not [result for result in results if not result.agrees]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", REFUSED)
def test_is_refused_with_the_reason(architecture: str, tmp_path: Path) -> None:
    make_tiny_checkpoint(architecture, tmp_path, overrides=OVERRIDES.get(architecture))
    args: dict[str, Any] = vars(tiny_server_args(tmp_path, model_impl="transformers"))
    with pytest.raises(ModelBuildError, match=re.escape(REFUSED[architecture])), Engine(**args, inline=True):
        pass


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[] if "Nemotron" in name else [pytest.mark.slow]) for name in NOTES]
)
def test_bounds_that_only_whole_prompts_have_are_refused(architecture: str, dtype: str, tmp_path: Path) -> None:
    overrides = {name: value for name, value in OVERRIDES[architecture].items() if name not in UNBOUNDED}
    make_tiny_checkpoint(architecture, tmp_path, overrides=overrides)
    args: dict[str, Any] = vars(tiny_server_args(tmp_path, model_impl="transformers")) | {"dtype": dtype}
    message = "computes a token that follows others differently when it is given alone"
    with pytest.raises(ModelBuildError, match=message), Engine(**args, inline=True):
        pass


def test_every_model_that_keeps_a_state_is_listed() -> None:
    root = Path(transformers.__file__).parent
    modules: Any = transformers._class_to_module  # type: ignore[attr-defined]
    found = {
        name
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        if STATEFUL.search(root.joinpath(*modules[name].split(".")).with_suffix(".py").read_text())
    }
    assert found == {*AGREE, *REFUSED}
