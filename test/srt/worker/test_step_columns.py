"""A step's work as arrays: each column against its definition, and several arrays sent in one copy."""

import random

import numpy as np
import pytest
import torch

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.plan import RowWork
from rtp_llm.srt.worker.columns import step_columns


def random_work(draw: random.Random, longest: int) -> list[RowWork]:
    rows = draw.sample(range(64), draw.randrange(20))
    return [RowWork(row, draw.randrange(100), draw.randint(1, longest), draw.random() < 0.6) for row in rows]


@pytest.mark.parametrize("longest", [1, 7])
@pytest.mark.parametrize("seed", range(5))
def test_columns_describe_the_work(seed: int, longest: int) -> None:
    work = random_work(random.Random(seed), longest)
    columns = step_columns(work)
    tokens = [(w.row, position) for w in work for position in range(w.start, w.start + w.num_tokens)]
    first = [sum(w.num_tokens for w in work[:b]) for b in range(len(work))]
    expected = {
        "rows": [w.row for w in work],
        "starts": [w.start for w in work],
        "counts": [w.num_tokens for w in work],
        "ends": [w.start + w.num_tokens for w in work],
        "offsets": first,
        "token_rows": [row for row, _ in tokens],
        "positions": [position for _, position in tokens],
        "sample_rows": [place + w.num_tokens - 1 for place, w in zip(first, work, strict=True) if w.sample],
    }
    assert {name: column.tolist() for name, column in columns._asdict().items()} == expected
    assert all(column.dtype == np.int64 for column in columns)


def test_arrays_that_travel_together_arrive_apart() -> None:
    arrays = [np.arange(3), np.empty(0, dtype=np.int64), np.array([7, 1 << 40])]
    tensors = provider_named("cpu").to_device_together(arrays)
    assert [tensor.tolist() for tensor in tensors] == [array.tolist() for array in arrays]
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in tensors)


@pytest.mark.parametrize("values", [[], [3, -1], [[1, 2], [3, 4]]])
def test_lists_become_tensors_of_their_shape(values: list) -> None:
    tensor = provider_named("cpu").to_device(values, torch.int64)
    assert tensor.dtype == torch.int64 and torch.equal(tensor, torch.tensor(values, dtype=torch.int64))
