"""Recorded decode steps on a device like a GPU: the whole engine answers as without them, and as transformers."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_cuda import Device, fake_cuda, recorded_and_launched, registered
from fake_cuda_answers import Answers
from made_requests import generate_request
from stepped_core import Core

from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.srt.devices.cuda.provider import CudaProvider
from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker import step_graphs
from tiny_models import TINY_MODELS, assert_same_ids, random_prompts, reference, tiny_model

STEPS_LOG = "rtp_llm.srt.worker"


@pytest.fixture
def device() -> Iterator[Device]:
    with registered(), fake_cuda() as device:
        yield device


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-default", {}),
        ("mistral-window16-yarn", {"page_size": 4}),
        ("qwen2-mixed-window16", {}),
        ("llama-dynamic-mlp-bias", {}),  # turned by lengths that only the host knows
        ("qwen3-longrope-bias-gelu", {}),
    ],
)
def test_ids_are_those_of_transformers(device: Device, name: str, options: dict[str, Any]) -> None:
    answers = Answers(name, **options)
    for prompt, ids in zip(answers.prompts, answers.ids, strict=True):
        assert_same_ids(ids, reference(tiny_model(name), tuple(prompt), len(ids)), name)
    assert answers.core.executor.depth == 1
    graphs = answers.worker.graphs
    assert graphs is not None and graphs.sizes == (1, 2, 4, 6) and graphs.refusal is None
    assert device.num_recorded == 5 * 4  # a step, and four kinds of what follows it
    assert device.num_launched == 15  # every step but the prompts'
    for layer_id in [layer_id for group in answers.worker.runner.layout.groups for layer_id in group.layer_ids]:
        cache = answers.worker.runner.kv_pool.layer(layer_id)
        assert not cache.keys[: cache.page_size].any(), (
            "page 0, which shorter page tables are filled with, is not written"
        )
        assert cache.keys[-cache.page_size :].any(), "dummies write to the last page"


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3, "top_p": 0.9},
    {"temperature": 0.7, "seed": 4, "top_k": 20},
    {"temperature": 1.2, "seed": 5, "min_p": 0.05},
    {"temperature": 1.0, "seed": 6, "top_k": 50, "top_p": 0.8},
]
ADJUSTED: list[dict[str, Any]] = [
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.5},
    {"temperature": 0, "logit_bias": {"5": 2.0}},
    {"temperature": 1.2, "seed": 5, "bad_words_ids": [[5], [7, 8]]},
    {"temperature": 0, "min_new_tokens": 5},
]
WORDS_THAT_DO_NOT_FIT: list[dict[str, Any]] = [{"temperature": 0, "bad_words_ids": [list(range(12))]}] * 5


@pytest.mark.parametrize(
    ("kinds", "num_launched"),
    [
        pytest.param(KINDS, 15 * 2, id="plain"),
        pytest.param(ADJUSTED, 15 * 3 + 12, id="adjusted"),  # adjusted and counted, and drawn while some row draws
        pytest.param(WORDS_THAT_DO_NOT_FIT, 15, id="by the host's lists"),
    ],
)
def test_draws_are_those_of_steps_that_are_not_recorded(
    device: Device, kinds: list[dict[str, Any]], num_launched: int
) -> None:
    recorded = Answers("llama-default", kinds)
    assert device.num_launched == num_launched
    assert recorded.ids == Answers("llama-default", kinds, disable_cuda_graph=True).ids


def test_without_graphs(device: Device) -> None:
    assert Answers("llama-default", disable_cuda_graph=True).worker.graphs is None
    assert device.num_recorded == 0


def test_the_sizes_that_are_asked_for(device: Device) -> None:
    graphs = Answers("llama-default", cuda_graph_bs=[3, 5, 64]).worker.graphs
    assert graphs is not None and graphs.sizes == (3, 5, 6)
    graphs = Answers("llama-default", cuda_graph_max_bs=2).worker.graphs
    assert graphs is not None and graphs.sizes == (1, 2)
    assert device.num_launched == 15 + 6  # batches of more than two rows are launched layer by layer


def test_what_takes_too_long_is_not_recorded(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_graphs, "RECORDING_TIME_S", 0.0)
    plain = Answers("llama-default", disable_cuda_graph=True)
    with caplog.at_level(logging.INFO, STEPS_LOG):
        answers = Answers("llama-default")
    assert answers.worker.graphs is not None and answers.worker.graphs.sizes == (6,)
    assert "batches of 1, 2, 4 rows are filled up to the next recorded size" in caplog.text
    assert device.num_recorded == 5 and answers.ids == plain.ids


def change_logits(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    forward = LlamaForCausalLM.forward

    def changed(model: Any, ids: Any, positions: Any, batch: ForwardBatch) -> LogitsProcessorOutput:
        output = forward(model, ids, positions, batch)
        output.next_token_logits = output.next_token_logits * change(batch)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)


READERS = {
    "item reads a tensor": lambda batch: 1.0 if batch.positions.max().item() < 12 else 0.5,
    "a host list, seq_lens_cpu, is read": lambda batch: 1.0 if batch.seq_lens_cpu[0] < 12 else 0.5,
    "a shape depends on numbers": lambda batch: 1.0 if len(batch.positions[batch.positions < 12]) else 0.5,
    "places are counted": lambda batch: torch.ones(len(batch.sample_rows), 1).index_put_(
        (batch.positions[batch.sample_rows] > 12,), torch.tensor(0.5)
    ),
}


@pytest.mark.parametrize("reason", READERS)
def test_a_model_that_reads_numbers_is_not_recorded(
    device: Device, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change_logits(monkeypatch, READERS[reason])
    with caplog.at_level(logging.INFO, STEPS_LOG):
        answers = Answers("llama-default")
    assert answers.worker.graphs is not None and answers.worker.graphs.sizes == ()
    assert reason in str(answers.worker.graphs.refusal)
    assert f"decode steps are not recorded: {answers.worker.graphs.refusal}" in caplog.text
    assert device.num_recorded == 0
    assert answers.ids == Answers("llama-default", disable_cuda_graph=True).ids


def test_what_the_device_refuses_is_logged_with_its_trace(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def waits(batch: ForwardBatch) -> float:
        torch.cuda.synchronize()
        return 1.0

    change_logits(monkeypatch, waits)
    with caplog.at_level(logging.INFO, STEPS_LOG):
        answers = Answers("llama-default")
    assert "operation not permitted when stream is capturing" in str(answers.worker.graphs.refusal)  # type: ignore[union-attr]
    assert "recording one failed" in caplog.text and "in waits" in caplog.text
    monkeypatch.undo()
    assert answers.ids == Answers("llama-default", disable_cuda_graph=True).ids


def test_a_model_or_a_back_end_may_refuse(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, STEPS_LOG):
        assert Answers("llama-default", attention_backend="torch_native").worker.graphs is None
        assert "decode steps are not recorded: the attention back end TorchAttention" in caplog.text
        monkeypatch.setattr(LlamaForCausalLM, "replays_steps", False, raising=False)
        assert Answers("llama-default").worker.graphs is None
    assert "decode steps are not recorded: LlamaForCausalLM says" in caplog.text


@pytest.mark.slow
def test_ranks_record_steps_with_their_exchanges(device: Device) -> None:
    name = "llama-tp"
    prompts = random_prompts(TINY_MODELS[name].vocab_size, (3, 20))
    core = Core(name, depth=1, processes=True, device="fake_cuda", tp_size=2, max_running_requests=6)
    try:
        ids = core.run(
            [
                generate_request(f"r{i}", prompt, SamplingParams(temperature=0, max_new_tokens=9, ignore_eos=True), i)
                for i, prompt in enumerate(prompts)
            ]
        )
        counts = core.executor.rpc("apply", recorded_and_launched)
    finally:
        core.close()
    for i, prompt in enumerate(prompts):
        assert_same_ids(ids[f"r{i}"], reference(tiny_model(name), tuple(prompt), 9), name)
    assert len(counts) == 2 and counts[0] == counts[1]
    assert counts[0][0] == 5 * 4 and counts[0][1] >= 8  # sizes and steps


def test_rows_that_go_on_need_nothing_from_the_host(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tokens and positions are on the device: rows are told when one leaves, and at the beginning."""
    copied: list[int] = []
    copy = CudaProvider.copy_to_device

    def counted(self: CudaProvider, target: torch.Tensor, values: Any) -> None:
        copied.append(target.numel())
        copy(self, target, values)

    monkeypatch.setattr(CudaProvider, "copy_to_device", counted)
    Answers("llama-default")
    assert device.num_launched == 15 and len(copied) == 5
