"""Products with weights in GGUF's blocks, on every instruction set of this machine, against their plain values."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.devices.cpu import blocks, elementwise
from rtp_llm.srt.devices.cpu.blocks import NUMBERS, BlockExperts, BlockPanels
from rtp_llm.srt.devices.cpu.linear import GATED, PANEL
from rtp_llm.srt.kernels.blocks import BLOCK_TYPES, PlainBlocks, dequantize_blocks
from rtp_llm.srt.kernels.packed import OneByOne, PlainDense

FUNCTIONS = (blocks._function, elementwise._function)
ROWS = (1, 2, 3, 4, 5, 7, 33, 70)
# The places of float16 numbers within a block.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "MXFP4": (),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,),
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_bytes(block_type: str, num_outputs: int, num_inputs: int) -> torch.Tensor:
    """[num_outputs, blocks, bytes of a block]."""
    layout = BLOCK_TYPES[block_type]
    return torch.randint(256, (num_outputs, num_inputs // layout.num_values, layout.num_bytes), dtype=torch.uint8)


def random_weight(block_type: str, num_outputs: int, num_inputs: int) -> torch.Tensor:
    """Blocks of any values with scales of either sign around 0.01, [num_outputs, bytes per row]."""
    made = random_bytes(block_type, num_outputs, num_inputs)
    for at in HALVES[block_type]:
        made[..., at : at + 2] = (torch.randn(*made.shape[:2], 1) * 0.01).half().view(torch.uint8)
    if block_type == "MXFP4":
        made[..., 0] = torch.randint(118, 126, made.shape[:2])
    return made.flatten(1)


def as_bytes(x: torch.Tensor, size: int = 32) -> torch.Tensor:
    """Rows as int8 with a scale for each ``size`` inputs, as float64 values."""
    runs = x.float().unflatten(-1, (-1, size))
    most = runs.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, torch.full_like(most, 127) / most, 0)  # `127 / most` is rounded twice
    return ((runs * inverse).round().double() * (most / 127).double()).flatten(-2)


def inputs(num_rows: int, size: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Rows that follow each other, and rows with something between them, from an odd place on."""
    x = torch.randn(num_rows, size).to(dtype)
    wide = torch.full((num_rows, size + 3), torch.nan, dtype=dtype)
    wide[:, 1 : size + 1] = x
    return [x, wide[:, 1 : size + 1]]


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error, relative to the largest magnitude."""
    assert result.shape == expected.shape
    return ((result.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("block_type", NUMBERS)
def test_products(isa: str, block_type: str) -> None:
    for num_outputs, num_blocks in ((1, 1), (31, 2), (33, 3), (257, 1)):
        num_inputs = num_blocks * BLOCK_TYPES[block_type].num_values
        weight = random_weight(block_type, num_outputs, num_inputs)
        values, packed = dequantize_blocks(weight, block_type).double(), BlockPanels(weight, block_type, num_inputs)
        bias = torch.randn(num_outputs)
        for num_rows in ROWS:
            for x in inputs(num_rows, num_inputs):
                expected = F.linear(as_bytes(x), values)
                assert error(packed.apply(x, out_dtype=torch.float32), expected) < 1e-5
                assert error(packed.apply(x, bias), expected + bias) < 2**-8
        x = torch.randn(2, 3, num_inputs)
        expected = F.linear(as_bytes(x), values) + bias.bfloat16()
        assert error(packed.apply(x, bias.bfloat16()), expected) < 1e-5
        assert packed.apply(torch.zeros(2, num_inputs)).abs().max() == 0


@pytest.mark.parametrize("block_type", NUMBERS)
def test_rows_have_the_bits_of_the_plain_values(isa: str, block_type: str) -> None:
    """Rows of any bytes: also with scales that are infinite, not numbers, subnormal or negative."""
    num_inputs = 3 * BLOCK_TYPES[block_type].num_values
    weight = random_bytes(block_type, 101, num_inputs).flatten(1)
    packed = BlockPanels(weight, block_type, num_inputs)
    ids = torch.randint(0, 101, (3, 9))
    rows, expected = packed.rows(ids), dequantize_blocks(weight[ids], block_type)
    is_number = ~expected.isnan()
    assert torch.equal(rows.isnan(), expected.isnan())
    assert torch.equal(rows[is_number].view(torch.int32), expected[is_number].view(torch.int32))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(packed.rows_in(ids, dtype)[is_number], expected[is_number].to(dtype))
    for wrong in (-1, 101):
        with pytest.raises(IndexError, match=r"ids must be in \[0, 101\)"):
            packed.rows(torch.tensor([0, wrong]))


@pytest.mark.parametrize("block_type", NUMBERS)
def test_the_largest_products_do_not_overflow(isa: str, block_type: str) -> None:
    """All bytes of values alike, times inputs that all become 127, -127, or both in turn."""
    num_inputs = BLOCK_TYPES[block_type].num_values
    x = torch.ones(3, num_inputs)
    x[1] = -1
    x[2, ::2] = -1
    weight = random_weight(block_type, 256, num_inputs)
    scales = {place for at in HALVES[block_type] for place in (at, at + 1)}
    places = [i for i in range(weight.shape[1]) if i not in scales and (block_type != "MXFP4" or i)]
    weight[:, places] = torch.arange(256, dtype=torch.uint8)[:, None]
    expected = F.linear(as_bytes(x), dequantize_blocks(weight, block_type).double())
    assert error(BlockPanels(weight, block_type, num_inputs).apply(x), expected) < 1e-5


@pytest.mark.parametrize("activation", GATED)
def test_a_product_that_ends_in_an_activation(isa: str, activation: str) -> None:
    """It is the activation's kernel after the product, to the last bit."""
    for block_type in ("Q4_1", "Q6_K", "Q8_0"):
        packed = BlockPanels(random_weight(block_type, 192, 256), block_type, 256)
        for num_rows in ROWS:
            x = torch.randn(num_rows, 256).bfloat16()
            for bias in (None, torch.randn(192), torch.randn(192).bfloat16()):
                separate = getattr(elementwise, activation)(packed.apply(x, bias))
                assert torch.equal(packed.apply_activated(x, bias, activation), separate)
    assert not BlockPanels(random_weight("Q4_0", 96, 32), "Q4_0", 32).ends_in(activation)


@pytest.fixture
def all_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("block_type", ["Q5_1", "Q2_K", "Q6_K", "IQ4_NL"])
def test_a_row_does_not_depend_on_the_others(isa: str, all_threads: int, block_type: str) -> None:
    """Nor on the number of threads."""
    packed = BlockPanels(random_weight(block_type, 200, 512), block_type, 512)
    x = torch.randn(61, 512).bfloat16()
    whole = packed.apply(x, out_dtype=torch.float32)
    torch.set_num_threads(1)
    assert torch.equal(packed.apply(x, out_dtype=torch.float32), whole)
    for start, end in ((0, 1), (1, 3), (3, 7), (7, 13), (13, 30), (30, 61)):
        assert torch.equal(packed.apply(x[start:end], out_dtype=torch.float32), whole[start:end])


def test_a_row_that_is_not_a_number_stays_alone(isa: str) -> None:
    packed = BlockPanels(random_weight("Q4_K", 64, 256), "Q4_K", 256)
    for num_rows in (3, 40):
        x = torch.randn(num_rows, 256).bfloat16()
        x[2, 7] = torch.nan
        result = packed.apply(x)
        assert result[2].isnan().all()
        assert result[torch.arange(num_rows) != 2].isfinite().all()


@pytest.mark.parametrize("block_type", ["Q4_0", "Q6_K"])
def test_experts_in_one_call_are_the_products_of_each(isa: str, block_type: str) -> None:
    """To the last bit, also without rows, for one expert, and with a bias."""
    experts = [BlockPanels(random_weight(block_type, 70, 256), block_type, 256) for _ in range(5)]
    together = BlockExperts(experts)
    for counts in ((0, 3, 0, 40, 1), (0, 0, 1, 0, 0), (2, 1, 0, 0, 1), (0, 0, 0, 0, 0)):
        rows_per_expert = torch.tensor(counts)
        x, bias = torch.randn(sum(counts), 256), torch.randn(5, 70)
        for rows in (x, x.bfloat16()):
            for of_experts in (None, bias, bias.bfloat16()):
                separate = OneByOne(experts).apply(rows, rows_per_expert, of_experts)
                assert torch.equal(together.apply(rows, rows_per_expert, of_experts), separate)
    with pytest.raises(ValueError, match=r"groups have \[1, 1, 1, 1, 1\] rows, but x has 4"):
        together.apply(torch.randn(4, 256), torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"take bfloat16 or float32 \[rows, 256\] in 5 groups"):
        together.apply(torch.randn(4, 256), torch.ones(4, dtype=torch.int64))
    assert together.nbytes == sum(expert.nbytes for expert in experts)


def test_only_experts_that_are_alike_are_computed_in_one_call() -> None:
    provider = provider_named("cpu")
    pair = [BlockPanels(random_weight("Q4_0", 64, 256), "Q4_0", 256) for _ in range(2)]
    assert isinstance(provider.group_experts(pair), BlockExperts)
    other = BlockPanels(random_weight("Q6_K", 64, 256), "Q6_K", 256)
    assert isinstance(provider.group_experts([*pair, other]), OneByOne)
    assert isinstance(provider.group_experts([*pair, PlainDense(torch.randn(64, 256))]), OneByOne)


@pytest.mark.parametrize("block_type", NUMBERS)
def test_memory_is_that_of_the_blocks(block_type: str) -> None:
    weight = random_weight(block_type, 70, 512)
    assert BlockPanels(weight, block_type, 512).nbytes == 3 * PANEL * weight.shape[1]


def test_errors_are_those_of_a_scale_for_32_inputs() -> None:
    """Also with outliers, with which one scale for 256 inputs, as in ggml's Q8_K, has twice the error."""
    weight = random_weight("Q6_K", 256, 4096)
    values, packed = dequantize_blocks(weight, "Q6_K").double(), BlockPanels(weight, "Q6_K", 4096)
    x = torch.randn(64, 4096)
    x[torch.rand_like(x) < 0.01] *= 50
    exact = F.linear(x.double(), values)

    def relative(result: torch.Tensor) -> float:
        return ((result - exact).norm() / exact.norm()).item()

    assert relative(packed.apply(x)) < 0.015
    assert 2 * relative(packed.apply(x)) < relative(F.linear(as_bytes(x, 256), values))


def test_wrong_inputs_are_refused() -> None:
    weight = random_weight("Q4_K", 8, 512)
    with pytest.raises(
        ValueError,
        match=r"512 inputs in Q6_K are rows of 420 uint8 in blocks of 256 inputs, not torch\.uint8 \[8, 288\]",
    ):
        BlockPanels(weight, "Q6_K", 512)
    with pytest.raises(ValueError, match="in blocks of 256 inputs"):
        BlockPanels(weight[:, :144], "Q4_K", 320)
    packed = BlockPanels(weight, "Q4_K", 512)
    with pytest.raises(ValueError, match="takes 512 inputs, not 256"):
        packed.apply(torch.randn(2, 256).bfloat16())
    with pytest.raises(ValueError, match=r"multiplies bfloat16 or float32, not torch\.float64"):
        packed.apply(torch.randn(2, 512).double())


def test_models_in_bfloat16_have_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight("Q5_0", 40, 64)
    assert isinstance(provider_named("cpu").pack_blocks(weight, "Q5_0", 64), PlainBlocks)  # in float32
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    assert isinstance(provider_named("cpu").pack_blocks(weight, "Q5_0", 64), BlockPanels)


def test_all_types_of_blocks_have_kernels() -> None:
    assert NUMBERS.keys() == BLOCK_TYPES.keys()
