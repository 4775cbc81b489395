"""Greedy choices, masks and draws in Triton, without a sort of the vocabulary and without the host.

A draw is an exponential race (``worker/sampler.py``): the token with the smallest number divided by weight wins. The
winner among all tokens, if top_p keeps it, is the winner among those that top_p keeps. Otherwise all that rank below it
are dropped with it, and the race is run among the others (as in FlashInfer's sampling by rejection, 2025): mostly one
race suffices. Weights and sums are in float64, as on the host, so that both draw the same tokens.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from rtp_llm.srt.kernels import reference
from rtp_llm.srt.sampling_params import SamplingParams

BLOCK = 4096  # logits that are read at once
MOST_PARTS = 64  # of a row whose largest logit is looked for
LOWEST, LARGEST = tl.constexpr(float("-inf")), tl.constexpr(float("inf"))
NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _largest_of_parts_kernel(
    logits: tl.tensor,
    values: tl.tensor,
    places: tl.tensor,
    vocab_size: tl.tensor,
    stride: tl.tensor,
    blocks_of_part: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    best = tl.full([BLOCK], LOWEST, tl.float32)
    best_at = tl.full([BLOCK], NO_TOKEN, tl.int32)
    for block in range(blocks_of_part):
        ids = (part * blocks_of_part + block) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + ids, mask=ids < vocab_size, other=LOWEST)
        x = tl.where(x == x, x, LARGEST)  # a NaN makes the row bad, as an infinite logit does
        better = (x > best) | ((best_at == NO_TOKEN) & (ids < vocab_size))
        best, best_at = tl.where(better, x, best), tl.where(better, ids, best_at)
    largest = tl.max(best, 0)
    tl.store(values + row * num_parts + part, largest)
    tl.store(places + row * num_parts + part, tl.min(tl.where(best == largest, best_at, NO_TOKEN), 0))


@triton.jit
def _largest_kernel(
    values: tl.tensor, places: tl.tensor, tokens: tl.tensor, bad: tl.tensor, num_parts: tl.tensor, PARTS: tl.constexpr
) -> None:
    row, parts = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    x = tl.load(values + row * num_parts + parts, mask=parts < num_parts, other=LOWEST)
    at = tl.load(places + row * num_parts + parts, mask=parts < num_parts, other=NO_TOKEN)
    largest = tl.max(x, 0)
    token = tl.min(tl.where(x == largest, at, NO_TOKEN), 0)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(bad + row, (largest == LARGEST) | (largest == LOWEST))


def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.argmax``; the token of a bad row is any."""
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or not logits.shape[1]:
        return reference.argmax(logits)
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    bad = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    if not num_rows:
        return tokens, bad
    blocks = triton.cdiv(vocab_size, BLOCK)
    blocks_of_part = triton.cdiv(blocks, MOST_PARTS)
    num_parts = triton.cdiv(blocks, blocks_of_part)
    values = torch.empty(num_rows, num_parts, dtype=torch.float32, device=logits.device)
    places = torch.empty(num_rows, num_parts, dtype=torch.int32, device=logits.device)
    _largest_of_parts_kernel[(num_rows, num_parts)](
        logits, values, places, vocab_size, logits.stride(0), blocks_of_part, BLOCK=BLOCK, num_warps=8
    )
    _largest_kernel[(num_rows,)](
        values, places, tokens, bad, num_parts, PARTS=triton.next_power_of_2(num_parts), num_warps=1
    )
    return tokens, bad


@triton.jit
def _mask_kernel(
    logits: tl.tensor,
    lines: tl.tensor,
    words: tl.tensor,
    vocab_size: tl.tensor,
    stride: tl.tensor,
    words_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = tl.load(lines + row).to(tl.int64)
    word = tl.load(words + row.to(tl.int64) * words_stride + ids // 32, mask=ids < vocab_size, other=0)
    banned = ((word >> (ids % 32)) & 1) == 0
    tl.store(logits + line * stride + ids, tl.full([BLOCK], LOWEST, tl.float32), mask=banned & (ids < vocab_size))


def mask_tokens(logits: torch.Tensor, lines: torch.Tensor, words: torch.Tensor) -> None:
    """See ``reference.mask_tokens``."""
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or words.stride(1) != 1:
        reference.mask_tokens(logits, lines, words)
        return
    grid = (len(lines), triton.cdiv(logits.shape[1], BLOCK))
    if len(lines) and logits.shape[1]:
        _mask_kernel[grid](
            logits, lines, words, logits.shape[1], logits.stride(0), words.stride(0), BLOCK=BLOCK, num_warps=8
        )


@triton.jit
def _exponential(
    counters: tl.tensor, word: tl.constexpr, seed: tl.tensor, low: tl.tensor, high: tl.tensor
) -> tl.tensor:
    """Numbers of one word of each counter: ``worker/philox.py`` in float64."""
    upper = tl.philox(seed, low, high, counters, tl.zeros_like(counters))[word]
    lower = tl.philox(seed, low, high, counters, tl.zeros_like(counters) + 1)[word]
    u = upper.to(tl.uint32).to(tl.float64) * 2.3283064365386963e-10
    u += (lower.to(tl.uint32).to(tl.float64) + 0.5) * 5.421010862427522e-20
    rest = 1.0 - u  # -log1p(-u), of a u of any size: log(rest) / (rest - 1) is as right as its arguments are equal
    return tl.where(rest == 1.0, u, u * tl.log(rest) / tl.where(rest == 1.0, -1.0, rest - 1.0))


@triton.jit
def _cutoff(
    row: tl.tensor, vocab_size: tl.tensor, top_k: tl.tensor, largest: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The k-th largest logit, found by halving the numbers between the bits of two: equal ones count several times."""
    low, high = tl.full([], -0x80000000, tl.int64), _ordered(largest).to(tl.int64)  # at least k are >= low
    while low < high:
        middle = (low + high + 1) >> 1
        count = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = tl.load(row + ids, mask=ids < vocab_size, other=LOWEST)
            count += ((_ordered(x).to(tl.int64) >= middle) & (ids < vocab_size)).to(tl.int32)
        if tl.sum(count, 0) >= top_k:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _ordered(x: tl.tensor) -> tl.tensor:
    """int32 in the order of float32."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _weight(x: tl.tensor, largest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    return tl.exp((x.to(tl.float64) - largest.to(tl.float64)) / temperature)


@triton.jit
def _weights(
    row: tl.tensor,
    ids: tl.tensor,
    inside: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    lowest: tl.tensor,
) -> tl.tensor:
    """Weights of tokens in float64, zero for those that top_k drops."""
    x = tl.load(row + ids, mask=inside, other=LOWEST)
    kept = inside & (_ordered(x).to(tl.int64) >= lowest)
    return tl.where(kept, _weight(x, largest, temperature), 0.0)


@triton.jit
def _draw_kernel(
    logits: tl.tensor,
    lines: tl.tensor,
    tokens: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    min_ps: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    vocab_size: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    draw = tl.program_id(0)
    line = draw.to(tl.int64)
    if lines is not None:
        line = tl.load(lines + draw).to(tl.int64)
    row = logits + line * stride
    temperature, top_p, min_p = tl.load(temperatures + draw), tl.load(top_ps + draw), tl.load(min_ps + draw)
    top_k, seed, position = tl.load(top_ks + draw), tl.load(seeds + draw), tl.load(positions + draw)
    best = tl.full([BLOCK], LOWEST, tl.float32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(row + ids, mask=ids < vocab_size, other=LOWEST)
        best = tl.maximum(best, tl.where(x == x, x, LOWEST))
    largest = tl.max(best, 0)
    lowest = tl.full([], -0x80000000, tl.int64)
    if (top_k > 0) & (top_k < vocab_size):
        lowest = _cutoff(row, vocab_size, top_k, largest, BLOCK)
    limit = tl.full([], LARGEST, tl.float64)  # mass of more probable tokens that drops a token
    if top_p < 1.0:
        sums = tl.zeros([BLOCK], tl.float64)
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            sums += _weights(row, ids, ids < vocab_size, largest, temperature, lowest)
        limit = top_p * tl.sum(sums, 0)
    bound_weight, bound_token = tl.full([], -1.0, tl.float64), tl.full([], NO_TOKEN, tl.int32)
    token = tl.full([], 0, tl.int32)
    going = tl.full([], 1, tl.int32)
    while going != 0:
        token = _race(
            row, vocab_size, largest, temperature, lowest, min_p, bound_weight, bound_token, seed, position, BLOCK // 4
        )
        going = tl.full([], 0, tl.int32)
        if limit < LARGEST:
            weight = _weight(tl.load(row + token), largest, temperature)
            sums = tl.zeros([BLOCK], tl.float64)
            for start in range(0, vocab_size, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                weights = _weights(row, ids, ids < vocab_size, largest, temperature, lowest)
                before = (weights > weight) | ((weights == weight) & (ids < token))
                sums += tl.where(before, weights, 0.0)
            mass = tl.sum(sums, 0)
            if (mass >= limit) & (mass > 0.0):
                bound_weight, bound_token, going = weight, token, tl.full([], 1, tl.int32)
    tl.store(tokens + draw, token.to(tl.int64))


@triton.jit
def _race(
    row: tl.tensor,
    vocab_size: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    lowest: tl.tensor,
    min_p: tl.tensor,
    bound_weight: tl.tensor,
    bound_token: tl.tensor,
    seed: tl.tensor,
    position: tl.tensor,
    COUNTERS: tl.constexpr,
) -> tl.tensor:
    """The winner among tokens that rank above the bound: more weight, or as much and a lower id."""
    best = tl.full([COUNTERS], LARGEST, tl.float64)
    best_at = tl.full([COUNTERS], NO_TOKEN, tl.int32)
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for start in range(0, vocab_size, 4 * COUNTERS):
        counters = start // 4 + tl.arange(0, COUNTERS)
        for word in tl.static_range(4):
            ids = counters // 16 * 64 + word * 16 + counters % 16
            weights = _weights(row, ids, ids < vocab_size, largest, temperature, lowest)
            above = (weights > bound_weight) | ((weights == bound_weight) & (ids < bound_token))
            kept = above & (weights > 0.0) & (weights >= min_p)
            numbers = _exponential(counters.to(tl.uint32), word, seed, low, high) / tl.where(kept, weights, 1.0)
            better = kept & ((numbers < best) | ((numbers == best) & (ids < best_at)))
            best, best_at = tl.where(better, numbers, best), tl.where(better, ids, best_at)
    smallest = tl.min(best, 0)
    token = tl.min(tl.where(best == smallest, best_at, NO_TOKEN), 0)
    return tl.where(token == NO_TOKEN, 0, token)


def draw_rows(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    lines: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw a token for each set of parameters, which lie on the device; see ``draw`` in ``worker/sampler.py``.

    Args:
        logits: [S, vocab_size] float32; of a row without a finite maximum the token means nothing.
        temperature, top_p, min_p: [D] float64; top_p 1 and more: all tokens.
        top_k, seeds, positions: [D] int64; top_k 0, or the vocabulary's size: all tokens.
        lines: [D], the line of logits of each draw; None: one after the other.

    Returns:
        [D] int64.
    """
    tokens = torch.empty(len(seeds), dtype=torch.int64, device=logits.device)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    columns = [x.contiguous() for x in (temperature, top_k, top_p, min_p, seeds, positions)]
    if len(tokens):
        _draw_kernel[(len(tokens),)](
            logits,
            lines,
            tokens,
            *columns,
            logits.shape[1],
            logits.stride(0),
            BLOCK=max(64, min(BLOCK, triton.next_power_of_2(logits.shape[1]))),
            num_warps=8,
        )
    return tokens


def draw(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    seeds: torch.Tensor,
    positions: torch.Tensor,
    lines: Sequence[int] | None = None,
) -> torch.Tensor:
    """``draw_rows`` by parameters of the host; ``lines``: the line of logits of each draw."""
    device = logits.device
    real = torch.tensor([[p.temperature, p.top_p, p.min_p] for p in params], dtype=torch.float64).view(-1, 3)
    whole = torch.tensor([[p.top_k, i if lines is None else lines[i]] for i, p in enumerate(params)]).view(-1, 2)
    if device.type != "cpu":
        real, whole = real.pin_memory(), whole.pin_memory()
    temperature, top_p, min_p = real.to(device, non_blocking=True).unbind(1)
    top_k, of_logits = whole.to(device, non_blocking=True).unbind(1)
    return draw_rows(logits, temperature, top_k, top_p, min_p, seeds, positions, of_logits.contiguous())
