"""Products with weights of any form in Triton, for all rows or for groups of rows with a weight each.

A program computes some outputs of some rows: the weight's tile is the left factor, so that a few rows do not leave the
tensor cores' 64 lines empty, and numbers that are decoded from codes need not go back to shared memory. Few programs
split the inputs between them. Scales of groups along the inputs multiply each block's products; sums are in float32.

Which rows are whose is read from the device's memory; the grid has room for any distribution. A group begins a tile.
"""

import triton
import triton.language as tl

DENSE, INT8, BYTES, FP8, NIBBLES, TABLE, FP8_ROWS = (tl.constexpr(code) for code in range(7))


@triton.jit
def _from_fp8(codes: tl.tensor) -> tl.tensor:
    """float16 of the bits of float8_e4m3fn, divided by 256: the exponent's bias is 8 larger."""
    bits = codes.to(tl.uint16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _numbers(codes: tl.tensor, zero: tl.tensor, table: tl.tensor, dtype: tl.constexpr, CODE: tl.constexpr) -> tl.tensor:
    if CODE == DENSE:
        return codes.to(dtype)
    elif CODE == FP8:
        return _from_fp8(codes).to(tl.float32).to(dtype)
    elif CODE == TABLE:
        return tl.load(table + codes.to(tl.int32)).to(dtype)
    else:
        return (codes.to(tl.int32) - zero).to(tl.float32).to(dtype)


@triton.jit
def _zero(zeros: tl.tensor, of_scale: tl.tensor, CODE: tl.constexpr) -> tl.tensor:
    """The code of zero: a group's own, [outputs, 1], or one for all."""
    if zeros is not None:
        return tl.load(zeros + of_scale).to(tl.int32)[:, None]
    else:
        return 8 if CODE == NIBBLES else 128


@triton.jit
def _group_of_tile(
    rows_per_group: tl.tensor, tile: tl.tensor, GROUPS: tl.constexpr, ALL_GROUPS: tl.constexpr, BLOCK_M: tl.constexpr
) -> tl.tensor:
    """(group, its first row in the tile, the row after its last one); beyond the last group, GROUPS."""
    groups = tl.arange(0, ALL_GROUPS)
    counts = tl.load(rows_per_group + groups, mask=groups < GROUPS, other=0).to(tl.int32)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    group = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    first = tl.sum(tl.where(groups < group, counts, 0), 0)
    of_group = tile - tl.sum(tl.where(groups < group, tiles, 0), 0)
    end = first + tl.sum(tl.where(groups == group, counts, 0), 0)
    return tl.minimum(group, GROUPS), first + of_group * BLOCK_M, end


# long: a third of it is the signature, an argument a line
@triton.jit
def product_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    table: tl.tensor,
    bias: tl.tensor,
    row_scales: tl.tensor,
    out: tl.tensor,
    rows_per_group: tl.tensor,
    offsets: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_columns: tl.tensor,
    x_stride: tl.tensor,
    half_stride: tl.tensor,
    out_stride: tl.tensor,
    part_stride: tl.tensor,
    scales_per_row: tl.tensor,
    blocks_per_scale: tl.tensor,
    blocks_per_split: tl.tensor,
    CODE: tl.constexpr,
    GROUPS: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    IS_PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """``out[m, n] = sum over k of x[m, k] * weight[n, k]``, and scales, zeros and bias.

    num_columns: of the weight's tensor; NIBBLES and TABLE have two inputs in each, and x in two halves, that of even
    inputs and that of odd ones. INT8 and FP8_ROWS: x is in 8 bits as well, with ``row_scales``. offsets: [3, groups]
    int64, where each group's weight, scales and zeros begin.
    """
    dtype = x.dtype.element_ty
    two: tl.constexpr = CODE == NIBBLES or CODE == TABLE
    group, first, end = 0, tl.program_id(1) * BLOCK_M, num_rows
    if GROUPS:
        group, first, end = _group_of_tile(rows_per_group, tl.program_id(1), GROUPS, ALL_GROUPS, BLOCK_M)
    if group < (GROUPS if GROUPS else 1):
        if GROUPS:
            weight += tl.multiple_of(tl.load(offsets + group), 16)
            if scales is not None:
                scales += tl.load(offsets + GROUPS + group)
            if zeros is not None:
                zeros += tl.load(offsets + 2 * GROUPS + group)
        rows, outputs = first + tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_inside, output_inside = rows < end, outputs < num_outputs
        of_output = tl.where(output_inside, outputs, 0).to(tl.int64)
        x_rows = x + tl.where(row_inside, rows, 0).to(tl.int64)[None, :] * x_stride
        w_rows = weight + of_output[:, None] * num_columns
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if CODE == INT8 else tl.float32)
        begin = tl.program_id(2) * blocks_per_split
        last = tl.minimum(begin + blocks_per_split, tl.cdiv(num_columns, BLOCK_K))
        for block in range(begin, last):
            columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
            there = columns < num_columns
            codes = tl.load(w_rows + columns[None, :], mask=output_inside[:, None] & there[None, :], other=0)
            inputs = tl.load(x_rows + columns[:, None], mask=there[:, None] & row_inside[None, :], other=0)
            of_scale = of_output * scales_per_row + block // blocks_per_scale
            zero = _zero(zeros, of_scale, CODE)
            if CODE == INT8:
                acc = tl.dot(codes, inputs, acc, out_dtype=tl.int32)
            elif CODE == FP8_ROWS:  # sums of tensor cores have few bits: float32 takes over after each block
                numbers, inputs = codes.to(tl.float8e4nv, bitcast=True), inputs.to(tl.float8e4nv, bitcast=True)
                products = tl.dot(numbers, inputs)
                if not ONE_SCALE:
                    products *= tl.load(scales + of_scale)[:, None]
                    of_row = rows.to(tl.int64) * scales_per_row + block // blocks_per_scale
                    products *= tl.load(row_scales + of_row, mask=row_inside, other=0.0)[None, :]
                acc += products
            elif two:
                low = _numbers(codes & 15, zero, table, dtype, CODE)
                high = _numbers(codes >> 4, zero, table, dtype, CODE)
                odd_columns = half_stride + columns[:, None]
                odd = tl.load(x_rows + odd_columns, mask=there[:, None] & row_inside[None, :], other=0)
                products = tl.dot(low, inputs, input_precision=PRECISION)
                products = tl.dot(high, odd, products, input_precision=PRECISION)
                acc += products if ONE_SCALE else products * tl.load(scales + of_scale)[:, None]
            elif ONE_SCALE:
                acc = tl.dot(_numbers(codes, zero, table, dtype, CODE), inputs, acc, input_precision=PRECISION)
            else:
                products = tl.dot(_numbers(codes, zero, table, dtype, CODE), inputs, input_precision=PRECISION)
                acc += products * tl.load(scales + of_scale)[:, None]
        target = out + rows.to(tl.int64)[None, :] * out_stride + outputs[:, None]
        inside = output_inside[:, None] & row_inside[None, :]
        if IS_PART:
            tl.store(target + tl.program_id(2).to(tl.int64) * part_stride, acc, mask=inside)
        else:
            result = acc.to(tl.float32)
            if CODE == INT8 or (CODE == FP8_ROWS and ONE_SCALE):
                result *= tl.load(row_scales + rows, mask=row_inside, other=0.0)[None, :]
            if ONE_SCALE and scales is not None:
                result *= tl.load(scales + of_output * scales_per_row)[:, None]
            if CODE == FP8:
                result *= 256.0
            if bias is not None:
                of_bias = group * num_outputs + outputs
                result += tl.load(bias + of_bias, mask=output_inside, other=0.0).to(tl.float32)[:, None]
            tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def quantize_rows_kernel(
    x: tl.tensor, values: tl.tensor, scales: tl.tensor, size: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """See ``reference.quantize_rows``: a program for each row, which reads it twice."""
    row = tl.program_id(0).to(tl.int64)
    largest, broken = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        numbers = tl.load(x + row * stride + columns, mask=columns < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(numbers))
        broken |= (numbers != numbers).to(tl.int32)
    scale = tl.max(largest, 0) / 127
    is_broken = tl.max(broken, 0) > 0
    divisor = tl.where(scale == 0, 1.0, scale)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        numbers = tl.load(x + row * stride + columns, mask=columns < size, other=0.0).to(tl.float32)
        rounded = tl.div_rn(numbers, divisor) + 12582912.0 - 12582912.0  # 1.5 * 2 ** 23: half to even
        rounded = tl.where(is_broken | (rounded != rounded), 0.0, rounded)
        tl.store(values + row * size + columns, rounded.to(tl.int8), mask=columns < size)
    tl.store(scales + row, tl.where(is_broken, float("nan"), scale))


@triton.jit
def _to_fp8(x: tl.tensor) -> tl.tensor:
    """The bits of float8_e4m3fn: rounded half to even, and not beyond 448."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    of_size = size.to(tl.int32, bitcast=True)
    normal = ((of_size + 0x7FFFF + ((of_size >> 20) & 1)) >> 20) - (120 << 3)  # exponents' biases are 127 and 7
    subnormal = (size * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xFF  # 1.5 * 2 ** 23: half to even
    code = tl.where(size < 0.015625, subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _fp8_scale(largest: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(scale, what to divide by) of numbers up to ``largest``."""
    scale = largest / 448.0
    return scale, tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def quantize_rows_fp8_kernel(
    x: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    num_groups: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """See ``reference.quantize_rows_fp8``: a program for each row, which it reads twice if it is one group (0)."""
    row = tl.program_id(0).to(tl.int64)
    if GROUP:
        for start in range(0, num_groups, BLOCK // GROUP):
            groups = start + tl.arange(0, BLOCK // GROUP)
            columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            inside = columns < size
            numbers = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
            is_broken = tl.max((numbers != numbers).to(tl.int32), 1) > 0
            scale, divisor = _fp8_scale(tl.max(tl.abs(numbers), 1))
            divided = tl.div_rn(numbers, tl.broadcast_to(divisor[:, None], numbers.shape))
            divided = tl.where(is_broken[:, None] | (divided != divided), 0.0, divided)
            tl.store(values + row * size + columns, _to_fp8(divided), mask=inside)
            scale = tl.where(is_broken, float("nan"), scale)
            tl.store(scales + row * num_groups + groups, scale, mask=groups < num_groups)
    else:
        largest, broken = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
        for start in range(0, size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            numbers = tl.load(x + row * stride + columns, mask=columns < size, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(numbers))
            broken |= (numbers != numbers).to(tl.int32)
        scale, divisor = _fp8_scale(tl.max(largest, 0))
        is_broken = tl.max(broken, 0) > 0
        for start in range(0, size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            numbers = tl.load(x + row * stride + columns, mask=columns < size, other=0.0).to(tl.float32)
            divided = tl.div_rn(numbers, divisor)
            divided = tl.where(is_broken | (divided != divided), 0.0, divided)
            tl.store(values + row * size + columns, _to_fp8(divided), mask=columns < size)
        tl.store(scales + row, tl.where(is_broken, float("nan"), scale))
