"""Steps of decodes on a device like a GPU: the host waits for the tokens of the step before, and for nothing else."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeEvent, fake_cuda, registered
from made_requests import generate_request, request_spec
from stepped_core import Core
from waits import Waits

from rtp_llm.srt.plan import Admission, TokenMasks
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker.sampler import Sampler
from tiny_models import TINY_MODELS, random_prompts

NUM_STEPS = 4


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with registered(), fake_cuda():
        yield


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 1.0, "top_p": 0.9, "top_k": 20},
    "penalised": {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    "biased": {"temperature": 1.0, "logit_bias": {"5": 2.0}, "min_new_tokens": 30, "bad_words_ids": [[5], [7, 8]]},
}


@pytest.mark.parametrize(
    ("kind", "records"),
    [
        *((kind, False) for kind in KINDS),
        ("drawn", True),
        *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in KINDS if kind != "drawn"),
    ],
)
def test_a_steady_decode_waits_for_nothing_but_tokens(
    kind: str, records: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = Core(
        "llama-default", depth=1, device="fake_cuda", max_running_requests=3, disable_cuda_graph=not records,
        context_length=96, max_total_tokens=600, cuda_graph_bs=[2],
    )  # fmt: skip
    waits, waited = Waits(), counted_waits(monkeypatch)
    try:
        for i, prompt in enumerate(random_prompts(TINY_MODELS["llama-default"].vocab_size, (3, 9))):
            params = SamplingParams(max_new_tokens=40, ignore_eos=True, **KINDS[kind])
            core.link.client.send(generate_request(f"r{i}", prompt, params, i))
        with waits.watched():
            for _ in range(6):
                core.core.step(block=False)
            told = num_tokens(core)
            waits.found.clear()
            waited.clear()
            for _ in range(NUM_STEPS):
                core.core.step(block=False)
        assert waits.found == []
        assert len(waited) == NUM_STEPS and num_tokens(core) - told == 2 * NUM_STEPS
    finally:
        core.close()


def counted_waits(monkeypatch: pytest.MonkeyPatch) -> list[FakeEvent]:
    """Events that the host has waited for, from now on."""
    waited: list[FakeEvent] = []
    synchronize = FakeEvent.synchronize

    def counted(event: FakeEvent) -> None:
        waited.append(event)
        with torch._C.DisableTorchFunction():
            synchronize(event)

    monkeypatch.setattr(FakeEvent, "synchronize", counted)
    return waited


def num_tokens(core: Core) -> int:
    return sum(len(output.token_ids) for outputs in core.outputs.values() for output in outputs)


def test_masks_are_applied_without_waiting() -> None:
    sampler = Sampler(2, 70, "fake_cuda")
    for row in range(2):
        sampler.admit(Admission(row, f"r{row}", [1, 2], [], request_spec(SamplingParams(temperature=0))))
    words = np.zeros((1, 3), dtype=np.int32)
    words[0, 2] = 1 << 5
    logits, waits = torch.randn(2, 70), Waits()
    with waits.watched():
        tokens = sampler.sample(logits, [0, 1], [2, 2], TokenMasks([1], words))
    assert waits.found == [] and tokens[1] == 69


def test_what_waits_is_found() -> None:
    x, waits = torch.ones(3), Waits()
    with waits.watched():
        x.tolist(), x.cpu(), x.to("cpu"), x.sum().item(), x.nonzero(), x[x > 0], torch.tensor([1], device="cpu")
    assert [what.split(" (")[0] for what in waits.found] == [
        "tolist reads a tensor",
        "cpu copies a tensor",
        "to copies a tensor",
        "item reads a tensor",
        "a number is read, by aten._local_scalar_dense.default",
        "a shape depends on numbers, in aten.nonzero.default",
        "a shape depends on numbers, in aten.index.Tensor",
        "tensor copies numbers to the device",
    ]
