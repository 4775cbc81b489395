"""Products with weights of codes (fp8, tables, integers), on every instruction set, against their values."""

import pytest
import torch
import torch.nn.functional as F

from rtp_llm.srt.devices.cpu import build, codes, elementwise
from rtp_llm.srt.devices.cpu.codes import CodePanels, Codes, fp8_panels
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kernels.packed import PlainCodes

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
FUNCTIONS = (codes._function, elementwise._function)
ROWS = (1, 2, 3, 5, 12, 13, 60)
# Outputs, inputs, inputs of a group.
SHAPES = ((1, 1, 1), (33, 7, 7), (70, 256, 256), (130, 200, 128), (64, 136, 8), (100, 77, 96))
TABLE = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.25, -0.5, -1, -1.5, -2, -3, -4, -6])


def made(kind: Codes, shape: tuple[int, int, int]) -> tuple[CodePanels, torch.Tensor]:
    """A packed weight, and its values [N, K] in float32; every code occurs that has a number."""
    num_outputs, num_inputs, group_size = shape
    numbers = torch.arange(num_outputs * num_inputs).reshape(num_outputs, num_inputs) * 7 % 256
    values = numbers.to(torch.uint8)
    scales = torch.rand(num_outputs, -(-num_inputs // group_size)) + 0.1
    by_column = scales.repeat_interleave(group_size, dim=1)[:, :num_inputs]
    if kind is Codes.E4M3:
        values[(values & 0x7F) == 0x7F] = 3
        weight = values.view(torch.float8_e4m3fn)
        return fp8_panels(weight, scales, group_size), weight.float() * by_column
    if kind is Codes.INT8:
        return CodePanels(kind, values, scales, group_size), values.view(torch.int8).float() * by_column
    return CodePanels(kind, values & 15, scales, group_size, TABLE), TABLE[(values & 15).int()] * by_column


def inputs(num_rows: int, size: int) -> list[torch.Tensor]:
    """Rows that follow each other, and rows with something between them, from an odd place on."""
    x = torch.randn(num_rows, size).bfloat16()
    wide = torch.full((num_rows, size + 3), torch.nan, dtype=torch.bfloat16)
    wide[:, 1 : size + 1] = x
    return [x, wide[:, 1 : size + 1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", Codes)
def test_products_are_those_of_the_values(isa: str, kind: Codes, shape: tuple[int, int, int]) -> None:
    packed, values = made(kind, shape)
    assert torch.equal(packed.rows(torch.arange(len(values))), values)
    bias = torch.randn(len(values))
    for num_rows in ROWS:
        for x in inputs(num_rows, shape[1]):
            expected = F.linear(x.double(), values.double())
            # Sums in float32 are rounded by the size of their terms, which may cancel
            tolerance = 1e-6 * F.linear(x.double().abs(), values.double().abs()).max().item() + 1e-30
            torch.testing.assert_close(
                packed.apply(x, out_dtype=torch.float32).double(), expected, rtol=1e-5, atol=tolerance
            )
            torch.testing.assert_close(packed.apply(x, bias).float(), (expected + bias).float(), rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize("kind", Codes)
def test_a_product_that_ends_in_an_activation(isa: str, kind: Codes) -> None:
    packed, _ = made(kind, (128, 72, 8))
    for num_rows in ROWS:
        x = torch.randn(num_rows, 72).bfloat16()
        assert packed.ends_in("silu_and_mul")
        together = packed.apply(x, activation="silu_and_mul")
        assert torch.equal(together, elementwise.silu_and_mul(packed.apply(x)))


def test_subnormal_numbers(isa: str) -> None:
    """Each alone: kernels that flush them to zero would pass among larger ones."""
    weight = torch.arange(8, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat_interleave(8).reshape(8, 8)
    packed = fp8_panels(weight, torch.ones(8, 1), 8)
    result = packed.apply(torch.ones(1, 8).bfloat16(), out_dtype=torch.float32)
    assert result.tolist() == [[8 * number * 2**-9 for number in range(8)]]


def test_a_weight_that_is_no_number(isa: str) -> None:
    """It makes its own output NaN, and no other; with blocks as without."""
    weight = torch.randn(40, 48).to(torch.float8_e4m3fn)
    weight.view(torch.uint8)[3, 5], weight.view(torch.uint8)[37, 40] = 0x7F, 0xFF
    for group_size in (16, 48):
        packed = fp8_panels(weight, torch.ones(40, 48 // group_size), group_size)
        for num_rows in (1, 60):
            is_nan = packed.apply(torch.zeros(num_rows, 48).bfloat16()).isnan()
            assert is_nan[:, [3, 37]].all()
            assert is_nan.sum() == 2 * num_rows


def test_memory() -> None:
    """Scales that all outputs of a panel share are kept once for all."""
    weight = torch.randn(128, 256).to(torch.float8_e4m3fn)
    assert fp8_panels(weight, torch.ones(128, 2), 128).nbytes == 128 * 256 + 4 * 2 * 4 + 256
    assert fp8_panels(weight, torch.rand(128, 2), 128).nbytes == 128 * 256 + 128 * 2 * 4 + 256


def test_groups_that_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r"groups must be of a multiple of 8 inputs, with scales of \[4, 6\]"):
        CodePanels(Codes.INT8, torch.zeros(4, 72, dtype=torch.uint8), torch.ones(4, 6), 12)
    with pytest.raises(ValueError, match=r"multiplies bfloat16, not torch\.float32"):
        made(Codes.INT8, (4, 8, 8))[0].apply(torch.ones(1, 8))
    with pytest.raises(IndexError, match=r"ids must be in \[0, 4\)"):
        made(Codes.INT8, (4, 8, 8))[0].rows(torch.tensor([4]))


@pytest.mark.parametrize("with_table", [False, True])
def test_plain_forms(with_table: bool) -> None:
    """The reference's form has the same values, and products of float32."""
    values = torch.randint(0, 256, (9, 20), dtype=torch.uint8) & 0x77
    scales = torch.rand(9, 3)
    if with_table:
        plain = PlainCodes(values[:, :10], scales, 8, TABLE)
        expected = TABLE[reference.unpack_int4(values[:, :10]).int()]
    else:
        plain = PlainCodes(values.view(torch.float8_e4m3fn), scales, 8)
        expected = values.view(torch.float8_e4m3fn).float()
    expected = expected * scales.repeat_interleave(8, dim=1)[:, :20]
    ids = torch.tensor([3, 0, 8])
    assert torch.equal(plain.rows(ids), expected[ids])
    assert plain.num_rows == 9
    x, bias = torch.randn(3, 20), torch.randn(9)
    torch.testing.assert_close(plain.apply(x, bias), F.linear(x, expected, bias))
    assert plain.apply(x.bfloat16()).dtype == torch.bfloat16
