"""Kernels that keep a state, in C++; other dtypes or devices go to plain torch (``kernels/recurrent.py``).

States are read and written in place, in the pool; tokens may be slices of a projection's output. A step of one token a
row reads slots alone, so that it can be recorded.
"""

import functools
from typing import Any

import torch

from rtp_llm.srt.devices.cpu import memory
from rtp_llm.srt.devices.cpu.binding import BOOL, FLOAT, INT64, POINTER, Kernel, address, bind
from rtp_llm.srt.kernels import recurrent as plain
from rtp_llm.srt.kernels.recurrent import StateRows

_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_HEADS = (POINTER, INT64, INT64)  # tokens by heads: address, strides of tokens and of heads
_SLOTS = (POINTER, POINTER, POINTER, POINTER, INT64, INT64)  # states, load, store, bounds; pieces and tokens
_ARGTYPES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "causal_conv1d": ("recurrent", (*(POINTER, INT64) * 3, POINTER, POINTER, *_SLOTS, INT64, INT64, BOOL, POINTER)),
    "delta_gates": ("recurrent", (*(POINTER, INT64) * 2, POINTER, POINTER, FLOAT, *(INT64,) * 3, POINTER, POINTER)),
    "sigmoid_gate": ("recurrent", (POINTER, *_HEADS, *(INT64,) * 3, POINTER)),
    "selective_scan": ("recurrent", (*(POINTER, INT64) * 2, POINTER, *(POINTER, INT64) * 2, POINTER, POINTER, *_SLOTS,
                                     INT64, INT64, POINTER)),
    "linear_recurrence": ("recurrent", (POINTER, INT64, POINTER, *_SLOTS, INT64, POINTER)),
    "gated_rms_norm": ("recurrent", (*_HEADS, *_HEADS, POINTER, POINTER, *(INT64,) * 4, FLOAT, BOOL, BOOL)),
    "gated_delta_rule": ("state_matrix", (*_HEADS * 3, POINTER, BOOL, POINTER, INT64, *_SLOTS, *(INT64,) * 4, BOOL,
                                          POINTER)),
    "linear_attention": ("state_matrix", (*_HEADS * 3, POINTER, *_SLOTS, *(INT64,) * 3, POINTER)),
    "ssd": ("state_matrix", (*_HEADS, POINTER, INT64, POINTER, *_HEADS * 2, POINTER, POINTER, FLOAT, FLOAT, *_SLOTS,
                             *(INT64,) * 4, POINTER)),
}  # fmt: skip
MOST_TAPS = 16  # inputs of a convolution
MOST_STATES = 256  # numbers of a channel of Mamba 1


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Kernel:
    library, types = _ARGTYPES[name]
    return bind(library, f"{name}_{_SUFFIXES[dtype]}", *types)


def _fits(states: torch.Tensor, state_dtype: torch.dtype, *tokens: torch.Tensor) -> bool:
    """Whether tokens are of one dtype that kernels support, and the states as the kernels have them."""
    dtype = tokens[0].dtype
    if dtype not in _SUFFIXES or any(x.dtype is not dtype or not x.is_cpu for x in tokens):
        return False
    return states.dtype is state_dtype and states.is_cpu and states.is_contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return x with its last dimension side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _numbers(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return x in float32, side by side."""
    return None if x is None else x.float().contiguous()


def _slots(states: torch.Tensor, rows: StateRows, num_tokens: int) -> tuple[int | None, ...]:
    pieces = len(rows.load)
    bounds = None if pieces == num_tokens else rows.cu_seqlens.data_ptr()
    return states.data_ptr(), rows.load.data_ptr(), rows.store.data_ptr(), bounds, pieces, num_tokens


def _strided(x: torch.Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if x is None else (x.data_ptr(), x.stride(0))


def _heads(x: torch.Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    rows: StateRows,
    activation: str | None = None,
    before: torch.Tensor | None = None,
    after: torch.Tensor | None = None,
) -> torch.Tensor:
    others = [other for other in (weight, bias, before, after) if other is not None]
    fits = _fits(states, x.dtype, x, *others) and weight.is_contiguous() and (before is None) == (after is None)
    if not fits or activation not in (None, "silu") or len(weight) > MOST_TAPS:
        return plain.causal_conv1d(x, weight, bias, states, rows, activation, before, after)
    tokens = [None if given is None else _rows(given) for given in (x, before, after)]
    y = memory.empty(x.shape, x.dtype)
    _function("causal_conv1d", x.dtype)(
        *(part for given in tokens for part in _strided(given)), weight.data_ptr(), address(bias),
        *_slots(states, rows, len(x)), x.shape[1], len(weight), activation == "silu", y.data_ptr(),
    )  # fmt: skip
    return y


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    states: torch.Tensor,
    rows: StateRows,
    normalize: bool = True,
) -> torch.Tensor:
    if not _fits(states, torch.float32, q, k, v):
        return plain.gated_delta_rule(q, k, v, g, beta, states, rows, normalize)
    q, k, v, beta, g = _rows(q), _rows(k), _rows(v), _rows(beta.to(v.dtype)), g.float().contiguous()
    out = memory.empty(v.shape, v.dtype)
    _function("gated_delta_rule", v.dtype)(
        *_heads(q), *_heads(k), *_heads(v), g.data_ptr(), g.dim() == 3, beta.data_ptr(), beta.stride(0),
        *_slots(states, rows, len(v)), k.shape[1], v.shape[1], k.shape[2], v.shape[2], normalize, out.data_ptr(),
    )  # fmt: skip
    return out


def delta_gates(
    a: torch.Tensor, b: torch.Tensor, rate: torch.Tensor, dt_bias: torch.Tensor, most_written: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _fits(rate, torch.float32, a, b) or dt_bias.dtype is not torch.float32:
        return plain.delta_gates(a, b, rate, dt_bias, most_written)
    channels = a.shape[2] if a.dim() == 3 else 1
    rows, b, dt_bias = _rows(a.flatten(1)), _rows(b), dt_bias.contiguous()
    g, beta = memory.empty(a.shape, torch.float32), memory.empty(b.shape, b.dtype)
    _function("delta_gates", a.dtype)(
        *_strided(rows), *_strided(b), rate.data_ptr(), dt_bias.data_ptr(), most_written, *b.shape, channels,
        g.data_ptr(), beta.data_ptr(),
    )  # fmt: skip
    return g, beta


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    states: torch.Tensor,
    rows: StateRows,
) -> torch.Tensor:
    if not _fits(states, torch.float32, q, k, v):
        return plain.linear_attention(q, k, v, log_decay, states, rows)
    q, k, v, log_decay = _rows(q), _rows(k), _rows(v), log_decay.float().contiguous()
    out = memory.empty(v.shape, v.dtype)
    _function("linear_attention", v.dtype)(
        *_heads(q), *_heads(k), *_heads(v), log_decay.data_ptr(), *_slots(states, rows, len(v)), *v.shape[1:2],
        k.shape[2], v.shape[2], out.data_ptr(),
    )  # fmt: skip
    return out


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    states: torch.Tensor,
    rows: StateRows,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> torch.Tensor:
    if not _fits(states, torch.float32, x, dt, b, c):
        return plain.ssd(x, dt, a, b, c, d, dt_bias, states, rows, dt_limit)
    x, dt, b, c, a = _rows(x), _rows(dt), _rows(b), _rows(c), a.float().contiguous()
    d, dt_bias = _numbers(d), _numbers(dt_bias)
    out = memory.empty(x.shape, x.dtype)
    _function("ssd", x.dtype)(
        *_heads(x), dt.data_ptr(), dt.stride(0), a.data_ptr(), *_heads(b), *_heads(c), address(d), address(dt_bias),
        *dt_limit, *_slots(states, rows, len(x)), b.shape[1], x.shape[1], b.shape[2], x.shape[2], out.data_ptr(),
    )  # fmt: skip
    return out


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    states: torch.Tensor,
    rows: StateRows,
) -> torch.Tensor:
    if not _fits(states, torch.float32, x, dt, b, c) or len(a) > MOST_STATES:
        return plain.selective_scan(x, dt, a, b, c, d, dt_bias, states, rows)
    x, dt, b, c, a = _rows(x), _rows(dt), _rows(b), _rows(c), a.float().contiguous()
    d, dt_bias = _numbers(d), _numbers(dt_bias)
    y = memory.empty(x.shape, x.dtype)
    _function("selective_scan", x.dtype)(
        x.data_ptr(), x.stride(0), dt.data_ptr(), dt.stride(0), a.data_ptr(), b.data_ptr(), b.stride(0), c.data_ptr(),
        c.stride(0), address(d), address(dt_bias), *_slots(states, rows, len(x)), x.shape[1], len(a), y.data_ptr(),
    )  # fmt: skip
    return y


def linear_recurrence(x: torch.Tensor, log_decay: torch.Tensor, states: torch.Tensor, rows: StateRows) -> torch.Tensor:
    if not _fits(states, torch.float32, x):
        return plain.linear_recurrence(x, log_decay, states, rows)
    x, log_decay = _rows(x), log_decay.float().contiguous()
    y = memory.empty(x.shape, x.dtype)
    _function("linear_recurrence", x.dtype)(
        x.data_ptr(), x.stride(0), log_decay.data_ptr(), *_slots(states, rows, len(x)), x.shape[1], y.data_ptr()
    )
    return y


def sigmoid_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    if not _fits(x, x.dtype, x, gate) or x.dim() != 2 or gate.dim() not in (2, 3):
        return plain.sigmoid_gate(x, gate)
    x, gate = x.contiguous(), _rows(gate)
    inner, stride = (gate.shape[1], gate.stride(1)) if gate.dim() == 3 else (1, 0)
    y = memory.empty(x.shape, x.dtype)
    _function("sigmoid_gate", x.dtype)(
        x.data_ptr(), gate.data_ptr(), gate.stride(0), stride, len(x), inner, gate.shape[-1], y.data_ptr()
    )
    return y


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    gates_first: bool = False,
    activation: str = "silu",
) -> torch.Tensor:
    fits = _fits(weight, x.dtype, x, gate) and x.shape == gate.shape and x.dim() in (2, 3)
    if not fits or activation not in ("silu", "sigmoid"):
        return plain.gated_rms_norm(x, gate, weight, eps, group_size, gates_first, activation)
    x, gate = _rows(x), _rows(gate)
    inner = x.shape[1] if x.dim() == 3 else 1
    strides = [(y.data_ptr(), y.stride(0), y.stride(1) if y.dim() == 3 else 0) for y in (x, gate)]
    y = memory.empty(x.shape, x.dtype)
    _function("gated_rms_norm", x.dtype)(
        *strides[0], *strides[1], weight.data_ptr(), y.data_ptr(), len(x), inner, x.shape[-1] // group_size,
        group_size, eps, gates_first, activation == "silu",
    )  # fmt: skip
    return y
