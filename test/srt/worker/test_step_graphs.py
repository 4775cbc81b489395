"""Sizes of recorded steps, and draws by parameters on the device."""

import pytest
import torch

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker.draw_table import DRAWN_AT_ONCE, DrawTable
from rtp_llm.srt.worker.philox import as_int64
from rtp_llm.srt.worker.sampler import draw
from rtp_llm.srt.worker.step_graphs import coarse_first, sizes_up_to


@pytest.mark.parametrize(
    ("num_rows", "largest", "given", "sizes"),
    [
        (256, None, None, (1, 2, 4, *range(8, 257, 8))),
        (1000, None, None, (1, 2, 4, *range(8, 257, 8))),
        (1000, 300, None, (1, 2, 4, *range(8, 297, 8), 300)),
        (20, None, None, (1, 2, 4, 8, 16, 20)),
        (3, None, None, (1, 2, 3)),
        (1, None, None, (1,)),
        (256, 2, None, (1, 2)),
        (512, None, [512, 1, 7], (1, 7, 512)),
        (32, None, [64, 8, 128], (8, 32)),
        (32, 16, [4, 64], (4, 16)),
    ],
)
def test_sizes(num_rows: int, largest: int | None, given: list[int] | None, sizes: tuple[int, ...]) -> None:
    assert sizes_up_to(num_rows, largest, given) == sizes


def test_the_order_of_recording() -> None:
    assert coarse_first((1, 2, 4, 8, 16, 24, 32, 40)) == [40, 16, 8, 4, 2, 1, 32, 24]
    assert coarse_first((3, 5, 64)) == [64, 5, 3]
    assert coarse_first((7,)) == [7]


def test_the_table_draws_as_the_sampler() -> None:
    """More rows than are drawn at once, of every kind, with ties; in lines that are no row's, too."""
    vocab_size, num_rows = 257, DRAWN_AT_ONCE + 9
    provider = provider_named("reference")
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(num_rows, vocab_size, generator=generator).mul(3).round(decimals=1)
    kinds = [
        {},
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.6},
        {"top_p": 0.9, "top_k": 40},
        {"min_p": 0.1},
        {"top_p": 1e-9},
    ]
    params = [SamplingParams(temperature=0.5 + 0.1 * i, **kinds[i % len(kinds)]) for i in range(num_rows)]
    seeds = [as_int64((1 << 63) + 7919 * i) for i in range(num_rows)]
    positions = torch.arange(num_rows) * 3
    rows = torch.randperm(num_rows, generator=generator)

    table = DrawTable(num_rows + 1, vocab_size, provider)
    table.write({int(row): (params[line], seeds[line]) for line, row in enumerate(rows)})
    drawn = table.draw(logits, rows, positions)
    assert drawn.tolist() == draw(logits, params, torch.tensor(seeds), positions, provider).tolist()
    assert table.draws(rows).tolist() == [not each.is_greedy for each in params]
    assert not table.draws(torch.tensor([num_rows]))[0]
    table.write({0: (SamplingParams(temperature=0), 5)})
    assert not table.draws(torch.tensor([0]))[0]
