"""The sampler: random numbers against known answers, filters against transformers, draws against statistics."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
from made_requests import request_spec
from token_masks import masks_of
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.plan import Admission, TokenMasks
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker.philox import as_int64, exponential, philox4x32
from rtp_llm.srt.worker.sampler import Sampler, draw, kept_weights

CPU = provider_named("cpu")
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
INF = math.inf


def admit(sampler: Sampler, row: int, prompt_ids=(0,), output_ids=(), stop_ids=(), seed=0, **kwargs) -> None:
    logprob = {key: kwargs.pop(key) for key in list(kwargs) if key.endswith(("logprob", "logprobs_num"))}
    spec = request_spec(SamplingParams(**kwargs), seed, eos_token_ids=tuple(stop_ids), **logprob)
    sampler.admit(Admission(row, f"r{row}", list(prompt_ids), list(output_ids), spec))


def one_row_sampler(vocab_size: int, device: str = "cpu", **kwargs) -> Sampler:
    sampler = Sampler(1, vocab_size, device)
    admit(sampler, 0, **kwargs)
    return sampler


# Random numbers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that the Random123 library ships for philox4x32-10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(device, counter, key, expected):
    words = philox4x32(torch.tensor(counter, device=device), torch.tensor(key, device=device))
    assert [int(word) for word in words] == expected


def test_a_tokens_number_is_a_function_of_seed_position_and_token():
    seeds = [0, 1, -1, 2**63, 2**64 - 2, -(2**63) + 1]
    tensor = torch.tensor([as_int64(seed) for seed in seeds])
    many = exponential(tensor, torch.arange(len(seeds)), 200)
    for i, seed in enumerate(seeds):
        alone = exponential(torch.tensor([as_int64(seed)]), torch.tensor([i]), 130)[0]
        assert torch.equal(alone, many[i, :130])
    assert len(set(exponential(tensor, torch.zeros(6, dtype=torch.int64), 100).flatten().tolist())) == 600


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be in"):
        as_int64(seed)


def test_numbers_are_exponential_over_positions_seeds_and_tokens():
    n = 20000
    for numbers in (
        exponential(torch.full((n,), 7), torch.arange(n), 65)[:, 64],
        exponential(torch.arange(n), torch.full((n,), 7), 18)[:, 17],
        exponential(torch.tensor([7]), torch.tensor([7]), n)[0],
    ):
        u = -torch.expm1(-numbers)
        assert numbers.min() > 0 and u.max() < 1
        assert chi_square(torch.bincount((u * 50).long(), minlength=50), torch.full((50,), 1 / 50)) < 95  # p ~ 1e-4
        for lag in (1, 16, 64):
            assert abs(torch.corrcoef(torch.stack([u[lag:], u[:-lag]]))[0, 1]) < 0.03


# Filters


def transformers_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits).softmax(dim=-1)


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 7},
    {"top_k": 500},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 3, "top_p": 0.999},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("device", DEVICES)
def test_filters_keep_what_transformers_keeps(device):
    torch.manual_seed(0)
    params = [SamplingParams(**setting) for setting in SETTINGS]
    logits = torch.randn(len(params), 300) * 3
    weights = kept_weights(logits.to(device), params, provider_named(device)).cpu()
    probs = weights / weights.sum(dim=-1, keepdim=True)
    for i, setting in enumerate(SETTINGS):
        expected = transformers_probs(logits[i : i + 1].double(), params[i])[0]
        assert torch.equal(probs[i] > 0, expected > 0), setting
        assert torch.allclose(probs[i], expected, atol=1e-9), setting


def test_a_row_is_filtered_as_if_it_were_alone():
    torch.manual_seed(1)
    params = [SamplingParams(**setting) for setting in SETTINGS]
    logits = torch.randn(len(params), 1000).bfloat16().float() * 2
    together = kept_weights(logits, params, CPU)
    for i in range(len(params)):
        assert torch.equal(together[i], kept_weights(logits[i : i + 1], params[i : i + 1], CPU)[0])


def test_large_vocabularies_flat_and_peaked():
    """Where the most probable thousand tokens are enough for top_p, and where they are not."""
    torch.manual_seed(8)
    logits = torch.randn(4, 5000) * torch.tensor([[0.1], [1.0], [4.0], [9.0]])
    params = [SamplingParams(top_p=0.9)] * 4
    weights = kept_weights(logits, params, CPU)
    expected = transformers_probs(logits.double(), params[0])
    assert torch.equal(weights > 0, expected > 0)
    assert (weights > 0).sum(dim=-1)[0] > 1024 > (weights > 0).sum(dim=-1)[3]
    for i in range(4):
        assert torch.equal(kept_weights(logits[[i]], params[:1], CPU)[0], weights[i])


def kept_ids(values: list[float], **kwargs) -> list[int]:
    weights = kept_weights(torch.tensor([values]), [SamplingParams(**kwargs)], CPU)[0]
    return weights.nonzero()[:, 0].tolist()


def test_equal_logits_at_the_border():
    half = [0.0, 0.0, 0.0, 0.0, -INF]
    assert kept_ids([1.0, 0.0, 1.0, 1.0, 0.5], top_k=2) == [0, 2, 3]  # all that equal the second
    assert kept_ids(half, top_p=0.5) == [0, 1]  # as many equal ones as reach p
    assert kept_ids(half, top_p=0.51) == [0, 1, 2]
    assert kept_ids(half, top_k=2, top_p=0.7) == [0, 1, 2]  # top_k leaves four of a quarter each
    assert kept_ids([2.0, *half], top_k=2, top_p=0.999) == [0, 1, 2, 3, 4]
    assert kept_ids([5.0, 4.0, -INF, -INF], top_k=3) == [0, 1]
    assert kept_ids([5.0, 4.0, 3.0], top_k=3, top_p=1.0) == [0, 1, 2]


# Draws


def chi_square(observed: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs.double() * observed.sum()
    possible = expected > 0
    assert observed[~possible].sum() == 0
    return float(((observed - expected)[possible] ** 2 / expected[possible]).sum())


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_distribution(setting):
    """Chi-square with the quantile of p = 1e-4 (Wilson and Hilferty 1931), at a fixed seed."""
    torch.manual_seed(2)
    logits = torch.randn(1, 12) * 1.5
    params = SamplingParams(**setting)
    n = 4000
    sampler = one_row_sampler(12, seed=123, **setting)
    tokens = torch.cat([sampler.sample(logits.expand(100, 12), [0] * 100, range(p, p + 100)) for p in range(0, n, 100)])
    probs = transformers_probs(logits.double(), params)[0]
    degrees = max(int((probs > 0).sum()) - 1, 1)
    quantile = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi_square(torch.bincount(tokens, minlength=12), probs) < quantile


@pytest.mark.parametrize("device", DEVICES)
def test_the_token_with_the_smallest_number_by_weight_is_drawn(device):
    torch.manual_seed(8)
    logits, seeds, positions = torch.randn(32, 70), torch.arange(32), torch.arange(32) * 1000
    tokens = draw(
        logits.to(device), [SamplingParams()] * 32, seeds.to(device), positions.to(device), provider_named(device)
    ).cpu()
    assert torch.equal(tokens, (exponential(seeds, positions, 70) / logits.double().exp()).argmin(dim=-1))


@pytest.mark.parametrize("device", DEVICES)
def test_an_impossible_token_is_never_drawn(device):
    torch.manual_seed(3)
    logits = torch.full((64, 5000), -INF)
    possible = torch.randint(0, 5000, (64, 3))
    logits.scatter_(1, possible, torch.randn(64, 3) * 30)
    seeds, positions = torch.arange(64, device=device), torch.arange(64, device=device)
    tokens = draw(logits.to(device), [SamplingParams()] * 64, seeds, positions, provider_named(device)).cpu()
    assert torch.isfinite(logits.gather(1, tokens[:, None])).all()


def test_a_small_change_of_the_logits_changes_few_draws():
    """Where the two best tokens are close: as often as the change is large. The inverse of the cumulative distribution
    gives another token ten times as often."""
    torch.manual_seed(5)
    n, vocab_size, change = 2000, 1000, 1e-3
    logits = torch.randn(1, vocab_size).expand(n, vocab_size)
    seeds, positions = torch.arange(n), torch.full((n,), 9)
    params = [SamplingParams(temperature=1.5)] * n
    before = draw(logits, params, seeds, positions, CPU)
    after = draw(logits + change * torch.randn(n, vocab_size), params, seeds, positions, CPU)
    assert (before != after).float().mean() < 5 * change


def test_small_numbers_are_as_rare_as_they_should_be():
    """A token of probability p wins where its number is below p or so: the lowest ones decide on rare tokens."""
    numbers = exponential(torch.arange(1 << 10), torch.zeros(1 << 10, dtype=torch.int64), 1 << 12).flatten()
    for bits in (8, 12, 16):
        expected = len(numbers) * 2.0**-bits
        assert abs((numbers < 2.0**-bits).sum().item() - expected) < 4 * expected**0.5
    steps = numbers[numbers < 2.0**-12] * 2.0**32
    assert (steps != steps.round()).all()  # finer than the upper words


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_does_not_depend_on_the_batch(device):
    torch.manual_seed(4)
    rng = random.Random(4)
    vocab_size, num_rows = 500, 150
    sampler = Sampler(num_rows, vocab_size, device)
    for row in range(num_rows):
        setting = rng.choice([*SETTINGS, {"temperature": 0.0}, {"top_k": 1}])
        penalty = rng.choice([{}, {"frequency_penalty": 0.7}, {"repetition_penalty": 1.3, "presence_penalty": -0.5}])
        admit(sampler, row, range(row % 7), range(row % 5), seed=row - 3, min_new_tokens=row % 3, **setting, **penalty)
    logits = (torch.randn(num_rows, vocab_size) * 2).bfloat16().float().to(device)
    positions = [row * 3 for row in range(num_rows)]
    together = sampler.sample(logits, range(num_rows), positions).tolist()
    order = rng.sample(range(num_rows), 40)
    some = sampler.sample(logits[order], order, [positions[row] for row in order]).tolist()
    assert some == [together[row] for row in order]
    for row in order[:20]:
        assert sampler.sample(logits[[row]], [row], [positions[row]]).tolist() == [together[row]]


def test_greedy_is_argmax_and_leaves_the_logits_alone():
    torch.manual_seed(5)
    logits = torch.randn(3, 50)
    logits[1, [4, 9]] = 99.0  # the lowest id of equal ones
    before = logits.clone()
    sampler = Sampler(3, 50, "cpu")
    for row, setting in enumerate([{"temperature": 0.0}, {"temperature": 0.0}, {"top_k": 1}]):
        admit(sampler, row, **setting)
    tokens = sampler.sample(logits, [0, 1, 2], [1, 1, 1])
    assert torch.equal(tokens, before.argmax(dim=-1)) and tokens[1] == 4
    admit(sampler, 0, temperature=0.0, frequency_penalty=1.0, output_ids=[3], logit_bias={2: 1.0})
    sampler.sample(logits, [0, 1, 2], [1, 1, 1], masks_of([1], [range(3)], 50))
    assert torch.equal(logits, before)
    assert sampler.sample(logits[:0], [], []).shape == (0,)


# Penalties, masks, biases, bans


def adjusted(sampler: Sampler, logits: torch.Tensor, position: int = 1, masks=None) -> torch.Tensor:
    return sampler._adjust(logits, [sampler._row(0)], [0], [position], masks)


def test_frequency_and_presence_count_generated_tokens_only():
    sampler = one_row_sampler(6, prompt_ids=[0, 1, 1], output_ids=[2, 2], frequency_penalty=0.5, presence_penalty=0.25)
    for token in (2, 3):
        sampler.observe([0], torch.tensor([token]))
    assert adjusted(sampler, torch.zeros(1, 6)).tolist() == [[0, 0, -1.75, -0.75, 0, 0]]


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty):
    torch.manual_seed(6)
    logits = torch.randn(1, 40)
    sampler = one_row_sampler(40, prompt_ids=[1, 2, 3, 10**9], output_ids=[4, 4], repetition_penalty=penalty)
    sampler.observe([0], torch.tensor([5]))
    ids = torch.tensor([[1, 2, 3, 4, 4, 5]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(adjusted(sampler, logits), expected)


def test_a_row_that_is_taken_again_starts_afresh():
    sampler = Sampler(4, 8, "cpu")
    for row in range(4):
        admit(sampler, row, prompt_ids=[0], output_ids=[row], frequency_penalty=1.0)
    sampler.release(2)
    admit(sampler, 2, frequency_penalty=1.0)
    admit(sampler, 3)
    sampler.observe([1, 3, 2], torch.tensor([7, 7, 6]))
    logits = sampler._adjust(torch.zeros(4, 8), [sampler._row(i) for i in range(4)], range(4), [9] * 4, None)
    expected = torch.zeros(4, 8)
    for row, token in ((0, 0), (1, 1), (1, 7), (2, 6)):
        expected[row, token] = -1
    assert torch.equal(logits, expected)
    with pytest.raises(ValueError, match="row 2 was not admitted"):
        sampler.release(2)
        sampler.sample(torch.zeros(1, 8), [2], [0])
    admit(sampler, 2, prompt_ids=[5], repetition_penalty=2.0)  # in the place of a row whose prompt was [0]
    expected = torch.ones(1, 8)
    expected[0, 5] = 0.5
    assert torch.equal(sampler._adjust(torch.ones(1, 8), [sampler._row(2)], [2], [1], None), expected)


def test_stop_ids_are_banned_until_enough_is_generated():
    sampler = one_row_sampler(
        5, prompt_ids=[0, 0], min_new_tokens=2, temperature=0.0, stop_ids=[4, 3, 77], logit_bias={3: 100}
    )
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    assert [sampler.sample(logits, [0], [position]).item() for position in (2, 3, 4)] == [2, 2, 3]


def test_a_ban_that_would_leave_nothing_is_lifted():
    sampler = one_row_sampler(4, min_new_tokens=5, stop_ids=[3], temperature=1.0)
    only_stop = masks_of([0], [[3]], 4)
    assert sampler.sample(torch.zeros(1, 4), [0], [1], only_stop).item() == 3
    also_two = masks_of([0], [[2, 3]], 4)
    assert {sampler.sample(torch.zeros(1, 4), [0], [p], also_two).item() for p in range(1, 5)} == {2}


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_nothing_that_a_mask_forbids_is_drawn(temperature):
    sampler = one_row_sampler(6, temperature=temperature, logit_bias={0: 1e300, 5: 50.0}, repetition_penalty=1e-40)
    logits = torch.tensor([[9.0, 1.0, 9.0, 2.0, 9.0, 9.0]])
    drawn = {sampler.sample(logits, [0], [position], masks_of([0], [[1, 3]], 6)).item() for position in range(1, 40)}
    assert drawn == ({3} if temperature == 0 else {1, 3})


def test_penalties_and_biases_beyond_float32_still_give_a_token():
    sampler = one_row_sampler(3, prompt_ids=[1], repetition_penalty=1e-45, logit_bias={2: -1e300})
    assert sampler.sample(torch.tensor([[1.0, 9.0, 50.0]]), [0], [1]).item() == 1
    sampler = one_row_sampler(3, logit_bias={2: 1e300})
    assert sampler.sample(torch.tensor([[1.0, 9.0, -50.0]]), [0], [1]).item() == 2


def test_steps_come_in_order():
    """Additive penalties, then repetition, then bias."""
    sampler = one_row_sampler(
        2, output_ids=[0], frequency_penalty=1.0, presence_penalty=1.0, repetition_penalty=2.0, logit_bias={0: 10.0}
    )
    assert adjusted(sampler, torch.tensor([[1.0, 0.0]]))[0, 0] == (1.0 - 2.0) * 2.0 + 10.0


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (masks_of([0], [[1]], 40), r"int32 \[1, 1\], not int32 \[1, 2\]"),
        (TokenMasks([0], np.ones((1, 1))), r"int32 \[1, 1\], not float64"),
        (masks_of([1], [[1]], 4), r"masks for rows \[1\]"),
    ],
)
def test_wrong_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        one_row_sampler(4).sample(torch.zeros(1, 4), [0], [1], mask)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        one_row_sampler(4).sample(torch.zeros(1, 5), [0], [1])


# Beside the token


def test_bad_rows():
    logits = torch.zeros(6, 4)
    logits[1, 2] = math.nan
    logits[2, 0] = INF
    logits[3] = -INF
    logits[4, :3] = -INF
    logits[5, 1] = math.nan
    logits[5, 0] = -INF
    sampler = Sampler(6, 4, "cpu")
    for row in range(6):
        admit(sampler, row, top_p=0.9, top_k=row - 1)
    tokens, bad = sampler.sample_and_check(logits, range(6), [1] * 6)
    assert bad.tolist() == [False, True, True, True, False, True]
    admit(sampler, 4, logit_bias={1: 3e38})  # what is asked of the sampler is not the model's fault
    assert sampler.sample_and_check(logits, range(6), [1] * 6)[1].tolist() == bad.tolist()
    assert ((tokens >= 0) & (tokens < 4)).all()  # harmless, whatever they are
    assert tokens[4] == 3


def test_logprobs_are_the_models_own():
    torch.manual_seed(7)
    logits = torch.randn(3, 9)
    sampler = Sampler(3, 9, "cpu")
    admit(sampler, 0, temperature=0.1, return_logprob=True, top_logprobs_num=2)
    admit(sampler, 1)
    admit(sampler, 2, logit_bias={1: 50.0}, return_logprob=True, token_ids_logprob=[8, 0])
    tokens = sampler.sample(logits, [0, 1, 2], [1, 1, 1])
    asked, found = sampler.logprobs(logits, tokens, [0, 1, 2])
    expected = logits.log_softmax(dim=-1)
    assert asked == [0, 2]
    first, third = found.read()
    assert first.token_id == tokens[0] and third.token_id == 1
    assert first.logprob == pytest.approx(expected[0, tokens[0]].item(), abs=1e-6)
    assert third.logprob == pytest.approx(expected[2, 1].item(), abs=1e-6)
    assert [token for _, token in first.top] == expected[0].topk(2).indices.tolist()
    assert [token for _, token in third.chosen] == [8, 0]
    assert third.top == first.chosen == []
    assert sampler.logprobs(logits[1:2], tokens[1:2], [1]) == ([], None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sampling_does_not_wait_for_the_gpu():
    sampler = Sampler(8, 1000, "cuda")
    logits = torch.randn(8, 1000, device="cuda")
    masks = masks_of([0], [range(0, 1000, 2)], 1000)

    def step() -> None:
        tokens, _ = sampler.sample_and_check(logits, range(8), [9] * 8, masks)
        sampler.observe(range(8), tokens)
        sampler.logprobs(logits, tokens, range(8))

    for row in range(8):
        setting = SETTINGS[-1 - row] | {"return_logprob": True, "top_logprobs_num": row, "token_ids_logprob": [row]}
        admit(sampler, row, min_new_tokens=20, stop_ids=[3], frequency_penalty=0.5, logit_bias={5: 1.0}, **setting)
    step()  # first uses of kernels may wait
    with warnings.catch_warnings(action="ignore"):  # it tells that it does not find everything yet
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
