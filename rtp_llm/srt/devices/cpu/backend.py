"""Attention with C++ kernels, on a CPU."""

from dataclasses import dataclass, field

import numpy as np
import torch

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.devices.cpu import attention as kernels
from rtp_llm.srt.devices.cpu import build
from rtp_llm.srt.devices.cpu.encoder_sizes import rounded_width
from rtp_llm.srt.forward_batch import AttentionSpec, ForwardBatch
from rtp_llm.srt.kernels.paged import PagedRows


@dataclass(slots=True)
class WholeRows:
    """A step's tokens as if they were a cache with pages of one token: an encoder's keys are read where they are made.

    ``table``: [B, longest row or more] int32, the flattened token at each place of a row.
    """

    rows: PagedRows
    table: torch.Tensor
    starts: torch.Tensor  # [T] int64: where each token's row begins in [T]
    lens: torch.Tensor  # [T] int64: the length of its row
    ends: dict[int, torch.Tensor] = field(default_factory=dict)  # by window: the end of what each token sees

    @classmethod
    def of(cls, batch: ForwardBatch) -> "WholeRows":
        counts = np.array(batch.extend_seq_lens_cpu, dtype=np.int64)  # numpy's calls take less time than torch's
        starts = counts.cumsum() - counts
        width = rounded_width(int(counts.max(initial=0)))
        table = (starts[:, None] + np.arange(width)).astype(np.int32)
        rows = PagedRows(*(torch.from_numpy(x.astype(np.int32)) for x in (np.arange(len(counts)), 0 * counts, counts)))
        begins, lens = torch.from_numpy(starts.repeat(counts)), torch.from_numpy(counts.repeat(counts))
        return cls(rows, torch.from_numpy(table), begins, lens)

    def visible_ends(self, window: int | None) -> torch.Tensor:
        """Return [T] int64 positions before which each token sees, within its row."""
        if window is None:
            return self.lens
        if window not in self.ends:
            places = torch.arange(len(self.starts)) - self.starts
            self.ends[window] = torch.minimum(self.lens, places + window)
        return self.ends[window]


class CpuAttention(AttentionBackend):
    """Attention by kernels that read the page tables: a step's metadata is three numbers per row, for all layers."""

    reads_shared_prefixes = True
    replays = True

    @classmethod
    def problem(cls, torch_device: str, dtype: torch.dtype) -> str | None:
        if torch_device == "cpu" and dtype in kernels.STORED:
            return None
        known = ", ".join(str(known).removeprefix("torch.") for known in kernels.STORED)
        return (
            f"the attention backend 'cpu' is for models in {known} on a CPU, not {str(dtype).removeprefix('torch.')} "
            f"on {torch_device}: use 'torch_native', or leave it unset"
        )

    def __init__(self) -> None:
        build.load("probe")  # raises KernelBuildError where none compile
        self._rows = PagedRows.of([], [], [])
        self._whole_rows: WholeRows | None = None
        self._encodes = False  # from the first call of forward_encoder on

    def plan(self, batch: ForwardBatch) -> None:
        self._whole_rows = WholeRows.of(batch) if self._encodes else None
        if self._encodes and not batch.kv_pool.groups:
            return  # no layer has a cache
        self._rows = PagedRows.of(
            batch.req_pool_indices,
            batch.extend_prefix_lens_cpu,
            batch.extend_seq_lens_cpu,
            [(prefix.num_tokens, prefix.rows) for prefix in batch.shared_prefixes],
        )

    def step_tensors(self) -> list[torch.Tensor]:
        whole = self._whole_rows
        own = [] if whole is None else [whole.table, whole.starts, whole.lens]
        every = [self._rows] if whole is None else [self._rows, whole.rows]
        of_rows = [x for rows in every for x in (rows.table_rows, rows.starts, rows.counts, rows.shared, rows.members)]
        return [*of_rows, *own]

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: AttentionSpec,
        batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        group, page_size, keys, values, key_scales, value_scales = batch.kv_pool.layer(layer.layer_id)
        if save_kv_cache and k is not None:
            self.write(k, v, layer, batch)
        out = kernels.paged_attention(
            q,
            keys,
            values,
            batch.page_tables[group],
            page_size,
            self._rows,
            layer.scaling,
            layer.window,
            layer.logit_cap,
            sinks,
            batch.visible_ends,
            key_scales,
            value_scales,
            layer.alibi_slopes,
            layer.chunk,
        )
        return out.flatten(1)

    def write(self, k: torch.Tensor, v: torch.Tensor | None, layer: AttentionSpec, batch: ForwardBatch) -> None:
        group, _, keys, values, key_scales, value_scales = batch.kv_pool.layer(layer.layer_id)
        kernels.write_kv(k, v, keys, values, batch.out_cache_locs[group], key_scales, value_scales)

    def forward_encoder(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: AttentionSpec, batch: ForwardBatch
    ) -> torch.Tensor:
        """See AttentionBackend: the paged kernel, with the step's own keys and values for a cache."""
        self._encodes = True
        whole = self._whole_rows = self._whole_rows or WholeRows.of(batch)
        out = kernels.paged_attention(
            q,
            k,
            v,
            whole.table,
            1,
            whole.rows,
            layer.scaling,
            layer.window,
            layer.logit_cap,
            visible_ends=whole.visible_ends(layer.window),
        )
        return out.flatten(1)
