"""Weights in 8 and 4 bits in C++ against plain torch, on every instruction set."""

import pytest
import torch

from rtp_llm.srt.devices.cpu import quantizing
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.layers.quantization.int4 import quantize_int4

FUNCTIONS = [quantizing._function]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bits(isa: str, dtype: torch.dtype) -> None:
    """Equal, not close: a checkpoint that is quantized while it is loaded is the same on every machine."""
    for size in (1, 3, 16, 31, 64, 100, 128, 1027):
        x = torch.randn(9, size, dtype=dtype) * torch.logspace(-30, 30, 9, dtype=dtype)[:, None]
        x[1], x[2, -1], x[3, 0], x[4, -1] = 0, torch.nan, torch.inf, -torch.inf
        x[5] = torch.arange(size) % 255 - 127.5  # ties
        for given in (x, x[::2], x[0], x.view(3, 3, size), torch.cat((x, x), dim=1)[:, :size], x[:0]):
            for result, expected in zip(quantizing.quantize_rows(given), reference.quantize_rows(given), strict=True):
                assert result.dtype == expected.dtype
                torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [8, 16, 32])
def test_4_bits(isa: str, group_size: int, dtype: torch.dtype) -> None:
    """Equal, too."""
    for size in (2, 8, 30, 32, 100, 256, 1026):
        weight = torch.randn(37, size, dtype=dtype) * torch.logspace(-9, 9, 37, dtype=dtype)[:, None]
        weight[3], weight[4, ::2], weight[5] = 0, 0, weight[5].abs()
        given = torch.cat((weight, weight), dim=1)[:, :size]
        results = quantizing.quantize_int4(given, group_size), quantize_int4(weight, group_size)
        for result, expected in zip(*results, strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_group_that_is_not_finite_is_not_a_number(isa: str, bad: float) -> None:
    weight = torch.randn(4, 64)
    weight[1, 40] = bad
    values, scales, _ = quantizing.quantize_int4(weight, 32)
    assert scales.isnan().tolist() == [[False, False], [False, True], [False, False], [False, False]]
    assert (values[1, 16:] == quantize_int4(weight, 32)[0][1, 16:]).all()


def test_other_groups_are_refused() -> None:
    for size, group_size in ((64, 128), (33, 8)):
        with pytest.raises(ValueError, match="in 8, 16 or 32"):
            quantizing.quantize_int4(torch.randn(2, size), group_size)
