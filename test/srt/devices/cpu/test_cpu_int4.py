"""Products with groups of 4 bits in blocks, on every instruction set of this machine, against plain torch."""

import pytest
import torch
import torch.nn.functional as F

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.devices.cpu import blocks, elementwise, linear
from rtp_llm.srt.devices.cpu.blocks import BlockExperts, BlockPanels, int4_panels
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kernels.packed import OneByOne, PlainGroups

FUNCTIONS = (blocks._function, elementwise._function, linear._function)
ROWS = (1, 2, 3, 5, 7, 33, 70)
GROUP_SIZES = (16, 32, 64, 128)
SHAPES = ((1, 8), (33, 40), (100, 78), (64, 172), (96, 256), (31, 300))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_groups(
    shape: tuple[int, int], group_size: int, with_zeros: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Levels, scales that are numbers of float16, and zeros: see ``reference.dequantize_int4``."""
    rows, inputs = shape
    groups = -(-inputs // group_size)
    levels = torch.randint(256, (rows, inputs // 2), dtype=torch.uint8)
    scales = ((torch.rand(rows, groups) + 0.1) * torch.randn(rows, groups).sign()).half().float()
    return levels, scales, torch.randint(16, (rows, groups), dtype=torch.uint8) if with_zeros else None


def packed_groups(shape: tuple[int, int], group_size: int, with_zeros: bool) -> BlockPanels:
    packed = int4_panels(*random_groups(shape, group_size, with_zeros), group_size)
    assert packed is not None
    return packed


def as_bytes(x: torch.Tensor, size: int) -> torch.Tensor:
    """Rows as int8 with a scale for each ``size`` inputs, the last ones perhaps fewer, as float64 values."""
    runs = F.pad(x.float(), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    most = runs.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, torch.full_like(most, 127) / most, 0)  # `127 / most` is rounded twice
    return ((runs * inverse).round().double() * (most / 127).double()).flatten(-2)[..., : x.shape[-1]]


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error, relative to the largest magnitude."""
    assert result.shape == expected.shape
    return ((result.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_products(isa: str, group_size: int, with_zeros: bool) -> None:
    for shape in SHAPES:
        groups = random_groups(shape, group_size, with_zeros)
        packed, values = int4_panels(*groups, group_size), reference.dequantize_int4(*groups, group_size).double()
        assert packed is not None
        bias, x_run = torch.randn(shape[0]), 128 if "128" in packed.block_type else 32
        for num_rows in ROWS:
            wide = torch.randn(num_rows, shape[1] + 3).bfloat16()
            for x in (wide[:, 1 : shape[1] + 1], wide[:, : shape[1]].contiguous().float()):
                expected = F.linear(as_bytes(x, x_run), values)
                assert error(packed.apply(x, out_dtype=torch.float32), expected) < 1e-5
                assert error(packed.apply(x, bias, torch.float32), expected + bias) < 1e-5
        assert packed.apply(torch.zeros(2, shape[1])).abs().max() == 0


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_the_largest_products_do_not_overflow(isa: str, group_size: int, with_zeros: bool) -> None:
    levels, scales, zeros = random_groups((64, 256), group_size, with_zeros)
    levels[:] = torch.tensor([0, 15, 240, 255], dtype=torch.uint8).repeat(16)[:, None]
    packed = int4_panels(levels, scales, zeros, group_size)
    values = reference.dequantize_int4(levels, scales, zeros, group_size)
    x = torch.ones(3, 256)
    x[1], x[2, ::2] = -1, -1
    assert packed is not None and error(packed.apply(x), F.linear(x.double(), values.double())) < 1e-5


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_rows_are_the_plain_values(isa: str, group_size: int, with_zeros: bool) -> None:
    groups, ids = random_groups((101, 300), group_size, with_zeros), torch.randint(101, (3, 9))
    packed, plain = int4_panels(*groups, group_size), PlainGroups(*groups, group_size, 4)
    assert packed is not None and torch.equal(packed.rows(ids), plain.rows(ids.flatten()).view(3, 9, 300))
    with pytest.raises(IndexError, match=r"ids must be in \[0, 101\)"):
        packed.rows(torch.tensor([101]))


@pytest.mark.parametrize("activation", linear.GATED)
def test_a_product_that_ends_in_an_activation(isa: str, activation: str) -> None:
    """It is the activation's kernel after the product, to the last bit."""
    for group_size, with_zeros in ((32, False), (16, True), (128, False), (128, True)):
        packed = packed_groups((192, 330), group_size, with_zeros)
        for num_rows in ROWS:
            x = torch.randn(num_rows, 330).bfloat16()
            separate = getattr(elementwise, activation)(packed.apply(x))
            assert torch.equal(packed.apply_activated(x, None, activation), separate)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_row_does_not_depend_on_the_others(isa: str, group_size: int) -> None:
    packed = packed_groups((200, 300), group_size, True)
    x = torch.randn(61, 300).bfloat16()
    whole = packed.apply(x, out_dtype=torch.float32)
    for start, end in ((0, 1), (1, 3), (3, 7), (7, 13), (13, 30), (30, 61)):
        assert torch.equal(packed.apply(x[start:end], out_dtype=torch.float32), whole[start:end])
    x[2, 7] = torch.nan
    result = packed.apply(x)
    assert result[2].isnan().all() and result[torch.arange(61) != 2].isfinite().all()


@pytest.mark.parametrize("with_zeros", [False, True])
def test_experts_in_one_call_are_the_products_of_each(isa: str, with_zeros: bool) -> None:
    experts = [packed_groups((70, 300), 128, with_zeros) for _ in range(5)]
    assert isinstance(provider_named("cpu").group_experts(experts), BlockExperts)
    rows_per_expert, x = torch.tensor((0, 3, 0, 40, 1)), torch.randn(44, 300).bfloat16()
    separate = OneByOne(experts).apply(x, rows_per_expert)
    assert torch.equal(BlockExperts(experts).apply(x, rows_per_expert), separate)


def test_memory_is_that_of_levels_scales_and_zeros() -> None:
    for group_size, with_zeros, head in ((32, False, 2), (32, True, 3), (128, False, 2), (128, True, 3), (16, True, 3)):
        packed = packed_groups((96, 256), group_size, with_zeros)
        assert packed.nbytes == 96 * (256 // 2 + 256 // group_size * head)


def test_what_has_no_blocks() -> None:
    levels, scales, _ = random_groups((33, 240), 24, False)
    assert int4_panels(levels, scales, None, 24) is None
    scales = torch.rand(33, 8)
    for wrong in (1e6, 1e-7, torch.nan):  # float16 has neither such a number nor, beside it, that precision
        scales[3] = wrong
        scales[3, 1] = scales[3, 0] / 3
        assert (int4_panels(levels, scales, None, 32) is None) == (wrong == wrong)
    scales[3] = 0
    assert int4_panels(levels, scales, None, 32) is not None


def test_models_in_bfloat16_have_panels(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, provider = random_groups((40, 64), 32, False), provider_named("cpu")
    assert isinstance(provider.pack_int4(*groups, 32), PlainGroups)  # in float32
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    assert isinstance(provider.pack_int4(*groups, 32), BlockPanels)
    groups = random_groups((40, 64), 8, True)
    packed = provider.pack_int4(*groups, 8)
    assert isinstance(packed, linear.BFloat16Panels)
    assert torch.equal(packed.rows(torch.arange(40)), reference.dequantize_int4(*groups, 8).bfloat16())
