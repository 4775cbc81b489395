"""Penalties, masks, biases and bans in Triton, in one launch, and counts of what was drawn in another.

A program has one row of logits. It changes all of them, then cells of the result, which a barrier makes visible to all
of its threads. Numbers are rounded where plain torch rounds them (``worker/adjust_table.py``), to the last bit.
"""

import torch
import triton
import triton.language as tl

from rtp_llm.srt.worker import adjust_table
from rtp_llm.srt.worker.adjust_table import AdjustTable

BLOCK = 4096
IN_PROMPT = tl.constexpr(adjust_table.IN_PROMPT)
ANY = tl.constexpr(adjust_table.ANY)
LARGEST = tl.constexpr(adjust_table.LARGEST)
LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def _penalised(x: tl.tensor, count: tl.tensor, penalties: tl.tensor) -> tl.tensor:
    frequency, presence, repetition = tl.load(penalties), tl.load(penalties + 1), tl.load(penalties + 2)
    generated = (count & (IN_PROMPT - 1)).to(tl.float32)
    x = x - generated * frequency
    x = x - tl.where(generated > 0.0, presence, 0.0)
    repeated = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
    return tl.where(count > 0, repeated, x)


@triton.jit
def _is_allowed(words: tl.tensor, ids: tl.tensor, inside: tl.tensor) -> tl.tensor:
    word = tl.load(words + ids // 32, mask=inside, other=0)
    return ((word >> (ids % 32)) & 1) != 0


@triton.jit
def _clamped_largest(row: tl.tensor, vocab_size: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """The row's largest number; what is larger than float32's largest becomes that."""
    largest = tl.full([BLOCK], LOWEST, tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(row + ids, mask=ids < vocab_size, other=LOWEST)
        largest = tl.where((x > largest) | (x != x), x, largest)
        tl.store(row + ids, tl.full([BLOCK], LARGEST, tl.float32), mask=(ids < vocab_size) & (x > LARGEST))
    return tl.max(tl.where(largest != largest, LARGEST, largest), 0)


@triton.jit
def _ban(row: tl.tensor, ids: tl.tensor, banned: tl.tensor, vocab_size: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Set ids to -inf, unless the row would have no other number left."""
    before = tl.load(row + ids, mask=banned, other=0.0)
    tl.debug_barrier()
    tl.store(row + ids, tl.full(ids.shape, LOWEST, tl.float32), mask=banned)
    tl.debug_barrier()
    largest = _clamped_largest(row, vocab_size, BLOCK)
    tl.debug_barrier()
    is_empty = tl.zeros(ids.shape, tl.float32) + largest == LOWEST
    tl.store(row + ids, tl.minimum(before, LARGEST), mask=banned & is_empty)
    tl.debug_barrier()


@triton.jit
def _add_biases(row: tl.tensor, ids: tl.tensor, values: tl.tensor, num: tl.tensor, BIASES: tl.constexpr) -> None:
    places = tl.arange(0, BIASES)
    there = places < num
    at = row + tl.load(ids + places, mask=there, other=0)
    x = tl.load(at, mask=there, other=0.0) + tl.load(values + places, mask=there, other=0.0)
    tl.store(at, x, mask=there)
    tl.debug_barrier()


# long: half of it is the signature, an argument a line
@triton.jit
def _adjust_kernel(
    logits: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    positions: tl.tensor,
    penalties: tl.tensor,
    counts: tl.tensor,
    allowed: tl.tensor,
    bias_ids: tl.tensor,
    bias_values: tl.tensor,
    stop_ids: tl.tensor,
    beginnings: tl.tensor,
    ends: tl.tensor,
    last_tokens: tl.tensor,
    sizes: tl.tensor,
    mask_lines: tl.tensor,
    words: tl.tensor,
    vocab_size: tl.tensor,
    stride: tl.tensor,
    num_words: tl.tensor,
    BLOCK: tl.constexpr,
    BIASES: tl.constexpr,
    STOPS: tl.constexpr,
    WORDS: tl.constexpr,
    LENGTH: tl.constexpr,
) -> None:
    line = tl.program_id(0).to(tl.int64)
    row, position = tl.load(rows + line), tl.load(positions + line)
    is_counted, num_biases = tl.load(sizes + row * 5), tl.load(sizes + row * 5 + 1)
    num_stops, num_bad, first_end = (
        tl.load(sizes + row * 5 + 2), tl.load(sizes + row * 5 + 3), tl.load(sizes + row * 5 + 4)
    )  # fmt: skip
    source, target = logits + line * stride, out + line * vocab_size
    mask_line = tl.full([], -1, tl.int64)
    if mask_lines is not None:
        mask_line = tl.load(mask_lines + line)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        inside = ids < vocab_size
        x = tl.load(source + ids, mask=inside, other=LOWEST)
        if is_counted != 0:
            count = tl.load(counts + row * vocab_size + ids, mask=inside, other=0)
            x = _penalised(x, count, penalties + row * 3)
        x = tl.where(_is_allowed(allowed + row * num_words, ids, inside), x, LOWEST)
        if mask_lines is not None:
            is_free = tl.zeros([BLOCK], tl.int64) + mask_line < 0
            x = tl.where(is_free | _is_allowed(words + mask_line * num_words, ids, inside & ~is_free), x, LOWEST)
        tl.store(target + ids, x, mask=inside)
    tl.debug_barrier()
    if num_biases > 0:
        _add_biases(target, bias_ids + row * BIASES, bias_values + row * BIASES, num_biases, BIASES)
    words_of_row = tl.arange(0, WORDS)
    same = words_of_row < num_bad
    if num_bad > 0:
        for i in range(LENGTH):
            token = tl.load(beginnings + (row * WORDS + words_of_row) * LENGTH + i, mask=same, other=ANY)
            same &= (token == ANY) | (token == tl.load(last_tokens + row * LENGTH + i))
    _ban(target, tl.load(ends + row * WORDS + words_of_row, mask=same, other=0), same, vocab_size, BLOCK)
    stops_of_row = tl.arange(0, STOPS)
    is_stop = stops_of_row < num_stops
    if (position < first_end) & (num_stops > 0):
        stops = tl.load(stop_ids + row * STOPS + stops_of_row, mask=is_stop, other=0)
        _ban(target, stops, is_stop, vocab_size, BLOCK)


def adjust_rows(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    table: AdjustTable,
    mask_lines: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``adjust_table.adjust_rows``."""
    num_rows, vocab_size = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=logits.device)
    if num_rows:
        _adjust_kernel[(num_rows,)](
            logits, out, rows, positions, table.penalties, table.counts, table.allowed, table.bias_ids,
            table.bias_values, table.stop_ids, table.beginnings, table.ends, table.last_tokens, table.sizes, mask_lines,
            words, vocab_size, logits.stride(0), table.allowed.shape[1],
            BLOCK=max(64, min(BLOCK, triton.next_power_of_2(vocab_size))), BIASES=adjust_table.MOST_BIASES,
            STOPS=adjust_table.MOST_STOPS, WORDS=adjust_table.MOST_WORDS, LENGTH=adjust_table.MOST_LENGTH,
            num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def _count_kernel(
    rows: tl.tensor,
    tokens: tl.tensor,
    counts: tl.tensor,
    last_tokens: tl.tensor,
    sizes: tl.tensor,
    vocab_size: tl.tensor,
    LENGTH: tl.constexpr,
) -> None:
    line = tl.program_id(0)
    row, token = tl.load(rows + line), tl.load(tokens + line)
    tl.atomic_add(counts + row * vocab_size + token, 1, mask=tl.load(sizes + row * 5) != 0)
    places = tl.arange(0, LENGTH)
    newest = tl.load(last_tokens + row * LENGTH + places + 1, mask=places + 1 < LENGTH, other=0)
    newest = tl.where(places + 1 == LENGTH, token, newest)
    tl.debug_barrier()
    tl.store(last_tokens + row * LENGTH + places, newest)


def count_rows(rows: torch.Tensor, tokens: torch.Tensor, table: AdjustTable) -> None:
    """See ``adjust_table.count_rows``."""
    if len(rows):
        _count_kernel[(len(rows),)](
            rows, tokens, table.counts, table.last_tokens, table.sizes, table.counts.shape[1],
            LENGTH=adjust_table.MOST_LENGTH, num_warps=1,
        )  # fmt: skip
