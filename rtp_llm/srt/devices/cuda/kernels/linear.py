"""Launches of ``products.py``: see ``kernels/packed.py`` for the forms of weights, and ``kernels/reference.py``."""

from dataclasses import dataclass

import torch
import triton

from rtp_llm.srt.devices.cuda.kernels import products as kernels
from rtp_llm.srt.devices.cuda.kernels.gpu import generation

PROGRAMS = 264  # that a launch should have: two for each processor of an H200
MOST_SPLITS = 16


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight, or one of several that lie at ``offsets`` from the first one's tensors.

    Attributes:
        numbers: [N, columns]; scales: [N, scales per row] float32; zeros: as scales, uint8; table: [16].
        group_size: inputs of a scale.
        offsets: [3, groups] int64.
    """

    code: int
    numbers: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    table: torch.Tensor | None = None
    group_size: int = 0
    offsets: torch.Tensor | None = None

    @property
    def inputs_of_column(self) -> int:
        return 2 if self.code in (kernels.NIBBLES.value, kernels.TABLE.value) else 1

    @property
    def has_one_scale(self) -> bool:
        return self.scales is None or self.scales.dim() == 1 or self.scales.shape[1] == 1


@dataclass(frozen=True, slots=True)
class Tile:
    outputs: int
    rows: int
    columns: int
    warps: int
    stages: int


def fits_fp8_rows(num_inputs: int, group_size: int) -> bool:
    """Whether rows in fp8 have few enough scales for products of a whole block each."""
    return group_size >= num_inputs or group_size % 64 == 0


def fits(weight: Weight) -> bool:
    """Whether tiles of whole groups of inputs are large enough for tensor cores."""
    return weight.has_one_scale or (weight.group_size // weight.inputs_of_column) % 16 == 0


def _tile(weight: Weight, rows: int, dtype: torch.dtype) -> Tile:
    """``rows``: of a group, about."""
    is_wide = dtype == torch.float32
    has_zeros = weight.code == kernels.BYTES.value and weight.zeros is not None  # which take registers
    is_fp8 = weight.code == kernels.FP8_ROWS.value
    columns = (
        32
        if is_wide
        else 128
        if is_fp8
        else 64
        if rows > 64 or has_zeros or weight.code == kernels.DENSE.value
        else 128
    )
    columns //= weight.inputs_of_column
    if not weight.has_one_scale:
        of_scale = weight.group_size // weight.inputs_of_column
        columns = min(columns, of_scale & -of_scale)
    if is_wide:
        return Tile(64, 16 if rows <= 16 else 64, columns, 4, 2)
    if rows <= 64:
        # with three stages, Triton 3.6 spills what it makes of a table for 16 rows of Blackwell's tensor cores
        spills = weight.code == kernels.TABLE.value and rows <= 16 and generation() >= 10
        return Tile(64, max(16, triton.next_power_of_2(rows)), columns, 4, 2 if spills else 3)
    if not weight.has_one_scale and (is_fp8 or generation() < 9):
        return Tile(128, 64, columns, 8, 3)  # products are apart from their sums, and take as many registers
    return Tile(128, 128, columns, 8, 3)


def product(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    rows_per_group: torch.Tensor | None = None,
    row_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """[M, K] -> [M, N]. With ``rows_per_group`` [groups], rows are sorted by group, each with a weight of its own."""
    num_rows, num_outputs = len(x), len(weight.numbers)
    out = torch.empty(num_rows, num_outputs, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    groups = 0 if rows_per_group is None else len(rows_per_group)
    tile = _tile(weight, triton.cdiv(num_rows, max(1, groups)), x.dtype)
    x, half_stride = _halves(x, weight.inputs_of_column)
    num_columns = weight.numbers.shape[1]
    row_tiles = triton.cdiv(num_rows, tile.rows) + min(groups, num_rows)
    blocks, programs = triton.cdiv(num_columns, tile.columns), triton.cdiv(num_outputs, tile.outputs) * row_tiles
    splits = 1 if groups else _num_splits(programs, blocks)
    is_int8 = weight.code == kernels.INT8.value
    target = out if splits == 1 else torch.empty(
        splits, num_rows, num_outputs, dtype=torch.int32 if is_int8 else torch.float32, device=x.device
    )  # fmt: skip
    grid = (triton.cdiv(num_outputs, tile.outputs), row_tiles, splits)
    kernels.product_kernel[grid](
        x, weight.numbers, weight.scales, weight.zeros, weight.table, bias, row_scales, target, rows_per_group,
        weight.offsets, num_rows, num_outputs, num_columns, x.stride(-2), half_stride, num_outputs,
        num_rows * num_outputs, 1 if weight.scales is None or weight.scales.dim() == 1 else weight.scales.shape[1],
        1 if weight.has_one_scale else weight.group_size // weight.inputs_of_column // tile.columns,
        triton.cdiv(blocks, splits), CODE=weight.code, GROUPS=groups, ALL_GROUPS=triton.next_power_of_2(groups) or 1,
        ONE_SCALE=weight.has_one_scale, IS_PART=splits > 1, BLOCK_N=tile.outputs, BLOCK_M=tile.rows,
        BLOCK_K=tile.columns, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return out if splits == 1 else _summed(target, weight, bias, row_scales, out_dtype)


def _halves(x: torch.Tensor, inputs_of_column: int) -> tuple[torch.Tensor, int]:
    """x with contiguous inputs; for two inputs in a column, [2, M, K / 2]: even ones, then odd ones."""
    if inputs_of_column == 1:
        return x if x.stride(1) == 1 else x.contiguous(), 0
    halves = x.unflatten(1, (-1, 2)).permute(2, 0, 1).contiguous()
    return halves, halves.stride(0)


def _num_splits(programs: int, blocks: int) -> int:
    """Splits of the inputs, each of at least four blocks, so that the launch has PROGRAMS programs."""
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, programs))
    possible = 1 << max(0, (blocks // 4).bit_length() - 1)
    return min(wanted, possible, MOST_SPLITS) if programs < PROGRAMS else 1


def _summed(
    parts: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    row_scales: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Sum the splits, and do what a whole product does at its end."""
    result = parts.sum(0).float()
    if row_scales is not None and weight.has_one_scale:
        result *= row_scales.view(-1, 1)
    if weight.has_one_scale and weight.scales is not None:
        result *= weight.scales.view(-1)
    if weight.code == kernels.FP8.value:
        result *= 256.0
    return (result if bias is None else result + bias.float()).to(out_dtype)


def rounded_rows(x: torch.Tensor, weight: Weight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[M, K] as the weight's products take it, and the scales of rows that become 8 bits."""
    if weight.code == kernels.INT8.value:
        return quantize_rows(x)
    if weight.code == kernels.FP8_ROWS.value:
        values, scales = quantize_rows_fp8(x, x.shape[1] if weight.has_one_scale else weight.group_size)
        return values.view(torch.uint8), scales
    return x, None


def quantize_rows_fp8(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.quantize_rows_fp8``; of [M, K], and groups of powers of two, or of whole rows."""
    num_rows, size = x.shape
    rows, num_groups = x if x.stride(1) == 1 else x.contiguous(), triton.cdiv(size, group_size)
    values = torch.empty(num_rows, size, dtype=torch.uint8, device=x.device)
    scales = torch.empty(num_rows, num_groups, dtype=torch.float32, device=x.device)
    group = 0 if num_groups == 1 else group_size
    if num_rows:
        block = max(group, min(4096, triton.next_power_of_2(size)))
        kernels.quantize_rows_fp8_kernel[(num_rows,)](
            rows, values, scales, size, rows.stride(0), num_groups, GROUP=group, BLOCK=block, num_warps=8
        )
    return values.view(torch.float8_e4m3fn), scales


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.quantize_rows``."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    values = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(len(rows), 1, dtype=torch.float32, device=x.device)
    if len(rows):
        block = min(4096, triton.next_power_of_2(size))
        kernels.quantize_rows_kernel[(len(rows),)](rows, values, scales, size, rows.stride(0), BLOCK=block, num_warps=8)
    return values.view(x.shape), scales.view(*x.shape[:-1], 1)
