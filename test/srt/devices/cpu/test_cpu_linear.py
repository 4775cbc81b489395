"""Products with packed weights, on every instruction set of this machine, against plain torch."""

import pytest
import torch
import torch.nn.functional as F

from rtp_llm.srt.devices.cpu import build, elementwise, linear

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
ROWS = (1, 2, 3, 5, 6, 7, 12, 13, 24, 25, 61, 205)
SHAPES = ((1, 1), (33, 7), (100, 77), (96, 64), (64, 172), (130, 258), (640, 40))
FUNCTIONS = [linear._function, elementwise._function]


@pytest.fixture
def generator():
    seed = torch.seed() % (1 << 32)
    print("seed", seed)
    torch.manual_seed(seed)


def inputs(num_rows: int, size: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Rows that follow each other, and rows with something between them, from an odd place on."""
    x = torch.randn(num_rows, size).to(dtype)
    wide = torch.full((num_rows, size + 3), torch.nan, dtype=dtype)
    wide[:, 1 : size + 1] = x
    return [x, wide[:, 1 : size + 1]]


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error, relative to the largest magnitude."""
    assert result.shape == expected.shape
    return ((result.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16(isa, generator, shape):
    weight, bias = torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16()
    packed = linear.BFloat16Panels(weight)
    for num_rows in ROWS:
        for x in inputs(num_rows, shape[1]):
            expected = F.linear(x.double(), weight.double())
            assert error(packed.apply(x, out_dtype=torch.float32), expected) < 1e-5
            assert error(packed.apply(x, bias), expected + bias.double()) < 2**-8


@pytest.mark.parametrize("shape", SHAPES)
def test_float16(isa, generator, shape):
    weight, bias = torch.randn(shape).half(), torch.randn(shape[0]).half()
    weight[0, 0] = 3e-6  # a number without an exponent
    packed = linear.Float16Panels(weight)
    for num_rows in ROWS:
        for x in inputs(num_rows, shape[1], torch.float16):
            expected = F.linear(x.double(), weight.double())
            assert error(packed.apply(x, out_dtype=torch.float32), expected) < 1e-5
            assert error(packed.apply(x, bias), expected + bias.double()) < 2**-10
            assert error(packed.apply(x, bias.float(), torch.float32), expected + bias.double()) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_float32(isa, generator, shape):
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    packed = linear.Float32Panels(weight)
    for num_rows in ROWS:
        for x in inputs(num_rows, shape[1], torch.float32):
            expected = F.linear(x.double(), weight.double())
            assert error(packed.apply(x), expected) < 1e-5
            assert error(packed.apply(x, bias), expected + bias.double()) < 1e-5
    ids = torch.randint(0, shape[0], (3, 9))
    assert torch.equal(packed.rows(ids), weight[ids])


def test_float16_rows_of_a_table(isa, generator):
    table = torch.randn(101, 37).half()
    ids = torch.randint(0, 101, (3, 9))
    assert torch.equal(linear.Float16Panels(table).rows(ids), table[ids])
    with pytest.raises(IndexError, match=r"ids must be in \[0, 101\), not 0 to 101"):
        linear.Float16Panels(table).rows(torch.tensor([0, 101]))


def test_float16_numbers_of_every_kind(isa):
    """Each number of float16 is widened exactly, and results are rounded as torch rounds them."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16).view(-1, 1)
    one = linear.Float16Panels(torch.ones(1, 1).half())
    assert torch.equal(one.apply(every, out_dtype=torch.float32).nan_to_num(), every.float().nan_to_num())
    as_weight = linear.Float16Panels(every[: 1 << 14]).apply(torch.ones(1, 1).half(), out_dtype=torch.float32)
    assert torch.equal(as_weight.nan_to_num(), every[: 1 << 14].float().t().nan_to_num())
    bits = torch.arange(0, 1 << 31, 66467, dtype=torch.int64).to(torch.int32).view(torch.float32)
    near = torch.cat((bits, every.float().flatten() * (1 + 2**-11), torch.tensor([65504.0, 65519.99, 65520.0])))
    for sign in (1, -1):
        rounded = one.apply(torch.zeros(1, 1).half().expand(len(near), 1), None).clone()
        assert not rounded.any()
        sums = linear.Float16Panels(torch.zeros(len(near), 1).half()).apply(torch.ones(1, 1).half(), sign * near)
        assert torch.equal(sums[0].nan_to_num(), (sign * near).half().nan_to_num())
        assert torch.equal(sums[0].isnan(), near.isnan())


def test_float16_rows_of_quantized_weights(isa, generator):
    """They are multiplied as float32 rows are, and only the result is rounded."""
    weight, scales = torch.randint(-127, 128, (96, 40), dtype=torch.int8), torch.rand(96) * 0.01
    packed, x, bias = linear.Int8Panels(weight, scales), torch.randn(7, 40).half(), torch.randn(96).half()
    assert torch.equal(packed.apply(x, bias), packed.apply(x.float(), bias.float()).half())
    out = torch.empty(7, 200).half()
    packed.apply_into(x, out[:, 3:99], bias)
    assert torch.equal(out[:, 3:99], packed.apply(x, bias))
    assert packed.apply(x, out_dtype=torch.float32).dtype == torch.float32


def test_bfloat16_rows_of_a_table(isa, generator):
    table = torch.randn(101, 37).bfloat16()
    ids = torch.randint(0, 101, (3, 9))
    assert torch.equal(linear.BFloat16Panels(table).rows(ids), table[ids])
    with pytest.raises(IndexError, match=r"ids must be in \[0, 101\), not 0 to 101"):
        linear.BFloat16Panels(table).rows(torch.tensor([0, 101]))


def test_a_slice_of_a_weight(isa, generator):
    weight = torch.randn(64, 96).bfloat16()
    x = torch.randn(4, 48).bfloat16()
    result = linear.BFloat16Panels(weight[:, 48:]).apply(x, out_dtype=torch.float32)
    assert error(result, F.linear(x.double(), weight[:, 48:].double())) < 1e-5


def packed_weights(num_outputs: int, num_inputs: int) -> list[linear.PanelWeight]:
    """Return a weight of each packed form."""
    weight = torch.randn(num_outputs, num_inputs)
    return [
        linear.BFloat16Panels(weight.bfloat16()),
        linear.Float16Panels(weight.half()),
        linear.Float32Panels(weight),
        linear.Int8Panels(weight.mul(30).round().clamp(-127, 127).to(torch.int8), torch.rand(num_outputs) / 30),
    ]


@pytest.mark.parametrize("activation", linear.GATED)
def test_a_product_that_ends_in_an_activation(isa, generator, activation):
    """It is the activation's kernel after the product, to the last bit."""
    for num_outputs, num_inputs in ((64, 7), (192, 77), (1280, 64)):
        for packed in packed_weights(num_outputs, num_inputs):
            for num_rows in ROWS[::2]:
                x = torch.randn(num_rows, num_inputs).to(packed.half)
                for bias in (None, torch.randn(num_outputs), torch.randn(num_outputs).to(packed.half)):
                    separate = getattr(elementwise, activation)(packed.apply(x, bias))
                    assert torch.equal(packed.apply(x, bias, activation=activation), separate)
    x = torch.randn(3, 5, num_inputs).to(packed.half)
    assert torch.equal(packed.apply(x, activation=activation), getattr(elementwise, activation)(packed.apply(x)))


def test_a_product_that_ends_in_gelu(isa, generator):
    """Each output's GELU depends on that output alone, and is as exact as torch's."""
    for num_outputs, num_inputs in ((33, 7), (96, 40)):
        for packed in packed_weights(num_outputs, num_inputs):
            for num_rows in (1, 7, 30):
                x = 3 * torch.randn(num_rows, num_inputs).to(packed.half)
                for bias in (None, torch.randn(num_outputs)):
                    expected = F.gelu(packed.apply(x, bias).double())
                    exactness = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(packed.half, 1e-6)
                    assert error(packed.apply(x, bias, activation="gelu"), expected) < exactness
    one = linear.Float32Panels(torch.ones(1, 1))
    extremes = torch.tensor([0.0, -30, 30, 1e30, -1e30, torch.inf, torch.nan])
    x = torch.cat((torch.linspace(-9, 9, 9001), extremes)).view(-1, 1)
    result, expected = one.apply(x, activation="gelu").double(), F.gelu(x.double())
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_products_that_cannot_end_in_an_activation(isa, generator):
    packed = linear.BFloat16Panels(torch.randn(96, 40).bfloat16())
    assert not packed.ends_in("silu_and_mul")  # a half is no whole number of panels
    with pytest.raises(ValueError, match=r"a weight of \[96, 40\] cannot end in 'silu_and_mul'"):
        packed.apply(torch.randn(2, 40).bfloat16(), activation="silu_and_mul")
    assert not linear.BFloat16Panels(torch.randn(128, 40).bfloat16()).ends_in("gelu_and_mul")


def test_a_row_does_not_depend_on_the_others(isa, generator):
    """Nor on the number of threads."""
    every = packed_weights(200, 136)
    before = torch.get_num_threads()
    for packed in every:
        x = torch.randn(61, 136).to(packed.half)
        whole = packed.apply(x, out_dtype=torch.float32)
        try:
            torch.set_num_threads(1)
            assert torch.equal(packed.apply(x, out_dtype=torch.float32), whole)
        finally:
            torch.set_num_threads(before)
        for start, end in ((0, 1), (1, 3), (3, 7), (7, 13), (13, 30), (30, 61)):
            assert torch.equal(packed.apply(x[start:end], out_dtype=torch.float32), whole[start:end])


def test_a_row_that_is_not_a_number_stays_alone(isa, generator):
    weight = torch.randn(64, 40)
    packed = [
        linear.BFloat16Panels(weight.bfloat16()),
        linear.Int8Panels(weight.mul(30).round().clamp(-127, 127).to(torch.int8), torch.rand(64)),
    ]
    for num_rows in (5, 30):
        x = torch.randn(num_rows, 40).bfloat16()
        x[2, 7] = torch.nan
        for weight_ in packed:
            result = weight_.apply(x)
            assert result[2].isnan().any()
            assert result[torch.arange(num_rows) != 2].isfinite().all()


def quantized(x: torch.Tensor) -> torch.Tensor:
    """Rows as int8 with a scale each, as float64 values."""
    x = x.float()
    most = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, torch.full_like(most, 127) / most, 0)  # `127 / most` is rounded twice
    return (x * inverse).round().double() * (most / 127).double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8(isa, generator, shape, dtype):
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    scales, bias = torch.rand(shape[0]) * 0.01, torch.randn(shape[0])
    packed = linear.Int8Panels(weight, scales)
    for num_rows in ROWS:
        for x in inputs(num_rows, shape[1], dtype):
            expected = F.linear(quantized(x), weight.double() * scales.double()[:, None])
            assert error(packed.apply(x, out_dtype=torch.float32), expected) < 1e-5
            assert error(packed.apply(x, bias, torch.float32), expected + bias.double()) < 1e-5
    assert packed.apply(torch.zeros(2, shape[1], dtype=dtype)).abs().max() == 0


def test_int8_rows_of_a_table(isa, generator):
    weight, scales = torch.randint(-127, 128, (50, 31), dtype=torch.int8), torch.rand(50)
    ids = torch.randint(0, 50, (7,))
    packed = linear.Int8Panels(weight, scales)
    assert torch.equal(packed.rows(ids), weight[ids].float() * scales[ids, None])
    assert torch.equal(packed.rows_in(ids, torch.bfloat16), (weight[ids].float() * scales[ids, None]).bfloat16())


def test_wrong_inputs_are_refused():
    packed = linear.BFloat16Panels(torch.randn(8, 6).bfloat16())
    with pytest.raises(ValueError, match="takes 6 inputs, not 5"):
        packed.apply(torch.randn(2, 5).bfloat16())
    with pytest.raises(ValueError, match=r"multiplies bfloat16, not torch\.float32"):
        packed.apply(torch.randn(2, 6))
