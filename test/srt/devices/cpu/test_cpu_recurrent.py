"""Kernels that keep a state in C++ against plain torch, on every instruction set."""

import random
from collections.abc import Callable

import pytest
import torch
from recurrent_rows import assert_near, rows_of

from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.devices.cpu import recurrent
from rtp_llm.srt.devices.cpu.provider import KERNELS
from rtp_llm.srt.kernels import recurrent as plain

FUNCTIONS = [recurrent._function]
DTYPES = [torch.float32, torch.bfloat16]
# Lengths of pieces: a decode step; one prompt; both, around the blocks of tokens that kernels prepare together.
STEPS = [[1] * 5, [37], [1, 16, 17, 1, 33, 2]]
MATRIX_STEPS = [*STEPS, [131, 20, 1]]  # and of several blocks
Make = Callable[[int, torch.dtype], tuple[tuple[int, ...], Callable[..., torch.Tensor]]]


@pytest.fixture(autouse=True)
def seed() -> None:
    value = random.randrange(1 << 31)
    print(f"seed {value}")
    torch.manual_seed(value)


def compare(
    ours: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
    shape: tuple[int, ...],
    lengths: list[int],
    state_dtype: torch.dtype = torch.float32,
) -> None:
    """``ours`` and ``theirs`` take states and rows. Some pieces go on in their slot, some begin in another's."""
    count = len(lengths)
    load = [0 if n % 3 == 0 else n + 1 for n in range(count)]
    store = [count + 2 + n if n % 3 == 2 else n + 1 for n in range(count)]
    states = torch.randn(2 * count + 3, *shape).to(state_dtype)
    states[0] = 0
    own, expected_states = states.clone(), states.clone()
    rows = rows_of(lengths, load, store)
    expected = theirs(expected_states, rows)
    result = ours(own, rows)
    assert result.dtype == expected.dtype and result.shape == expected.shape
    if result.dtype == torch.float32:
        assert_near(result, expected)
    else:
        torch.testing.assert_close(result, expected, rtol=1.6e-2, atol=1e-2)
    assert_near(own, expected_states)


def within(x: torch.Tensor, first: int, *shape: int) -> torch.Tensor:
    """A part of a projection's output, not copied."""
    size = 1
    for n in shape:
        size *= n
    return x[:, first : first + size].unflatten(1, shape) if len(shape) > 1 else x[:, first : first + size]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", MATRIX_STEPS, ids=str)
def test_delta_rule(isa: str, lengths: list[int], dtype: torch.dtype) -> None:
    tokens = sum(lengths)
    for k_heads, v_heads, k_dim, v_dim in [(1, 1, 1, 1), (2, 4, 12, 20), (1, 3, 128, 128), (2, 2, 33, 70)]:
        qkv = torch.randn(tokens, 2 * k_heads * k_dim + v_heads * v_dim + 5).to(dtype)
        q, k = within(qkv, 0, k_heads, k_dim), within(qkv, k_heads * k_dim, k_heads, k_dim)
        v = within(qkv, 2 * k_heads * k_dim + 5, v_heads, v_dim)
        beta = torch.rand(tokens, v_heads + 3).to(dtype)[:, 3:]
        for gates in [(tokens, v_heads), (tokens, v_heads, k_dim)]:
            args = (q, k, v, -3 * torch.rand(gates), beta)
            for normalize in (True, False):
                if not normalize:  # else the state would grow with each token
                    args = (q * 0.1, k * k_dim**-0.5, *args[2:])
                compare(
                    lambda states, rows, a=args, n=normalize: recurrent.gated_delta_rule(*a, states, rows, n),
                    lambda states, rows, a=args, n=normalize: plain.gated_delta_rule(*a, states, rows, n),
                    (v_heads, k_dim, v_dim),
                    lengths,
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", MATRIX_STEPS, ids=str)
def test_linear_attention(isa: str, lengths: list[int], dtype: torch.dtype) -> None:
    for heads, size in [(1, 1), (3, 21), (2, 96)]:
        q, k, v = (torch.randn(sum(lengths), heads, size).to(dtype) * size**-0.5 for _ in range(3))
        args = (q, k, v, -torch.rand(heads))
        compare(
            lambda states, rows, a=args: recurrent.linear_attention(*a, states, rows),
            lambda states, rows, a=args: plain.linear_attention(*a, states, rows),
            (heads, size, size),
            lengths,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", MATRIX_STEPS, ids=str)
def test_ssd(isa: str, lengths: list[int], dtype: torch.dtype) -> None:
    tokens = sum(lengths)
    for heads, head_dim, groups, size in [(1, 1, 1, 1), (6, 5, 2, 9), (2, 64, 1, 128), (3, 40, 3, 17)]:
        together = torch.randn(tokens, heads * head_dim + 2 * groups * size + heads).to(dtype)
        x = within(together, 0, heads, head_dim)
        b = within(together, heads * head_dim, groups, size)
        c = within(together, heads * head_dim + groups * size, groups, size)
        dt = within(together, heads * head_dim + 2 * groups * size, heads)
        a, d, dt_bias = -torch.rand(heads) * 4, torch.randn(heads), torch.randn(heads)
        for options in [(d, dt_bias, (0.0, float("inf"))), (None, None, (0.3, 0.9))]:
            compare(
                lambda states, rows, t=(x, dt, a, b, c), o=options: recurrent.ssd(*t, *o[:2], states, rows, o[2]),
                lambda states, rows, t=(x, dt, a, b, c), o=options: plain.ssd(*t, *o[:2], states, rows, o[2]),
                (heads, size, head_dim),
                lengths,
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", STEPS, ids=str)
def test_selective_scan(isa: str, lengths: list[int], dtype: torch.dtype) -> None:
    tokens = sum(lengths)
    for channels, size in [(1, 1), (7, 5), (200, 16)]:
        together = torch.randn(tokens, 2 * channels + 2 * size).to(dtype)
        x, dt = within(together, 0, channels), within(together, channels, channels) * 3
        b, c = within(together, 2 * channels, size), within(together, 2 * channels + size, size)
        a, d, dt_bias = -torch.rand(size, channels) * 4, torch.randn(channels), torch.randn(channels)
        for options in [(d, dt_bias), (None, None)]:
            compare(
                lambda states, rows, t=(x, dt, a, b, c, *options): recurrent.selective_scan(*t, states, rows),
                lambda states, rows, t=(x, dt, a, b, c, *options): plain.selective_scan(*t, states, rows),
                (size, channels),
                lengths,
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", STEPS, ids=str)
def test_convolution(isa: str, lengths: list[int], dtype: torch.dtype) -> None:
    for channels, taps in [(1, 4), (3, 1), (40, 3), (333, 4), (16, 9), (8, 17)]:
        x = torch.randn(sum(lengths), channels + 9).to(dtype)[:, 4 : channels + 4]
        weight = torch.randn(taps, channels).to(dtype)
        gates = torch.randn(sum(lengths), 2 * channels + 3).to(dtype)
        gates = (gates[:, :channels], gates[:, channels + 3 :])
        for bias, *options in [(None, None), (torch.randn(channels).to(dtype), "silu"), (None, None, *gates)]:
            compare(
                lambda states, rows, a=(x, weight, bias), o=options: recurrent.causal_conv1d(*a, states, rows, *o),
                lambda states, rows, a=(x, weight, bias), o=options: plain.causal_conv1d(*a, states, rows, *o),
                (taps - 1, channels),
                lengths,
                dtype,
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 700])
def test_gates_of_the_delta_rule(isa: str, tokens: int, dtype: torch.dtype) -> None:
    for heads, channels in [(1, 0), (16, 0), (37, 0), (3, 21), (2, 128)]:
        together = (6 * torch.randn(tokens, heads * max(1, channels) + heads + 5)).to(dtype)
        a, b = within(together, 0, heads, channels) if channels else within(together, 0, heads), together[:, -heads:]
        rate, dt_bias = -4 * torch.rand(heads), torch.randn(heads * max(1, channels))
        for most in (1.0, 2.0):
            (g, beta), (g_plain, beta_plain) = (of.delta_gates(a, b, rate, dt_bias, most) for of in (recurrent, plain))
            torch.testing.assert_close(g, g_plain, rtol=1e-5, atol=1e-6)
            assert beta.dtype == dtype
            torch.testing.assert_close(beta, beta_plain, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_by_a_sigmoid(isa: str, dtype: torch.dtype) -> None:
    for tokens, heads, size in [(1, 1, 1), (1, 8, 256), (300, 3, 50)]:
        x = torch.randn(tokens, heads * size + 2).to(dtype)[:, 2:]
        gate = torch.randn(tokens, heads, 2 * size).to(dtype)[..., size:]
        for given in (gate, gate.flatten(1)):
            result, expected = recurrent.sigmoid_gate(x, given), x * gate.flatten(1).sigmoid()
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 1e-6}
            torch.testing.assert_close(result, expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", STEPS, ids=str)
def test_linear_recurrence(isa: str, lengths: list[int], dtype: torch.dtype) -> None:
    for channels in (1, 7, 333):
        x, log_decay = torch.randn(sum(lengths), channels).to(dtype), -torch.rand(sum(lengths), channels)
        compare(
            lambda states, rows, a=(x, log_decay): recurrent.linear_recurrence(*a, states, rows),
            lambda states, rows, a=(x, log_decay): plain.linear_recurrence(*a, states, rows),
            (channels,),
            lengths,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_norms(isa: str, dtype: torch.dtype) -> None:
    for shape, group in [((3, 24), 8), ((5, 3, 20), 20), ((1, 1), 1), ((200, 4, 100), 50), ((300, 16, 128), 128)]:
        together = torch.randn(*shape[:-1], 2 * shape[-1] + 3).to(dtype)
        x, gate = together[..., : shape[-1]], together[..., shape[-1] + 3 :]
        weight = torch.randn(shape[-1]).to(dtype)
        for gates_first in (True, False):
            for activation in ("silu", "sigmoid"):
                args = (x, gate, weight, 1e-5, group, gates_first, activation)
                result, expected = recurrent.gated_rms_norm(*args), plain.gated_rms_norm(*args)
                rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1.6e-2, 1e-6)
                torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)


def test_a_token_that_is_not_a_number_stays_in_its_row(isa: str) -> None:
    q, k, v = (torch.randn(3, 2, 16) for _ in range(3))
    v[1] = float("nan")
    states = torch.zeros(4, 2, 16, 16)
    result = recurrent.gated_delta_rule(
        q, k, v, -torch.rand(3, 2), torch.rand(3, 2), states, rows_of([1, 1, 1], [0, 0, 0], [1, 2, 3])
    )
    assert result[1].isnan().all() and result[[0, 2]].isfinite().all()
    assert states[2].isnan().any() and states[[0, 1, 3]].isfinite().all()


def test_other_dtypes_go_to_plain_torch() -> None:
    x, states = torch.randn(2, 3, dtype=torch.float16), torch.zeros(3, 1, 3, dtype=torch.float16)
    weight = torch.randn(2, 3, dtype=torch.float16)
    rows = rows_of([1, 1], [0, 0], [1, 2])
    expected = plain.causal_conv1d(x, weight, None, states.clone(), rows)
    assert torch.equal(recurrent.causal_conv1d(x, weight, None, states, rows), expected)


def test_layers_pick_kernels() -> None:
    for name in [name for name, module in KERNELS.items() if module == "recurrent"]:
        assert pick(name, torch.bfloat16) is getattr(recurrent, name)
        assert pick(name, torch.float16) is getattr(plain, name)
