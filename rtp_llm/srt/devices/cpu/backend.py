"""Attention with C++ kernels, on a CPU."""

import torch

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.devices.cpu import attention as kernels
from rtp_llm.srt.forward_batch import AttentionSpec, ForwardBatch
from rtp_llm.srt.kernels.paged import PagedRows


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
        kernels.compile_now()
        self._rows = PagedRows.of([], [], [])

    def plan(self, batch: ForwardBatch) -> None:
        self._rows = PagedRows.of(
            batch.req_pool_indices,
            batch.extend_prefix_lens_cpu,
            batch.extend_seq_lens_cpu,
            [(prefix.num_tokens, prefix.rows) for prefix in batch.shared_prefixes],
        )

    def step_tensors(self) -> list[torch.Tensor]:
        rows = self._rows
        return [rows.table_rows, rows.starts, rows.counts, rows.shared, rows.members]

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
            kernels.write_kv(k, v, keys, values, batch.out_cache_locs[group], key_scales, value_scales)
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
