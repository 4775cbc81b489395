"""Attention by Triton's kernels. docs/gpu.md says how they work."""

import os
from importlib import import_module
from itertools import chain
from typing import Any

import torch

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.devices.cuda import attention_rows
from rtp_llm.srt.devices.cuda.attention_rows import DecodeRows, ExtendRows, NewTokens, PagedCache, Scores, SharedRows
from rtp_llm.srt.devices.cuda.triton_provider import DTYPES, has_triton
from rtp_llm.srt.forward_batch import AttentionSpec, ForwardBatch, ForwardMode
from rtp_llm.srt.kernels.paged import PagedRows


class TritonAttention(AttentionBackend):
    """Rows of one token are computed by the decoding kernel, which writes their keys and values as well if there are no
    others, and all others by the extending one.

    In a step of decodes, ``forward`` reads the batch's own tensors and what ``plan`` made of shared prefixes: a
    recording serves steps of the same number of rows.
    """

    reads_shared_prefixes = True
    replays = True

    @classmethod
    def problem(cls, torch_device: str, dtype: torch.dtype) -> str | None:
        if not has_triton():
            return "the attention backend 'triton' needs Triton (pip install triton); or use 'torch_native'"
        if torch_device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "the attention backend 'triton' needs a GPU: use 'cpu' or 'torch_native', or leave it unset"
        if dtype in DTYPES:
            return None
        return (
            f"the attention backend 'triton' is for models in float32, bfloat16 and float16, not "
            f"{str(dtype).removeprefix('torch.')}: use 'torch_native'"
        )

    def __init__(self) -> None:
        self._launch = import_module(f"{__package__}.kernels.attention_launch")
        self._write_kv = import_module(f"{__package__}.kernels.cache").write_kv
        self._decode: DecodeRows | None = None
        self._extend: ExtendRows | None = None
        self._shared: SharedRows | None = None
        self._blocks: dict[int, torch.Tensor] = {}  # of the extending rows, by tokens of a block

    def plan(self, batch: ForwardBatch) -> None:
        self._decode = self._extend = self._shared = None
        self._blocks = {}
        rows = batch.req_pool_indices, batch.extend_prefix_lens, batch.extend_start_loc
        if batch.forward_mode == ForwardMode.DECODE:
            self._decode = DecodeRows(*rows)
            self._shared = _shared(batch)
            return
        counts = batch.extend_seq_lens_cpu
        single = [b for b, count in enumerate(counts) if count == 1]
        several = [b for b, count in enumerate(counts) if count > 1]
        if single:
            self._decode = DecodeRows(*_picked(rows, single))
        if several:
            picked = _picked((*rows, batch.extend_seq_lens), several)
            of_rows = tuple(counts[b] for b in several)
            self._extend = ExtendRows(picked[0], picked[1], picked[3], picked[2], of_rows)

    def step_tensors(self) -> list[torch.Tensor]:
        if self._shared is None:
            return []
        return [self._shared.entries, self._shared.members, self._shared.own_starts]

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
        new = None
        if save_kv_cache and k is not None:
            new = NewTokens(k, v, batch.out_cache_locs[group])
        if new is not None and self._extend is not None:
            self._write_kv(new.k, new.v, keys, values, new.slots, key_scales, value_scales)
            new = None
        cache = PagedCache(keys, values, batch.page_tables[group], page_size, key_scales, value_scales)
        scores = Scores(layer.scaling, layer.window, layer.logit_cap, sinks, layer.alibi_slopes, layer.chunk)
        out = torch.empty(len(q), layer.num_heads, layer.v_head_dim, dtype=q.dtype, device=q.device)
        if self._decode is not None:
            sees_all = layer.window is None and layer.chunk is None
            shared = self._shared if sees_all else None
            self._launch.decode(q, out, cache, self._decode, scores, shared, layer.latent, new)
        if self._extend is not None:
            blocks = self._blocks_of(self._launch.tokens_of_block(q, layer.num_kv_heads), q.device)
            self._launch.extend(q, out, cache, self._extend, blocks, scores, batch.visible_ends, layer.latent)
        return out.flatten(1)

    def _blocks_of(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        if num_tokens not in self._blocks:
            assert self._extend is not None, "only extending rows are cut into blocks"
            self._blocks[num_tokens] = self._extend.blocks(num_tokens).to(device, non_blocking=True)
        return self._blocks[num_tokens]


def _picked(columns: tuple[torch.Tensor, ...], rows: list[int]) -> list[torch.Tensor]:
    """The columns' entries of some rows; all of them need no copy."""
    if len(rows) == len(columns[0]):
        return list(columns)
    index = torch.tensor(rows).to(columns[0].device, non_blocking=True)
    return [column[index] for column in columns]


def _shared(batch: ForwardBatch) -> SharedRows | None:
    """Shared prefixes for the kernels, with room for as many as the rows can have; None: there are none."""
    prefixes: Any = batch.shared_prefixes
    if not isinstance(prefixes, list) or not prefixes:  # a step that is being recorded has a placeholder
        return None
    num_rows = batch.batch_size
    ends = [(prefix.num_tokens, prefix.rows) for prefix in prefixes]
    rows = PagedRows.of([0] * num_rows, [0] * num_rows, [1] * num_rows, ends)
    entries, members, own_starts = attention_rows.shared_levels(rows)
    entries += [[0] * 5] * (attention_rows.LEVELS * (num_rows // 2) - len(entries))
    members += [0] * (attention_rows.LEVELS * num_rows - len(members))
    flat = torch.tensor([*chain(*entries), *members, *own_starts], dtype=torch.int32)
    flat = flat.to(batch.positions.device, non_blocking=True)
    parts = flat.split([5 * len(entries), len(members), num_rows])
    return SharedRows(parts[0].view(-1, 5), parts[1], parts[2])
