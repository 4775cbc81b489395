"""Sizes of steps with prompts: dummies after them, as in encoder_sizes.py, for models that keep keys and values.

They are tokens of a row of their own, which has a page that no request owns: all write and read there, whatever their
positions. They are never sampled.
"""

from dataclasses import replace

import torch
from torch.nn.functional import pad

from rtp_llm.srt.devices.cpu.encoder_sizes import multiple_of
from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.kv_pool import slots_of
from rtp_llm.srt.worker.columns import mode_of


def with_dummies(batch: ForwardBatch, dummy_row: int) -> ForwardBatch:
    """Return the batch with a row of dummies, so many that it has as many tokens as other steps; as it is, if it has.

    Args:
        dummy_row: its place in the page tables.
    """
    num_tokens = batch.num_tokens
    count = -num_tokens % multiple_of(num_tokens)
    if not count:
        return batch
    positions, row, number = torch.arange(count), torch.tensor([dummy_row]), torch.tensor([count])
    ids = batch.input_ids
    return replace(
        batch,
        forward_mode=mode_of([*batch.extend_seq_lens_cpu, count]),
        batch_size=batch.batch_size + 1,
        input_ids=pad(ids, (0, count)),
        positions=torch.cat([batch.positions, positions]),
        req_pool_indices=torch.cat([batch.req_pool_indices, row]),
        seq_lens=torch.cat([batch.seq_lens, number]),
        extend_prefix_lens=pad(batch.extend_prefix_lens, (0, 1)),
        extend_seq_lens=torch.cat([batch.extend_seq_lens, number]),
        extend_start_loc=torch.cat([batch.extend_start_loc, torch.tensor([num_tokens])]),
        seq_lens_cpu=[*batch.seq_lens_cpu, count],
        extend_prefix_lens_cpu=[*batch.extend_prefix_lens_cpu, 0],
        extend_seq_lens_cpu=[*batch.extend_seq_lens_cpu, count],
        prompt_lens_cpu=[*batch.prompt_lens_cpu, count],
        out_cache_locs=[
            torch.cat([slots, slots_of(table, row, positions, group.page_size)])
            for slots, table, group in zip(batch.out_cache_locs, batch.page_tables, batch.kv_pool.groups, strict=True)
        ],
        token_types=None if batch.token_types is None else pad(batch.token_types, (0, count)),
    )
