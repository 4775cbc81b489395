"""Norms in Triton, with and without a residual: one pass over the rows, of which each is in registers.

See ``kernels/reference.py`` and ``kernels/recurrent.py``. Statistics are in float32.
"""

import torch
import triton
import triton.language as tl

from rtp_llm.srt.kernels import recurrent, reference

MOST_COLUMNS = 16384  # of a row in registers
TILE = 2048  # numbers that a program reads at least, where there are so many rows
RMS, GEMMA, LAYER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    added: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    dtype = y.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < size)
    values = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + rows * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(dtype)
        tl.store(added + rows * size + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)
    factors = tl.load(weight + columns, mask=columns < size, other=0.0).to(tl.float32)
    if KIND == LAYER:
        mean = tl.sum(values, 1) / size
        values = tl.where(inside, values - mean[:, None], 0.0)
    spread = tl.sum(values * values, 1) / size
    normed = values * tl.rsqrt(spread + eps)[:, None]
    if KIND == RMS:
        normed = normed.to(dtype).to(tl.float32) * factors
    elif KIND == GEMMA:
        normed = normed * (1.0 + factors)
    else:
        normed = normed * factors
        if bias is not None:
            normed += tl.load(bias + columns, mask=columns < size, other=0.0).to(tl.float32)
    tl.store(y + rows * size + columns, normed.to(dtype), mask=inside)


def _normed(
    kind: tl.constexpr,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    others = rows if residual is None else residual.reshape(-1, size)
    others = others if others.stride(1) == 1 else others.contiguous()
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    added = y if residual is None else torch.empty_like(y)
    block = triton.next_power_of_2(size)
    together = max(1, TILE // block)
    if rows.numel():
        _norm_kernel[(triton.cdiv(len(rows), together),)](
            rows, None if residual is None else others, weight, bias, y, added, len(rows), size, rows.stride(0),
            others.stride(0), eps, KIND=kind.value, ROWS=together, BLOCK=block, num_warps=4 if block <= 4096 else 16,
        )  # fmt: skip
    return y.view(x.shape), added.view(x.shape)


def _fits(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    return x.shape[-1] <= MOST_COLUMNS and all(other is None or other.dtype == x.dtype for other in others)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _normed(RMS, x, None, weight, None, eps)[0] if _fits(x, weight) else reference.rms_norm(x, weight, eps)


def gemma_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _normed(GEMMA, x, None, weight, None, eps)[0] if _fits(x) else reference.gemma_rms_norm(x, weight, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    return _normed(LAYER, x, None, weight, bias, eps)[0] if _fits(x) else reference.layer_norm(x, weight, bias, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _fits(x, residual, weight):
        return reference.add_rms_norm(x, residual, weight, eps)
    return _normed(RMS, x, residual, weight, None, eps)


def add_gemma_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _fits(x, residual):
        return reference.add_gemma_rms_norm(x, residual, weight, eps)
    return _normed(GEMMA, x, residual, weight, None, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _fits(x, residual):
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    return _normed(LAYER, x, residual, weight, bias, eps)


@triton.jit
def _gated_norm_kernel(
    x: tl.tensor,
    gate: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    num_groups: tl.tensor,
    groups_per_row: tl.tensor,
    group_size: tl.tensor,
    eps: tl.tensor,
    GATES_FIRST: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    groups = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (groups < num_groups) & (columns < group_size)
    places = groups * group_size + columns
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    opened = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
    factor = tl.sigmoid(opened)
    if SILU:
        factor = opened * factor
    if GATES_FIRST:
        values *= factor
    spread = tl.sum(values * values, 1) / group_size
    weights = tl.load(weight + (groups % groups_per_row) * group_size + columns, mask=inside, other=0.0)
    normed = values * tl.rsqrt(spread + eps)[:, None] * weights.to(tl.float32)
    if not GATES_FIRST:
        normed *= factor
    tl.store(y + places, normed.to(y.dtype.element_ty), mask=inside)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    gates_first: bool = False,
    activation: str = "silu",
) -> torch.Tensor:
    if group_size > MOST_COLUMNS or activation not in ("silu", "sigmoid"):
        return recurrent.gated_rms_norm(x, gate, weight, eps, group_size, gates_first, activation)
    rows, gates = x.contiguous(), gate.reshape(x.shape).contiguous()
    y = torch.empty_like(rows)
    block, num_groups = triton.next_power_of_2(group_size), rows.numel() // group_size
    together = max(1, TILE // block)
    if num_groups:
        _gated_norm_kernel[(triton.cdiv(num_groups, together),)](
            rows, gates, weight, y, num_groups, x.shape[-1] // group_size, group_size, eps, GATES_FIRST=gates_first,
            SILU=activation == "silu", ROWS=together, BLOCK=block, num_warps=4 if block <= 4096 else 16,
        )  # fmt: skip
    return y
