"""Attention over the paged cache in Triton: decoding rows, prefixes that rows share, and rows of several tokens.

The softmax is computed block by block with a running maximum (FlashAttention; Dao et al., 2022). A decoding row's keys
are split over programs, whose results are merged by the logarithms of their sums (Flash-Decoding; Dao et al., 2023).
The query heads that read one key head are rows of one tile, with those of several tokens, or of several sequences that
share a prefix (Hydragen; Juravsky et al., 2024). A launch's grid depends on shapes alone; where a row's keys are is
read from the device's memory. Scores are in base 2: factors of log2(e) make exp2 of exp.
"""

import triton
import triton.language as tl

from rtp_llm.srt.devices.cuda.kernels.attention_parts import (
    LOG2_E,
    NOTHING,
    attend,
    finish,
    lines_of_tile,
    load_queries,
    nothing_yet,
    pages_of,
    store_part,
)
from rtp_llm.srt.devices.cuda.kernels.cache import write_heads


# long: half of it is the signature, an argument a line
@triton.jit
def decode_kernel(
    q: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    part_sums: tl.tensor,
    table_rows: tl.tensor,
    starts: tl.tensor,
    tokens: tl.tensor,
    own_starts: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    slots: tl.tensor,
    page_table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    sinks: tl.tensor,
    slopes: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    keys_stride: tl.tensor,
    keys_head_stride: tl.tensor,
    values_stride: tl.tensor,
    values_head_stride: tl.tensor,
    num_kv_heads: tl.tensor,
    k_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_stride: tl.tensor,
    v_head_stride: tl.tensor,
    scaling: tl.tensor,
    logit_cap: tl.tensor,
    window: tl.tensor,
    chunk: tl.tensor,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    CAPPED: tl.constexpr,
    LATENT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One row of one token: a split of its keys, for query heads of one key head.

    k, v: the step's keys and values, which programs write to the cache that read them there; None: others did.
    """
    row, split = tl.program_id(0), tl.program_id(2)
    kv_head, _, heads, inside = lines_of_tile(GROUP, BLOCK_M, BLOCK_M)
    num_heads = num_kv_heads * GROUP
    position = tl.load(starts + row).to(tl.int32)
    token = tl.load(tokens + row).to(tl.int64)
    pages = pages_of(page_table, table_rows, row, table_stride)
    first = 0
    if window is not None:
        first = tl.maximum(position - window + 1, 0)
    if chunk is not None:
        first = position // chunk * chunk
    if own_starts is not None:
        first = tl.load(own_starts + row).to(tl.int32)
    end = position + 1
    per_split = tl.cdiv(tl.cdiv(end - first, SPLITS), BLOCK_N) * BLOCK_N
    begin = first + split * per_split
    if k is not None:  # noqa: SIM102 - None is known when the kernel is compiled
        if (begin <= position) & (position < begin + per_split):
            slot = tl.load(slots + token).to(tl.int64)
            write_heads(
                k, keys, key_scales, token, slot, kv_head, num_kv_heads, HEAD_DIM, k_stride, k_head_stride, keys_stride,
                keys_head_stride, 1, D1 + D1 if D2 else D1,
            )  # fmt: skip
            if v is not None:
                write_heads(
                    v, values, value_scales, token, slot, kv_head, num_kv_heads, V_DIM, v_stride, v_head_stride,
                    values_stride, values_head_stride, 1, DV,
                )  # fmt: skip
            tl.debug_barrier()  # what is written is read by the block's other threads
    q_first, q_last = load_queries(q, token, heads, inside, q_stride, q_head_stride, D1, D2, HEAD_DIM)
    total, largest, acc = nothing_yet(BLOCK_M, DV)
    total, largest, acc = attend(
        total, largest, acc, q_first, q_last, begin, tl.minimum(begin + per_split, end),
        tl.full([BLOCK_M], 0, tl.int32) + position, None, slopes, heads, inside, kv_head, pages, keys, values,
        key_scales, value_scales, keys_stride, keys_head_stride, values_stride, values_head_stride, num_kv_heads,
        scaling, logit_cap, None, None, False, CAPPED, LATENT, PAGE_SIZE, HEAD_DIM, V_DIM, D1, D2, DV, BLOCK_N,
        PRECISION,
    )  # fmt: skip
    if SLOTS == 1:
        finish(total, largest, acc, out, token, heads, inside, num_heads, sinks, V_DIM, DV)
    else:
        store_part(total, largest, acc, row, heads, inside, num_heads, split, parts, part_sums, SLOTS, V_DIM, DV)
        if SLOTS > SPLITS and split == 0:  # shared prefixes' parts: of rows that share none they stay empty
            for slot in range(SPLITS, SLOTS):
                empty = tl.full([BLOCK_M], NOTHING, tl.float32)
                tl.store(part_sums + (row * num_heads + heads) * SLOTS + slot, empty, mask=inside)


@triton.jit
def merge_kernel(
    parts: tl.tensor,
    part_sums: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    sinks: tl.tensor,
    num_heads: tl.tensor,
    SLOTS: tl.constexpr,
    ALL_SLOTS: tl.constexpr,
    V_DIM: tl.constexpr,
    DV: tl.constexpr,
) -> None:
    """Merge the parts of one row's head."""
    row, head = tl.program_id(0), tl.program_id(1)
    first = (row * num_heads + head).to(tl.int64) * SLOTS
    slots = tl.arange(0, ALL_SLOTS)
    sums = tl.load(part_sums + first + slots, mask=slots < SLOTS, other=NOTHING)
    largest = tl.max(sums, 0)
    sink = NOTHING
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        largest = tl.maximum(largest, sink)
    total = tl.sum(tl.exp2(sums - largest), 0)
    if sinks is not None:
        total += tl.exp2(sink - largest)
    columns = tl.arange(0, DV)
    acc = tl.zeros([DV], tl.float32)
    for slot in range(SLOTS):
        weight = tl.exp2(tl.load(part_sums + first + slot) - largest)
        if weight > 0:  # the parts of others were not written
            acc += weight * tl.load(parts + (first + slot) * V_DIM + columns, mask=columns < V_DIM, other=0.0)
    token = tl.load(tokens + row).to(tl.int64)
    target = out + (token * num_heads + head) * V_DIM + columns
    tl.store(target, (acc / total).to(out.dtype.element_ty), mask=columns < V_DIM)


# long: half of it is the signature, an argument a line
@triton.jit
def prefix_kernel(
    q: tl.tensor,
    parts: tl.tensor,
    part_sums: tl.tensor,
    entries: tl.tensor,
    members: tl.tensor,
    table_rows: tl.tensor,
    starts: tl.tensor,
    tokens: tl.tensor,
    page_table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    slopes: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    keys_stride: tl.tensor,
    keys_head_stride: tl.tensor,
    values_stride: tl.tensor,
    values_head_stride: tl.tensor,
    num_kv_heads: tl.tensor,
    scaling: tl.tensor,
    logit_cap: tl.tensor,
    num_tiles: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    OWN_SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    CAPPED: tl.constexpr,
    LATENT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Some of the rows that share a prefix: a split of its keys, for query heads of one key head.

    entries: [N, 5] int32: the prefix's first and last position but one, its first member and their number, and its
    level, which says where the parts go. Tiles beyond an entry's members have nothing to do.
    """
    split = tl.program_id(2)
    entry = entries + tl.program_id(0) // num_tiles * 5
    prefix_begin, prefix_end, first_member, count, level = (
        tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    )  # fmt: skip
    rows_of_tile: tl.constexpr = BLOCK_M // HEADS
    tile = tl.program_id(0) % num_tiles
    if tile * rows_of_tile < count:
        kv_head, of_tile, heads, inside = lines_of_tile(GROUP, HEADS, BLOCK_M)
        num_heads = num_kv_heads * GROUP
        member = tile * rows_of_tile + of_tile
        inside = inside & (member < count)
        rows = tl.load(members + first_member + member, mask=inside, other=0)
        pages = pages_of(page_table, table_rows, tl.load(members + first_member), table_stride)
        row_tokens = tl.load(tokens + rows, mask=inside, other=0).to(tl.int64)
        positions = tl.load(starts + rows, mask=inside, other=0).to(tl.int32)
        q_first, q_last = load_queries(q, row_tokens, heads, inside, q_stride, q_head_stride, D1, D2, HEAD_DIM)
        per_split = tl.cdiv(tl.cdiv(prefix_end - prefix_begin, SPLITS), BLOCK_N) * BLOCK_N
        begin = prefix_begin + split * per_split
        total, largest, acc = nothing_yet(BLOCK_M, DV)
        total, largest, acc = attend(
            total, largest, acc, q_first, q_last, begin, tl.minimum(begin + per_split, prefix_end), positions, None,
            slopes, heads, inside, kv_head, pages, keys, values, key_scales, value_scales, keys_stride,
            keys_head_stride, values_stride, values_head_stride, num_kv_heads, scaling, logit_cap, None, None, False,
            CAPPED, LATENT, PAGE_SIZE, HEAD_DIM, V_DIM, D1, D2, DV, BLOCK_N, PRECISION,
        )  # fmt: skip
        slot = OWN_SPLITS + level * SPLITS + split
        store_part(total, largest, acc, rows, heads, inside, num_heads, slot, parts, part_sums, SLOTS, V_DIM, DV)


# long: half of it is the signature, an argument a line
@triton.jit
def extend_kernel(
    q: tl.tensor,
    out: tl.tensor,
    blocks: tl.tensor,
    table_rows: tl.tensor,
    starts: tl.tensor,
    counts: tl.tensor,
    tokens: tl.tensor,
    visible_ends: tl.tensor,
    page_table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    sinks: tl.tensor,
    slopes: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    keys_stride: tl.tensor,
    keys_head_stride: tl.tensor,
    values_stride: tl.tensor,
    values_head_stride: tl.tensor,
    num_kv_heads: tl.tensor,
    scaling: tl.tensor,
    logit_cap: tl.tensor,
    window: tl.tensor,
    chunk: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    CAPPED: tl.constexpr,
    LATENT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """A block of one row's tokens, over its cached keys and those before each token.

    blocks: [N, 2] int32: a row, and the block's first token in it.
    """
    block = tl.program_id(0)
    row, first_token = tl.load(blocks + 2 * block), tl.load(blocks + 2 * block + 1)
    tokens_of_block: tl.constexpr = BLOCK_M // HEADS
    kv_head, of_tile, heads, inside = lines_of_tile(GROUP, HEADS, BLOCK_M)
    num_heads = num_kv_heads * GROUP
    count, start = tl.load(counts + row).to(tl.int32), tl.load(starts + row).to(tl.int32)
    pages = pages_of(page_table, table_rows, row, table_stride)
    of_row = first_token + of_tile
    inside = inside & (of_row < count)
    positions, row_tokens = start + of_row, tl.load(tokens + row).to(tl.int64) + of_row
    q_first, q_last = load_queries(q, row_tokens, heads, inside, q_stride, q_head_stride, D1, D2, HEAD_DIM)
    ends = None
    least = start + first_token
    end = start + tl.minimum(first_token + tokens_of_block, count)
    if visible_ends is not None:
        ends = tl.load(visible_ends + row_tokens, mask=inside, other=0).to(tl.int32)
        end = tl.maximum(end, tl.max(ends, 0))
    begin = 0
    if window is not None:
        begin = tl.maximum(least - window + 1, 0)
    if chunk is not None:
        begin = least // chunk * chunk
    total, largest, acc = nothing_yet(BLOCK_M, DV)
    if window is None and chunk is None:  # keys that all tokens see need no check
        free = (least + 1) // BLOCK_N * BLOCK_N
        total, largest, acc = attend(
            total, largest, acc, q_first, q_last, begin, free, positions, None, slopes, heads, inside, kv_head, pages,
            keys, values, key_scales, value_scales, keys_stride, keys_head_stride, values_stride, values_head_stride,
            num_kv_heads, scaling, logit_cap, None, None, False, CAPPED, LATENT, PAGE_SIZE, HEAD_DIM, V_DIM, D1, D2,
            DV, BLOCK_N, PRECISION,
        )  # fmt: skip
        begin = free
    total, largest, acc = attend(
        total, largest, acc, q_first, q_last, begin, end, positions, ends, slopes, heads, inside, kv_head, pages, keys,
        values, key_scales, value_scales, keys_stride, keys_head_stride, values_stride, values_head_stride,
        num_kv_heads, scaling, logit_cap, window, chunk, True, CAPPED, LATENT, PAGE_SIZE, HEAD_DIM, V_DIM, D1, D2, DV,
        BLOCK_N, PRECISION,
    )  # fmt: skip
    finish(total, largest, acc, out, row_tokens, heads, inside, num_heads, sinks, V_DIM, DV)
