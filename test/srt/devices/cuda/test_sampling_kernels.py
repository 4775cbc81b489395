"""Greedy choices, masks and draws in Triton's interpreter against plain torch, and compiled."""

from importlib import import_module
from typing import Any

import pytest
import torch

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker import adjust_table, philox, sampler
from rtp_llm.srt.worker.adjust_table import Adjustment, AdjustTable
from triton_compile import check_compiled, launches_of
from triton_process import compiled, interpreted


def kernels() -> Any:
    return import_module("rtp_llm.srt.devices.cuda.kernels.sampling")


@interpreted
def test_the_first_largest_logit_and_bad_rows() -> None:
    for vocab_size in (1, 100, 4097):
        logits = torch.randn(6, vocab_size + 3)[:, :vocab_size]
        logits[1, 0], logits[2, -1], logits[3] = torch.nan, torch.inf, -torch.inf
        logits[4] = logits[4].round()  # several equal ones
        tokens, bad = kernels().argmax(logits)
        expected, expected_bad = reference.argmax(logits)
        assert torch.equal(bad, expected_bad)
        assert torch.equal(tokens[~bad], expected[~bad])
        assert ((tokens >= 0) & (tokens < vocab_size)).all()


@interpreted
def test_masks() -> None:
    for vocab_size in (5, 100, 4200):
        logits = torch.randn(4, vocab_size)
        words = torch.randint(-(1 << 31), 1 << 31, (2, (vocab_size + 31) // 32)).int()
        ours, expected = logits.clone(), logits.clone()
        kernels().mask_tokens(ours, torch.tensor([3, 1]), words)
        reference.mask_tokens(expected, torch.tensor([3, 1]), words)
        assert torch.equal(ours, expected)


PARAMS = [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3, top_p=0.5),
    SamplingParams(temperature=1.0, top_k=3),
    SamplingParams(temperature=2.0, top_k=40, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=1.5, top_k=7, top_p=0.3, min_p=0.05),
    SamplingParams(temperature=1.0, top_p=0.01),
]


@interpreted
@pytest.mark.parametrize("vocab_size", [3, 130, pytest.param(4100, marks=pytest.mark.slow)])
def test_draws_are_those_of_the_host(vocab_size: int) -> None:
    """Also of rows with equal logits, of which top_p keeps the first few."""
    cpu, times = provider_named("reference"), 2 if vocab_size < 4000 else 1
    for step in range(times):
        logits = torch.randn(len(PARAMS), vocab_size) * 2
        if step % 2:
            logits = logits.round()
        seeds = torch.randint(-(1 << 62), 1 << 62, (len(PARAMS),))
        positions = torch.randint(0, 1 << 40, (len(PARAMS),))
        order = torch.randperm(len(PARAMS))
        ours = kernels().draw(logits[order], PARAMS, seeds, positions, order.argsort().tolist())
        assert torch.equal(ours, sampler.draw(logits, PARAMS, seeds, positions, cpu))


@interpreted
def test_exponential_numbers_of_the_host_decide() -> None:
    """Equal logits: the smallest number wins, whichever of the four words it is."""
    seeds, positions = torch.arange(20) * 12345678901, torch.arange(20) << 31
    ours = kernels().draw(torch.zeros(20, 200), [SamplingParams(temperature=1.0)] * 20, seeds, positions)
    assert torch.equal(ours, philox.exponential(seeds, positions, 200).argmin(-1))


@interpreted
def test_bad_rows_end_too() -> None:
    logits = torch.stack([torch.full((50,), torch.nan), torch.full((50,), -torch.inf), torch.full((50,), torch.inf)])
    params, seeds = [SamplingParams(temperature=1.0, top_p=0.5, top_k=5)] * 3, torch.arange(3)
    tokens = kernels().draw(logits, params, seeds, seeds)
    assert ((tokens >= 0) & (tokens < 50)).all()


def adjusted_table(vocab_size: int, num_rows: int) -> AdjustTable:
    """Rows with everything, with what leaves no token, and with nothing; the last one is of dummies."""
    few = min(12, vocab_size)
    bias = {str(i): i - 3.0 for i in range(0, few, 2)}
    everything = SamplingParams(
        frequency_penalty=0.3, presence_penalty=-0.2, repetition_penalty=1.3, logit_bias=bias, min_new_tokens=9,
        bad_words_ids=[[1], [1, 2], [2, few - 1], [0, 1, 2, few - 1], [9, 1]],
    )  # fmt: skip
    only = SamplingParams(allowed_token_ids=[0, 2], bad_words_ids=[[1, 0], [1, 2]], min_new_tokens=9)
    large = SamplingParams(repetition_penalty=1e-45, logit_bias={"0": 1e300, "1": -1e300})
    rows = {
        0: Adjustment(everything, [0, few - 1, 1 << 40], [0, 1, 2], range(few // 2), 8),
        1: Adjustment(only, [0], [1], [0, 2], 8),
        2: Adjustment(large, [0, 1], [2], [], 0),
        3: Adjustment(SamplingParams(presence_penalty=1.0, min_new_tokens=2), [0], [2, 2], [2], 3),
    }
    table = AdjustTable(num_rows, vocab_size, provider_named("reference"))
    table.write(rows)
    return table


@interpreted
@pytest.mark.parametrize("vocab_size", [3, 100, 4200])
def test_adjusted_logits_are_those_of_plain_torch(vocab_size: int) -> None:
    """To the last bit; and so after what is drawn then is counted."""
    ours, plain = (adjusted_table(vocab_size, 6) for _ in range(2))
    rows, kernel = torch.tensor([3, 0, 1, 2, 4, 5, 5]), import_module("rtp_llm.srt.devices.cuda.kernels.adjust")
    words = torch.randint(-(1 << 31), 1 << 31, (2, (vocab_size + 31) // 32)).int() | 7
    lines = torch.tensor([-1, 1, -1, -1, 0, -1, -1])
    for position in (1, 7, 8):
        logits, at = torch.randn(7, vocab_size + 5)[:, :vocab_size] * 3, torch.full((7,), position)
        logits[1], logits[1, 1:2] = -torch.inf, 1.0
        for masks in ((None, None), (lines, words)):
            found = kernel.adjust_rows(logits, rows, at, ours, *masks)
            assert torch.equal(found, adjust_table.adjust_rows(logits, rows, at, plain, *masks))
        tokens = torch.randint(0, vocab_size, (7,))
        tokens[6] = tokens[5]
        kernel.count_rows(rows, tokens, ours)
        adjust_table.count_rows(rows, tokens, plain)
        assert torch.equal(ours.counts, plain.counts)
        assert torch.equal(ours.last_tokens[:5], plain.last_tokens[:5])  # dummies may be there several times


def launch_all() -> None:
    adjust, table = import_module("rtp_llm.srt.devices.cuda.kernels.adjust"), adjusted_table(151936, 9)
    for masks in ((None, None), (torch.zeros(8, dtype=torch.int64), torch.zeros(8, 4748, dtype=torch.int32))):
        rows = torch.zeros(8, dtype=torch.int64)
        adjust.adjust_rows(torch.zeros(8, 151936), rows, rows, table, *masks)
    adjust.count_rows(rows, rows, table)
    logits, column = torch.zeros(8, 151936), torch.zeros(8, dtype=torch.int64)
    kernels().argmax(logits)
    kernels().mask_tokens(logits, column, torch.zeros(8, 4748, dtype=torch.int32))
    kernels().draw(logits, [SamplingParams(temperature=1.0)] * 8, column, column)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_sampling_compiles(capability: int) -> None:
    launches = launches_of(launch_all)
    assert len(launches) == 7
    for launch in launches:
        check_compiled(launch, capability)
