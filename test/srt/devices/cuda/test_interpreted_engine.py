"""The whole engine on Triton's interpreter, its kernels within recorded steps: ids are transformers'."""

from math import inf
from unittest.mock import patch

import pytest
from fake_cuda import fake_cuda, registered
from fake_cuda_answers import Answers

from rtp_llm.srt.kernels import reference as kernels
from rtp_llm.srt.worker import step_graphs
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
