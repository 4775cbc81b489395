"""What the kernels of ``attention.py`` share: loading queries, the softmax over keys, and storing what it gives."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def lines_of_tile(GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr) -> tl.tensor:
    """The key head, and of each line [BLOCK_M]: which of the tile's tokens, which query head, and whether it is one.

    A program of the grid's second axis has HEADS of the GROUP heads that read a key head, for BLOCK_M // HEADS tokens.
    """
    head_blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(1) // head_blocks
    line = tl.arange(0, BLOCK_M)
    of_group = tl.program_id(1) % head_blocks * HEADS + line % HEADS
    inside = (line < BLOCK_M // HEADS * HEADS) & (of_group < GROUP)
    return kv_head, line // HEADS, kv_head * GROUP + of_group, inside


@triton.jit
def pages_of(page_table: tl.tensor, table_rows: tl.tensor, row: tl.tensor, table_stride: tl.tensor) -> tl.tensor:
    """Where a row's pages are listed."""
    return page_table + tl.load(table_rows + row).to(tl.int64) * table_stride


@triton.jit
def load_queries(
    q: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    inside: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    D1: tl.constexpr,
    D2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> tl.tensor:
    """[M, D1] and [M, D2]: the first and the last components of queries, zero outside."""
    rows = q + (tokens * q_stride + heads * q_head_stride)[:, None]
    columns = tl.arange(0, D1)[None, :]
    first = tl.load(rows + columns, mask=inside[:, None] & (columns < HEAD_DIM), other=0.0)
    if D2:
        columns = D1 + tl.arange(0, D2)[None, :]
        last = tl.load(rows + columns, mask=inside[:, None] & (columns < HEAD_DIM), other=0.0)
    else:
        last = first
    return first, last


# long: one pass over the keys, whose arguments are listed one a line
@triton.jit
def attend(
    total: tl.tensor,
    largest: tl.tensor,
    acc: tl.tensor,
    q_first: tl.tensor,
    q_last: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    positions: tl.tensor,
    ends: tl.tensor,
    slopes: tl.tensor,
    heads: tl.tensor,
    inside: tl.tensor,
    kv_head: tl.tensor,
    pages: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    keys_stride: tl.tensor,
    keys_head_stride: tl.tensor,
    values_stride: tl.tensor,
    values_head_stride: tl.tensor,
    num_kv_heads: tl.tensor,
    scaling: tl.tensor,
    logit_cap: tl.tensor,
    window: tl.tensor,
    chunk: tl.tensor,
    CHECKED: tl.constexpr,
    CAPPED: tl.constexpr,
    LATENT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Go on with the softmax over keys of positions [begin, end).

    positions: [M], of the queries; with CHECKED a query sees what ``kernels/reference.py`` says, else all of them.
    """
    dtype = q_first.dtype
    first_columns, last_columns, v_columns = tl.arange(0, D1), D1 + tl.arange(0, D2 if D2 else 1), tl.arange(0, DV)
    if slopes is not None:
        slope = tl.load(slopes + heads, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    for start in range(begin, end, BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        there = places < end
        page_ids = tl.load(pages + places // PAGE_SIZE, mask=there, other=0).to(tl.int64)
        slots = page_ids * PAGE_SIZE + places % PAGE_SIZE
        row = keys + slots * keys_stride + kv_head * keys_head_stride
        readable = there[None, :] if D1 <= HEAD_DIM else there[None, :] & (first_columns < HEAD_DIM)[:, None]
        k_first = tl.load(row[None, :] + first_columns[:, None], mask=readable, other=0.0).to(dtype)
        scores = tl.dot(q_first, k_first, input_precision=PRECISION)
        if D2:
            readable = there[None, :] & (last_columns < HEAD_DIM)[:, None]
            k_last = tl.load(row[None, :] + last_columns[:, None], mask=readable, other=0.0).to(dtype)
            scores = tl.dot(q_last, k_last, scores, input_precision=PRECISION)
        if key_scales is not None:
            scores *= tl.load(key_scales + slots * num_kv_heads + kv_head, mask=there, other=0.0)[None, :]
        if CAPPED:  # tanh(x) is 1 - 2 / (exp(2 x) + 1)
            capped = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * scaling * LOG2_E / logit_cap)) + 1.0)
            scores = capped * (logit_cap * LOG2_E)
        else:
            scores = scores * (scaling * LOG2_E)
        if slopes is not None:
            scores += slope[:, None] * (places[None, :] - positions[:, None]).to(tl.float32)
        visible = there[None, :]
        if CHECKED:
            seen = places[None, :] <= positions[:, None]
            if ends is not None:
                seen = seen | (places[None, :] < ends[:, None])
            visible = visible & seen
            if window is not None:
                visible = visible & (places[None, :] > positions[:, None] - window)
            if chunk is not None:
                visible = visible & (places[None, :] >= (positions // chunk * chunk)[:, None])
        scores = tl.where(visible, scores, NOTHING)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(new_largest == NOTHING, 0.0, new_largest)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if LATENT:
            acc = tl.dot(weights.to(dtype), tl.trans(k_first), acc, input_precision=PRECISION)
        else:
            readable = there[:, None] if DV == V_DIM else there[:, None] & (v_columns < V_DIM)[None, :]
            v_rows = values + slots * values_stride + kv_head * values_head_stride
            v = tl.load(v_rows[:, None] + v_columns[None, :], mask=readable, other=0.0).to(dtype)
            if value_scales is not None:
                weights *= tl.load(value_scales + slots * num_kv_heads + kv_head, mask=there, other=0.0)[None, :]
            acc = tl.dot(weights.to(dtype), v, acc, input_precision=PRECISION)
        largest = new_largest
    return total, largest, acc


@triton.jit
def nothing_yet(M: tl.constexpr, DV: tl.constexpr) -> tl.tensor:
    return tl.zeros([M], tl.float32), tl.full([M], NOTHING, tl.float32), tl.zeros([M, DV], tl.float32)


@triton.jit
def store_part(
    total: tl.tensor,
    largest: tl.tensor,
    acc: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    inside: tl.tensor,
    num_heads: tl.tensor,
    slot: tl.tensor,
    parts: tl.tensor,
    part_sums: tl.tensor,
    SLOTS: tl.constexpr,
    V_DIM: tl.constexpr,
    DV: tl.constexpr,
) -> None:
    """Store a split's average of values, and the logarithm of its sum of weights, to be merged."""
    places = (rows * num_heads + heads) * SLOTS + slot
    columns = tl.arange(0, DV)[None, :]
    some = total > 0
    divisor = tl.where(some, total, 1.0)
    average = acc / divisor[:, None]
    tl.store(parts + places[:, None] * V_DIM + columns, average, mask=(inside & some)[:, None] & (columns < V_DIM))
    tl.store(part_sums + places, tl.where(some, largest + tl.log2(divisor), NOTHING), mask=inside)


@triton.jit
def finish(
    total: tl.tensor,
    largest: tl.tensor,
    acc: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    inside: tl.tensor,
    num_heads: tl.tensor,
    sinks: tl.tensor,
    V_DIM: tl.constexpr,
    DV: tl.constexpr,
) -> None:
    """Store the average of values; a sink takes its share of the weights."""
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        new_largest = tl.maximum(largest, sink)
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.exp2(sink - new_largest)
        acc = acc * shrink[:, None]
    columns = tl.arange(0, DV)[None, :]
    places = (tokens * num_heads + heads)[:, None] * V_DIM + columns
    divisor = tl.where(total > 0, total, 1.0)  # of lines outside
    tl.store(out + places, (acc / divisor[:, None]).to(out.dtype.element_ty), mask=inside[:, None] & (columns < V_DIM))
