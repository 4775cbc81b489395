"""Batches of rows that go on by a token each, made on the device alone: what recorded steps begin with."""

from dataclasses import dataclass
from typing import Any

import torch

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.forward_batch import ForwardBatch, ForwardMode
from rtp_llm.srt.kv_pool import KVPool, slots_of
from rtp_llm.srt.multimodal.embedding_cache import EmbeddingCache
from rtp_llm.srt.plan import RowWork, SharedPrefix
from rtp_llm.srt.worker.replayable import Unknown
from rtp_llm.srt.worker.states import RowStates

UNKNOWN = (
    "seq_lens_cpu",
    "extend_prefix_lens_cpu",
    "prompt_lens_cpu",
)  # lists of the host that differ from step to step


@dataclass(frozen=True, slots=True)
class DecodeBatches:
    """Makes such batches of what the runner keeps for each row.

    Args:
        last_tokens: [rows] int64; page_tables: see ForwardBatch.
        mrope_deltas: [rows] int64, from a token's place in its sequence to its M-RoPE position; None: the model has no
            such positions.
    """

    last_tokens: torch.Tensor
    page_tables: list[torch.Tensor]
    kv_pool: KVPool
    attn_backend: AttentionBackend
    embedding_cache: EmbeddingCache
    states: RowStates | None
    mrope_deltas: torch.Tensor | None

    def make(self, rows: torch.Tensor, positions: torch.Tensor) -> ForwardBatch:
        """Return the batch in which each of ``rows`` [B] computes its last token, at ``positions`` [B].

        Lists that the host has for other steps are placeholders, which refuse to be read.
        """
        places = torch.arange(len(rows), device=rows.device)
        unknown: dict[str, Any] = {name: Unknown(name) for name in UNKNOWN}
        return ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=len(rows),
            input_ids=self.last_tokens[rows],
            positions=positions,
            req_pool_indices=rows,
            seq_lens=positions + 1,
            extend_prefix_lens=positions,
            extend_seq_lens=torch.ones_like(rows),
            extend_start_loc=places,
            extend_seq_lens_cpu=[1] * len(rows),
            page_tables=self.page_tables,
            out_cache_locs=[
                slots_of(table, rows, positions, group.page_size)
                for table, group in zip(self.page_tables, self.kv_pool.groups, strict=True)
            ],
            kv_pool=self.kv_pool,
            attn_backend=self.attn_backend,
            sample_rows=places,
            embedding_cache=self.embedding_cache,
            mrope_positions=None if self.mrope_deltas is None else (positions + self.mrope_deltas[rows]).repeat(3, 1),
            state_pool=None if self.states is None else self.states.pool,
            state_waves=[] if self.states is None else [self.states.wave_on_device(rows)],
            **unknown,
        )


def in_batch(prefixes: list[SharedPrefix], work: list[RowWork]) -> list[SharedPrefix]:
    """Return shared prefixes with rows of the batch in place of the worker's."""
    if not prefixes:
        return []
    places = {w.row: place for place, w in enumerate(work)}
    return [SharedPrefix(prefix.num_tokens, [places[row] for row in prefix.rows]) for prefix in prefixes]
