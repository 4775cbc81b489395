"""Norms, gated activations and rotations in C++ against plain torch, on every instruction set."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.devices.cpu import elementwise
from rtp_llm.srt.devices.cpu.provider import KERNELS
from rtp_llm.srt.kernels import recurrent, reference

FUNCTIONS = [elementwise._function]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 3, 16, 31, 64, 100, 128, 1027]


@pytest.fixture(autouse=True)
def seed() -> None:
    value = random.randrange(1 << 31)
    print(f"seed {value}")
    torch.manual_seed(value)


def steps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many numbers of their 16 bits lie between two of them."""
    places = [torch.where(bits < 0, -32768 - bits, bits) for bits in (x.view(torch.int16).int() for x in (a, b))]
    return (places[0] - places[1]).abs()


def check(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 in float32; in 16 bits a step apart, and seldom. Where a number was rounded before the last
    product, one step there may be two of the result."""
    assert result.dtype == expected.dtype and result.shape == expected.shape
    assert torch.equal(result.isnan(), expected.isnan())
    result, expected = result.nan_to_num(0.0), expected.nan_to_num(0.0)
    if result.dtype != torch.float32:
        close = (result.float() - expected.float()).abs() < 1e-6  # of sums that cancel
        apart = steps_apart(result, expected).masked_fill(close, 0)
        assert (apart <= 2).all()
        assert (apart > 0).sum() <= 2 + 0.01 * apart.numel()
    else:
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["rms_norm", "gemma_rms_norm", "layer_norm"])
def test_norms(isa: str, name: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        for shape in [(size,), (1, size), (7, size), (5, 3, size), (2, 3, 2, size), (0, size)]:
            x, residual = (torch.randn(shape, dtype=dtype) * 3 for _ in range(2))
            weight = torch.randn(size, dtype=dtype)
            args = (weight, 1e-5)
            if name == "layer_norm":
                args = (weight, random.choice([None, torch.randn(size, dtype=dtype)]), 1e-5)
                if size == 1:
                    x, residual = x.round(), residual.round()  # nothing but the rounding of the mean would be compared
            if x.numel() == 0:
                assert getattr(elementwise, name)(x, *args).shape == x.shape
                continue
            check(getattr(elementwise, name)(x, *args), getattr(reference, name)(x, *args))
            normed, added = getattr(elementwise, f"add_{name}")(x, residual, *args)
            assert torch.equal(added, x + residual)
            check(normed, getattr(reference, name)(added, *args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_heads_within_a_projection(isa: str, dtype: torch.dtype) -> None:
    for num_tokens, heads, size in [(1, 2, 64), (9, 3, 40), (300, 4, 128)]:
        qkv = torch.randn(num_tokens, 3 * heads * size + 8, dtype=dtype)
        weight = torch.randn(size, dtype=dtype)
        k = qkv[:, heads * size + 8 : 2 * heads * size + 8].unflatten(-1, (heads, size))
        before = qkv.clone()
        check(elementwise.rms_norm(k, weight, 1e-6), reference.rms_norm(k, weight, 1e-6))
        latent = qkv[:, 5 : 5 + size]
        check(elementwise.rms_norm(latent, weight, 1e-6), reference.rms_norm(latent, weight, 1e-6))
        scattered = qkv[:, : 2 * size : 2]
        check(elementwise.rms_norm(scattered, weight, 1e-6), reference.rms_norm(scattered, weight, 1e-6))
        assert torch.equal(qkv, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_of_numbers_far_from_zero(isa: str, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 77) + 1000).to(dtype)
    weight, bias = torch.randn(77, dtype=dtype), torch.randn(77, dtype=dtype)
    result = elementwise.layer_norm(x, weight, bias, 1e-5)
    exact = reference.layer_norm(x.double().float(), weight, bias, 1e-5)
    torch.testing.assert_close(result.float(), exact.float(), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_others_and_nan_stays(isa: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(700, 100, dtype=dtype), torch.randn(100, dtype=dtype)
    x[3, 99] = torch.nan
    x[4, 0] = torch.inf
    together = elementwise.rms_norm(x, weight, 1e-6)
    assert together[3].isnan().all() and together[4].isnan().any()
    gated = elementwise.silu_and_mul(x)
    assert gated[3, 49].isnan() and gated[3].isnan().sum() == 1
    for row in (0, 3, 5, 699):
        alone = elementwise.rms_norm(x[[row]], weight, 1e-6), elementwise.silu_and_mul(x[[row]])
        for one, of_many in zip(alone, (together, gated), strict=True):
            assert torch.equal(one[0].nan_to_num(), of_many[row].nan_to_num())


# In float64, and not small differences of large numbers, as torch's are where the result is next to nothing.
EXACT = {
    "silu_and_mul": F.silu,
    "gelu_and_mul": lambda x: x * torch.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh_and_mul": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_gated_activations(isa: str, name: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        for shape in [(2 * size,), (1, 2 * size), (40, 2 * size), (3, 2, 2 * size), (0, 2 * size)]:
            x = torch.randn(shape, dtype=dtype) * random.choice([0.1, 1, 10])
            result, expected = getattr(elementwise, name)(x), getattr(reference, name)(x)
            assert result.dtype == dtype and result.shape == expected.shape
            gate, up = x.double().chunk(2, dim=-1)
            exact = EXACT[name](gate) * up
            error, allowed = ((y.double() - exact).abs() for y in (result, expected))
            step = {torch.bfloat16: 2**-6.9, torch.float16: 2**-9.9}.get(dtype, 5e-6)
            smallest = 2**-24 * (1 + up.abs()) if dtype is torch.float16 else 1e-30
            assert (error <= allowed + exact.abs() * step + smallest).all()
    wide = torch.randn(6, 4 * 33, dtype=dtype)
    check(getattr(elementwise, name)(wide[:, 33:99]), getattr(elementwise, name)(wide[:, 33:99].contiguous()))


@pytest.mark.parametrize("name", EXACT)
def test_activations_all_along_the_line(isa: str, name: str) -> None:
    gate = torch.cat([torch.linspace(-12, 12, 20001), torch.linspace(-3, 3, 20001), torch.tensor([-80.0, 1e30])])
    result = getattr(elementwise, name)(torch.stack([gate, torch.ones_like(gate)], dim=-1))[:, 0].double()
    exact = EXACT[name](gate.double())
    assert ((result - exact).abs() <= 1.2e-5 * exact.abs() + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_of_gpt_oss(isa: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        x = torch.randn(5, 2 * size, dtype=dtype) * 5
        check(elementwise.swiglu_oai_and_mul(x, 1.702, 7.0), reference.swiglu_oai_and_mul(x, 1.702, 7.0))
    x[2] = torch.nan
    assert elementwise.swiglu_oai_and_mul(x, 1.702, 7.0)[2].isnan().all()


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(isa: str, dtype: torch.dtype, is_neox: bool) -> None:
    for num_tokens, q_heads, k_heads, size, half in [
        (1, 2, 1, 64, 32), (7, 4, 2, 96, 13), (5, 3, 3, 10, 5), (4, 2, 1, 80, 16), (300, 4, 2, 64, 32), (0, 2, 1, 8, 4)
    ]:  # fmt: skip
        qkv = torch.randn(num_tokens, (q_heads + 2 * k_heads) * size, dtype=dtype)
        q, k, _ = qkv.split([q_heads * size, k_heads * size, k_heads * size], dim=-1)
        q, k = q.unflatten(-1, (q_heads, size)), k.unflatten(-1, (k_heads, size))
        angles = torch.rand(num_tokens, half) * 6
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        before = qkv.clone()
        results = elementwise.rotary_pair(q, k, cos, sin, is_neox)
        assert torch.equal(qkv, before)
        for result, x in zip(results, (q, k), strict=True):
            expected = reference.rotary(x, cos, sin, is_neox)
            if dtype is not torch.float32:
                assert torch.equal(result, expected)
            else:
                torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(elementwise.rotary(x, cos, sin, is_neox), result)
        elementwise.rotary_pair_(q, k, cos, sin, is_neox)
        assert torch.equal(q, results[0]) and torch.equal(k, results[1])
        assert torch.equal(qkv[:, (q_heads + k_heads) * size :], before[:, (q_heads + k_heads) * size :])


@pytest.mark.parametrize("is_gemma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_rotation_at_once(isa: str, dtype: torch.dtype, is_gemma: bool) -> None:
    """They are both kernels' results."""
    norm = elementwise.gemma_rms_norm if is_gemma else elementwise.rms_norm
    for num_tokens, q_heads, k_heads, size, half in [
        (1, 2, 1, 64, 32), (7, 4, 2, 96, 13), (5, 3, 3, 10, 5), (300, 4, 2, 64, 32), (0, 2, 1, 8, 4)
    ]:  # fmt: skip
        qk = torch.randn(num_tokens, (q_heads + k_heads) * size, dtype=dtype)
        q, k = qk.split([q_heads * size, k_heads * size], dim=-1)
        q, k = q.unflatten(-1, (q_heads, size)), k.unflatten(-1, (k_heads, size))
        weights = torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)
        angles = torch.rand(num_tokens, half) * 6
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        for is_neox in (True, False):
            results = elementwise.norm_rotary_pair(q, k, weights, 1e-6, cos, sin, is_neox, is_gemma)
            if not num_tokens:
                assert [result.shape for result in results] == [q.shape, k.shape]
                continue
            normed = [norm(x, weight, 1e-6) for x, weight in zip((q, k), weights, strict=True)]
            expected = elementwise.rotary_pair(*normed, cos, sin, is_neox)
            for result, of_both in zip(results, expected, strict=True):
                check(result, of_both)
    plain = [x.double() for x in (q, k, *weights, cos, sin)]
    result, _ = elementwise.norm_rotary_pair(*plain[:2], plain[2:4], 1e-6, *plain[4:], True, is_gemma)
    assert result.dtype == torch.float64


def test_what_does_not_fit_goes_to_plain_torch(isa: str) -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    assert torch.equal(elementwise.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    mixed = elementwise.rms_norm(x.bfloat16(), weight.float(), 1e-5)
    assert torch.equal(mixed, reference.rms_norm(x.bfloat16(), weight.float(), 1e-5))
    assert torch.equal(elementwise.silu_and_mul(x.double()), reference.silu_and_mul(x.double()))
    assert elementwise.add_rms_norm(x.to("meta"), x.to("meta"), weight.to("meta"), 1e-5)[0].is_meta


def test_shapes_that_do_not_fit_are_refused(isa: str) -> None:
    with pytest.raises(ValueError, match=r"must be \[8\], not \[4\]"):
        elementwise.rms_norm(torch.zeros(2, 8), torch.zeros(4), 1e-5)
    with pytest.raises(ValueError, match="as many gates as values"):
        elementwise.silu_and_mul(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"cosines \[3, 4\] do not go with queries \[2, 1, 8\]"):
        elementwise.rotary(torch.zeros(2, 1, 8), torch.zeros(3, 4), torch.zeros(3, 4), True)
    with pytest.raises(ValueError, match="cannot rotate"):
        elementwise.rotary_pair_(*[torch.zeros(2, 1, 8).half()] * 2, *[torch.zeros(2, 4)] * 2, True)


def test_layers_pick_kernels() -> None:
    assert pick("rms_norm", torch.bfloat16) is elementwise.rms_norm
    assert pick("rms_norm", torch.float16) is elementwise.rms_norm
    assert pick("rms_norm", torch.float64) is reference.rms_norm
    for name in KERNELS.keys() - {"draw", "quantize_int4"}:  # whose references are the sampler's and the scheme's own
        assert callable(getattr(reference, name, None) or getattr(recurrent, name))
