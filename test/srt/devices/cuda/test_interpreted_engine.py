"""The whole engine on Triton's interpreter, its kernels within recorded steps: ids are transformers'."""

from math import inf
from typing import Any
from unittest.mock import patch

import pytest
from fake_cuda import fake_cuda, registered
from fake_cuda_answers import Answers

from rtp_llm.srt.kernels import reference as kernels
from rtp_llm.srt.worker import adjust_table, step_graphs
from tiny_models import assert_same_ids, reference, tiny_model
from triton_process import interpreted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-default", "mistral-window7", "qwen3-mixed-window7-tied"])
@interpreted
def test_ids_are_those_of_transformers(name: str) -> None:
    slowly = patch.object(step_graphs, "RECORDING_TIME_S", inf)  # the interpreter takes its time for each size
    with registered(), fake_cuda() as device, slowly:
        answers = Answers(name)
        assert answers.worker.runner.model.model.norm._norm is not kernels.rms_norm, "the device has its own"
        for prompt, ids in zip(answers.prompts, answers.ids, strict=True):
            assert_same_ids(ids, reference(tiny_model(name), tuple(prompt), len(ids)), name)
        graphs = answers.worker.graphs
        assert graphs is not None and graphs.refusal is None and graphs.sizes == (1, 2, 4, 6)
        assert device.num_launched == 15


@pytest.mark.slow
@interpreted
def test_adjusted_rows_and_draws_are_those_of_steps_that_are_not_recorded() -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "repetition_penalty": 1.5, "min_new_tokens": 3},
        {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.5, "top_p": 0.9},
        {"temperature": 0.8, "seed": 4, "logit_bias": {"5": 2.0}, "top_k": 20},
        {"temperature": 0, "bad_words_ids": [[5], [7, 8]], "presence_penalty": 0.4},
        {"temperature": 1.2, "seed": 5, "min_p": 0.05},
    ]
    slowly = patch.object(step_graphs, "RECORDING_TIME_S", inf)
    with registered(), fake_cuda() as device, slowly:
        recorded = Answers("llama-default", kinds)
        assert recorded.worker.sampler.tables.adjustments._adjust is not adjust_table.adjust_rows
        assert device.num_launched > 30, "steps, and what follows them"
        assert recorded.ids == Answers("llama-default", kinds, disable_cuda_graph=True).ids
