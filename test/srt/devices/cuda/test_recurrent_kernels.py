"""Kernels that keep a state, in Triton's interpreter against plain torch, and compiled."""

from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from recurrent_rows import rows_of

from closeness import check_close
from rtp_llm.srt.kernels import recurrent
from triton_compile import check_compiled, launches_of
from triton_process import compiled, interpreted

PREFILL = rows_of([5, 1, 19, 16], [0, 2, 3, 0], [1, 2, 3, 5])  # from no state, from its own and from another's
DECODE = rows_of([1, 1, 1], [2, 5, 1], [2, 5, 1])
SLOW_IN_FLOAT16 = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
MODULES = {
    "causal_conv1d": "conv", "gated_delta_rule": "delta", "delta_gates": "delta", "linear_attention": "scans",
    "ssd": "scans", "selective_scan": "scans", "linear_recurrence": "scans",
}  # fmt: skip


def kernel(name: str) -> Any:
    return getattr(import_module(f"rtp_llm.srt.devices.cuda.kernels.{MODULES[name]}"), name)


def check(name: str, rows: Any, states: torch.Tensor, *tokens: Any, **options: Any) -> None:
    """The states stand before the rows among the arguments; those of slot 0 are zeros."""
    states[0] = 0
    ours, expected = states.clone(), states.clone()
    result = kernel(name)(*tokens, ours, rows, **options)
    check_close(result, getattr(recurrent, name)(*tokens, expected, rows, **options), float32=1e-4)
    check_close(ours, expected, float32=1e-4)


def inputs(rows: Any, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows.cu_seqlens_cpu[-1], *shape, dtype=dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_convolutions(dtype: torch.dtype) -> None:
    for rows in (PREFILL, DECODE):
        for size, kernel_size, activation in [(70, 4, "silu"), (128, 3, None), (9, 2, "sigmoid")]:
            x, weight = inputs(rows, size + 3, dtype=dtype)[:, 2:-1], torch.randn(kernel_size, size, dtype=dtype)
            bias = torch.randn(size, dtype=dtype) if activation else None
            factors = None if activation else (inputs(rows, size, dtype=dtype), inputs(rows, size, dtype=dtype))
            options = {} if factors is None else {"before": factors[0], "after": factors[1]}
            states = torch.randn(6, kernel_size - 1, size, dtype=dtype)
            check("causal_conv1d", rows, states, x, weight, bias, **options, activation=activation)


def delta_inputs(rows: Any, by_channel: bool, dtype: torch.dtype, key_heads: int = 2) -> list[torch.Tensor]:
    q, k = (inputs(rows, key_heads, 24, dtype=dtype) for _ in "qk")
    g = -inputs(rows, 4, 24).abs() if by_channel else -inputs(rows, 4).abs()
    return [q, k, inputs(rows, 4, 40, dtype=dtype), g, inputs(rows, 4, dtype=dtype).sigmoid()]


@interpreted
@pytest.mark.parametrize("dtype", SLOW_IN_FLOAT16)
@pytest.mark.parametrize("by_channel", [False, True])
def test_the_delta_rule(by_channel: bool, dtype: torch.dtype) -> None:
    for rows in (PREFILL, DECODE):
        states = torch.randn(6, 4, 24, 40)
        check("gated_delta_rule", rows, states, *delta_inputs(rows, by_channel, dtype))


@interpreted
def test_prompts_of_wide_keys_go_token_by_token() -> None:
    for name, module in (("gated_delta_rule", "delta"), ("linear_attention", "scans")):
        q, k, v = (inputs(PREFILL, 2, 20) for _ in "qkv")
        more = (-inputs(PREFILL, 2).abs(), inputs(PREFILL, 2)) if module == "delta" else (-torch.rand(2),)
        with patch.object(import_module("rtp_llm.srt.devices.cuda.kernels.state_tiles"), "MOST_KEYS_OF_CHUNK", 16):
            check(name, PREFILL, torch.randn(6, 2, 20, 20), q, k, v, *more)


@interpreted
def test_the_delta_rule_of_equal_keys() -> None:
    """All keys are the same and all is written: the system of a chunk is as far from the identity as it can be."""
    q, k, v, g, beta = delta_inputs(PREFILL, False, torch.float32)
    k[:], g[:], beta[:] = k[0].clone(), 0.0, 1.0
    check("gated_delta_rule", PREFILL, torch.randn(6, 4, 24, 40), q, k, v, g, beta)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gates_of_the_delta_rule(dtype: torch.dtype) -> None:
    b, rate = torch.randn(5, 4, dtype=dtype), -torch.rand(4)
    for a in (torch.randn(5, 4, dtype=dtype) * 12, torch.randn(5, 4, 24, dtype=dtype) * 12):
        args = (a, b, rate, torch.randn(a[0].numel()), 2.0)
        for ours, expected in zip(kernel("delta_gates")(*args), recurrent.delta_gates(*args), strict=True):
            check_close(ours, expected, float32=1e-6)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_attention(dtype: torch.dtype) -> None:
    for rows in (PREFILL, DECODE):
        q, k, v = (inputs(rows, 3, 20, dtype=dtype) for _ in "qkv")
        check("linear_attention", rows, torch.randn(6, 3, 20, 20), q, k, v, -torch.rand(3))


@interpreted
@pytest.mark.parametrize("dtype", SLOW_IN_FLOAT16)
def test_state_space_duals(dtype: torch.dtype) -> None:
    for rows in (PREFILL, DECODE):
        x, dt = inputs(rows, 4, 40, dtype=dtype), inputs(rows, 4, dtype=dtype)
        b, c = (inputs(rows, 2, 18, dtype=dtype) for _ in "bc")
        for d, dt_bias, limit in [(torch.randn(4), torch.randn(4), (0.0, torch.inf)), (None, None, (0.1, 0.9))]:
            states, args = torch.randn(6, 4, 18, 40), (x, dt, -torch.rand(4), b, c, d, dt_bias)
            check("ssd", rows, states, *args, dt_limit=limit)


@interpreted
@pytest.mark.parametrize("dtype", SLOW_IN_FLOAT16)
def test_selective_scans(dtype: torch.dtype) -> None:
    for rows in (PREFILL, DECODE):
        x, dt, (b, c) = inputs(rows, 70, dtype=dtype), inputs(rows, 70, dtype=dtype), inputs(rows, 2, 5).unbind(1)
        for d, dt_bias in [(torch.randn(70), torch.randn(70)), (None, None)]:
            check("selective_scan", rows, torch.randn(6, 5, 70), x, dt, -torch.rand(5, 70), b, c, d, dt_bias)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_recurrences(dtype: torch.dtype) -> None:
    for rows in (PREFILL, DECODE):
        check("linear_recurrence", rows, torch.randn(6, 70), inputs(rows, 70, dtype=dtype), -inputs(rows, 70).abs())


def launch_all(rows: Any, dtype: torch.dtype) -> None:
    """What Qwen3-Next, Kimi Linear, MiniMax, Mamba 1 and 2 and Griffin launch."""
    slots, conv = 6, torch.zeros(6, 3, 2048, dtype=dtype)
    wide, weight = inputs(rows, 2048, dtype=dtype), torch.zeros(4, 2048, dtype=dtype)
    kernel("causal_conv1d")(wide, weight, weight[0], conv, rows, "silu")
    kernel("causal_conv1d")(wide, weight, None, conv, rows, None, wide, wide)
    heads = inputs(rows, 16, 128, dtype=dtype)
    values, beta = inputs(rows, 32, 128, dtype=dtype), inputs(rows, 32, dtype=dtype)
    states = torch.zeros(slots, 32, 128, 128)
    kernel("gated_delta_rule")(heads, heads, values, inputs(rows, 32), beta, states, rows)
    kernel("gated_delta_rule")(values, values, values, inputs(rows, 32, 128), beta, states, rows)
    kernel("delta_gates")(beta, beta, torch.zeros(32), torch.zeros(32))
    kernel("linear_attention")(values, values, values, torch.zeros(32), states, rows)
    wide_keys, wide_states = inputs(rows, 32, 256, dtype=dtype), torch.zeros(slots, 32, 256, 128)
    kernel("gated_delta_rule")(wide_keys, wide_keys, values, inputs(rows, 32), beta, wide_states, rows)
    kernel("linear_attention")(wide_keys, wide_keys, values, torch.zeros(32), wide_states, rows)
    groups = inputs(rows, 8, 128, dtype=dtype)
    small, a = inputs(rows, 32, 64, dtype=dtype), torch.zeros(32)
    kernel("ssd")(small, beta, a, groups, groups, a, a, torch.zeros(slots, 32, 128, 64), rows)
    narrow = inputs(rows, 16, dtype=dtype)
    a, d = torch.zeros(16, 2048), torch.zeros(2048)
    kernel("selective_scan")(wide, wide, a, narrow, narrow, d, d, torch.zeros(slots, 16, 2048), rows)
    kernel("linear_recurrence")(wide, inputs(rows, 2048), torch.zeros(slots, 2048), rows)


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_recurrent_kernels_compile(capability: int) -> None:
    with patch.object(import_module("rtp_llm.srt.devices.cuda.kernels.delta"), "generation", lambda: capability // 10):
        launches = launches_of(lambda: [launch_all(rows, torch.bfloat16) for rows in (PREFILL, DECODE)])
    assert len(launches) > 12
    for launch in launches:
        check_compiled(launch, capability)
