"""Greedy choices and draws in C++: the very tokens of the sampler's own plain torch, on every instruction set."""

import random

import pytest
import torch

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.devices.cpu import sampling
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker import philox
from rtp_llm.srt.worker.sampler import draw

FUNCTIONS = [sampling._function]
INF = torch.inf


@pytest.fixture(autouse=True)
def seed() -> None:
    value = random.randrange(1 << 31)
    print(f"seed {value}")
    torch.manual_seed(value)
    random.seed(value)


def random_params() -> SamplingParams:
    return SamplingParams(
        temperature=random.choice([0.05, 0.7, 1.0, 1.0, 1.3, 20.0]),
        top_k=random.choice([-1, -1, 0, 2, 5, 50, 700, 5000, 1 << 40]),
        top_p=random.choice([1.0, 1.0, 1e-9, 0.3, 0.9, 0.95, 0.999]),
        min_p=random.choice([0.0, 0.0, 0.0, 0.05, 0.5, 1.0]),
    )


def keys(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds and positions of any size."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (count,)), torch.randint(0, 1 << 40, (count,))


def check_draws(logits: torch.Tensor, params: list[SamplingParams]) -> None:
    seeds, positions = keys(len(params))
    found, expected = (
        sampling.draw(logits, params, seeds, positions),
        draw(logits, params, seeds, positions, provider_named("reference")),
    )
    for i in (found != expected).nonzero().flatten().tolist():
        raise AssertionError(f"row {i}: {found[i]}, not {expected[i]}; {seeds[i]}, {positions[i]}, {params[i]}")


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 64, 1000, 5003, 40001])
@pytest.mark.parametrize("spread", [0.02, 2.0, 15.0])
def test_draws_are_those_of_plain_torch(isa: str, vocab_size: int, spread: float) -> None:
    count = 24 if vocab_size < 10000 else 8
    params = [random_params() for _ in range(count)]
    check_draws(torch.randn(count, vocab_size) * spread, params)
    check_draws((torch.randn(count, vocab_size) * spread).bfloat16().float(), params)  # full of equal logits


def test_draws_from_what_a_mask_left(isa: str) -> None:
    logits = torch.randn(40, 3000)
    logits[torch.rand(40, 3000) < 0.999] = -INF
    logits[:, 17] = torch.randn(40)
    check_draws(logits, [random_params() for _ in range(40)])


def test_draws_among_equals(isa: str) -> None:
    for vocab_size in (1, 5, 100, 3000, 20000):
        for logits in (torch.zeros(16, vocab_size), torch.randint(0, 3, (16, vocab_size)).float()):
            check_draws(logits, [random_params() for _ in range(16)])
            check_draws(logits, [SamplingParams(top_p=0.5, temperature=1e300)] * 16)
            check_draws(logits + torch.rand(16, vocab_size), [SamplingParams(top_k=3, temperature=1e300)] * 16)
            check_draws(logits + torch.rand(16, vocab_size), [SamplingParams(top_p=0.4, temperature=1e300)] * 16)


def test_draws_from_ascending_and_descending_logits(isa: str) -> None:
    logits = torch.linspace(-30, 30, 30011).repeat(12, 1)
    logits[6:] = logits[6:].flip(1)
    for params in (
        {"top_k": 50},
        {"top_k": 20000},
        {"top_p": 0.9},
        {"top_p": 0.9, "temperature": 30.0},
        {"min_p": 0.3},
    ):
        check_draws(logits, [SamplingParams(**params)] * 12)


def test_weights_that_are_next_to_nothing(isa: str) -> None:
    """Subnormal numbers, and what underflows."""
    x = -torch.cat([torch.linspace(700, 760, 5000), torch.tensor([0.0])])
    check_draws(x.repeat(4, 1), [SamplingParams(), SamplingParams(temperature=700.0)] * 2)
    check_draws(x.flip(0).repeat(4, 1), [SamplingParams(top_k=4000), SamplingParams(temperature=90.0)] * 2)
    check_draws(torch.full((4, 3000), -3e38).index_fill(1, torch.tensor([7]), 3e38), [SamplingParams()] * 4)


def test_lines_are_chosen(isa: str) -> None:
    logits = torch.randn(9, 501)[:, :500]  # lines with a gap between them
    lines = [8, 0, 0, 3]
    params, random_keys = [random_params() for _ in lines], keys(4)
    drawn = sampling.draw(logits, params, *random_keys, lines)
    assert torch.equal(drawn, sampling.draw(logits[lines], params, *random_keys))
    with pytest.raises(ValueError, match="4 draws with 4 seeds from lines"):
        sampling.draw(logits, params, *random_keys, [9, 0, 0, 3])
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        sampling.draw(logits.double(), params, *random_keys)
    with pytest.raises(ValueError, match=r"must be int64, not torch\.int32"):
        sampling.draw(logits, params, random_keys[0].int(), random_keys[1], lines)


def test_bad_rows_draw_token_0(isa: str) -> None:
    logits = torch.randn(8, 300)
    logits[0, 299], logits[1, 5], logits[2] = torch.nan, INF, -INF
    params = [SamplingParams(top_k=3, top_p=0.9)] * 8
    assert sampling.draw(logits, params, *keys(8))[:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("vocab_size", [1, 15, 64, 4095, 4097, 20011])
def test_argmax(isa: str, vocab_size: int) -> None:
    logits = torch.randn(33, vocab_size + 3)[:, :vocab_size]
    logits[:16] = logits[:16].mul(4).round()  # the first of many equal ones
    logits[20] = logits[20].clamp(min=-1e-30, max=0.0).sub(5)
    logits[21] = -INF
    logits[22] = -INF
    logits[22, -1] = -3e38
    logits[23, random.randrange(vocab_size)] = torch.nan
    logits[24, random.randrange(vocab_size)] = INF
    tokens, bad = sampling.argmax(logits)
    expected, expected_bad = reference.argmax(logits)
    assert torch.equal(bad, expected_bad)
    assert torch.equal(tokens[~bad], expected[~bad])
    assert ((tokens >= 0) & (tokens < vocab_size)).all()


def test_argmax_of_what_does_not_fit(isa: str) -> None:
    for logits in (torch.randn(2, 9, dtype=torch.float64), torch.randn(9, 2).T, torch.randn(0, 9)):
        for found, expected in zip(sampling.argmax(logits), reference.argmax(logits), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 1000])
def test_random_numbers_are_those_of_philox(isa: str, vocab_size: int) -> None:
    seeds, positions = keys(6)
    expected = philox.exponential(seeds, positions, vocab_size)
    for i in range(6):
        found = sampling.exponential(int(seeds[i]), int(positions[i]), vocab_size)
        torch.testing.assert_close(found, expected[i], rtol=1e-15, atol=0)
