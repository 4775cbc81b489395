"""Gated activations and gates in Triton. See ``kernels/reference.py`` and ``kernels/recurrent.py``."""

import torch
import triton
import triton.language as tl

from rtp_llm.srt.kernels import recurrent

BLOCK = 1024  # results of a program
SILU, GELU, GELU_TANH, SWIGLU_OAI = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def _gated_kernel(
    x: tl.tensor,
    y: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    dtype = y.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    if KIND == SWIGLU_OAI:
        places = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        pairs = tl.load(x + row * x_stride + places, mask=places < 2 * size, other=0.0)
        gate, up = tl.split(tl.reshape(pairs, (BLOCK, 2)))
    else:
        gate = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
        up = tl.load(x + row * x_stride + size + columns, mask=inside, other=0.0)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    if KIND == SILU:
        result = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up
    elif KIND == GELU:
        result = (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))).to(dtype).to(tl.float32) * up
    elif KIND == GELU_TANH:  # 1 + tanh(u) is 2 sigmoid(2 u)
        u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        result = (gate * tl.sigmoid(u)).to(dtype).to(tl.float32) * up
    else:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL), limit, tl.PropagateNan.ALL)
        result = (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    tl.store(y + row * size + columns, result.to(dtype), mask=inside)


def _gated(kind: tl.constexpr, x: torch.Tensor, alpha: float = 0.0, limit: float = 0.0) -> torch.Tensor:
    size = x.shape[-1] // 2
    if x.shape[-1] % 2:
        raise ValueError(f"a gated activation needs as many gates as values, but x is {list(x.shape)}")
    rows = x.reshape(-1, 2 * size)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = torch.empty(len(rows), size, dtype=x.dtype, device=x.device)
    if y.numel():
        _gated_kernel[(len(rows), triton.cdiv(size, BLOCK))](
            rows, y, size, rows.stride(0), alpha, limit, KIND=kind.value, BLOCK=BLOCK, num_warps=4
        )
    return y.view(*x.shape[:-1], size)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return _gated(SILU, x)


def gelu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return _gated(GELU, x)


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    return _gated(GELU_TANH, x)


def swiglu_oai_and_mul(x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    return _gated(SWIGLU_OAI, x, alpha, limit)


@triton.jit
def _sigmoid_gate_kernel(x: tl.tensor, gate: tl.tensor, y: tl.tensor, num: tl.tensor, BLOCK: tl.constexpr) -> None:
    dtype = y.dtype.element_ty
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num
    opened = tl.sigmoid(tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + places, (values * opened).to(dtype), mask=inside)


def sigmoid_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    if gate.dtype != x.dtype:
        return recurrent.sigmoid_gate(x, gate)
    values, gates = x.contiguous(), gate.reshape(x.shape).contiguous()
    y = torch.empty_like(values)
    if y.numel():
        grid = (triton.cdiv(y.numel(), BLOCK),)
        _sigmoid_gate_kernel[grid](values, gates, y, y.numel(), BLOCK=BLOCK, num_warps=4)
    return y
