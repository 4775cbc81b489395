"""Sizes of an encoder's steps: dummies after the inputs, so that few sizes occur, and each often enough to be recorded.
prompt_sizes.py has those of steps with prompts.

Inputs of unequal lengths make a step of as many tokens as they happen to have. Up to a thirty-second more of them lets
it be a step of a size that was recorded before, whose replay saves more than the dummies cost.
"""

from dataclasses import replace

import torch
from torch.nn.functional import pad

from rtp_llm.srt.forward_batch import ForwardBatch

LEAST_TOKENS = 64  # fewer are of a single input, mostly, and have few sizes anyway
ROWS = 4  # numbers of rows are multiples of it
WIDTH = 32  # the longest row counts as a multiple of it


def with_dummies(batch: ForwardBatch) -> ForwardBatch:
    """Return the batch with rows and tokens up to the next size; as it is, if it has that size or is small.

    Dummies are token 0 at position 0, one in each dummy row, and the rest of them in the first. Where all tokens are
    pooled, so are they.
    """
    num_tokens, pooled = batch.num_tokens, batch.pooled_tokens
    if num_tokens < LEAST_TOKENS or pooled is None or batch.mrope_positions is not None:
        return batch
    multiple = multiple_of(num_tokens)
    rows = _up(batch.batch_size + (num_tokens % multiple > 0), ROWS) - batch.batch_size
    if not rows:
        return batch
    tokens = _up(num_tokens + rows, multiple) - num_tokens
    counts, zeros = [tokens - rows + 1] + [1] * (rows - 1), [0] * rows
    ends = batch.visible_ends
    dummies = torch.tensor(counts)
    return replace(
        batch,
        batch_size=batch.batch_size + rows,
        input_ids=pad(batch.input_ids, (0, tokens)),
        positions=pad(batch.positions, (0, tokens)),
        req_pool_indices=pad(batch.req_pool_indices, (0, rows)),
        seq_lens=torch.cat([batch.seq_lens, dummies]),
        extend_prefix_lens=pad(batch.extend_prefix_lens, (0, rows)),
        extend_seq_lens=torch.cat([batch.extend_seq_lens, dummies]),
        extend_start_loc=torch.cat([batch.extend_start_loc, num_tokens + dummies.cumsum(0) - dummies]),
        seq_lens_cpu=batch.seq_lens_cpu + counts,
        extend_prefix_lens_cpu=batch.extend_prefix_lens_cpu + zeros,
        extend_seq_lens_cpu=batch.extend_seq_lens_cpu + counts,
        prompt_lens_cpu=batch.prompt_lens_cpu + counts,
        visible_ends=None if ends is None else pad(ends, (0, tokens), value=tokens),
        token_types=None if batch.token_types is None else pad(batch.token_types, (0, tokens)),
        pooled_tokens=torch.arange(num_tokens + tokens) if len(pooled) == num_tokens else pooled,
    )


def multiple_of(num_tokens: int) -> int:
    """Return the number of which numbers of tokens about as large are multiples: at most a thirty-second of them."""
    return 1 << max(0, num_tokens.bit_length() - 6)


def rounded_width(longest: int) -> int:
    """Return the width of a table of rows, the longest of which has so many tokens."""
    return _up(longest, WIDTH)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
