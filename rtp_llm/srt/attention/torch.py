"""Attention in plain torch, on any device. Slower than kernels, which are compared with it."""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.forward_batch import AttentionSpec, ForwardBatch
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kernels.paged import first_visible
from rtp_llm.srt.kv_pool import LayerCache, slots_of


@dataclass(slots=True)
class DecodeBucket:
    """Rows of one token each with similar lengths, gathered together and padded to the longest."""

    token_rows: torch.Tensor  # [B] indices of their tokens in the batch
    slots: torch.Tensor  # [B, L] cache slots, padded with the dummy page
    visible: torch.Tensor  # [B, 1, 1, L] bool


@dataclass(slots=True)
class ExtendRow:
    """One row of several tokens."""

    start: int  # its tokens are [start, end) of the batch
    end: int
    slots: torch.Tensor  # [L] cache slots of every key that some query sees
    visible: torch.Tensor | None  # [n, L] bool; None: plain causal, no history
    q_offset: int  # position of the first query among the L keys
    visible_ends: torch.Tensor | None  # [n] int64, positions among the L keys; None: causal


@dataclass(slots=True)
class StepLayout:
    """The metadata of a step for layers with one cache group and window."""

    decode: list[DecodeBucket]
    extend: list[ExtendRow]


# Query-key pairs whose scores are computed explicitly (see _needs_scores) at a time: 64 MiB.
SCORES_PER_PIECE = 1 << 24


class TorchAttention(AttentionBackend):
    def __init__(self) -> None:
        # cuDNN makes a plan for every new length, and keys get longer with each step.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._layouts: dict[tuple[int, int | None, int | None, bool], StepLayout] = {}

    def plan(self, batch: ForwardBatch) -> None:
        self._layouts = {}

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
        cache = batch.kv_pool.layer(layer.layer_id)
        if save_kv_cache and k is not None:
            batch.kv_pool.write(layer.layer_id, batch.out_cache_locs[cache.group], k, v)
        layout = self._layout(batch, cache.group, layer)
        out = q.new_empty(q.shape[0], layer.num_heads, layer.v_head_dim)
        for bucket in layout.decode:
            out[bucket.token_rows] = _decode(q[bucket.token_rows], cache, bucket, layer, sinks)
        for row in layout.extend:
            out[row.start : row.end] = _extend(q[row.start : row.end], cache, row, layer, sinks)
        return out.flatten(1)

    def _layout(self, batch: ForwardBatch, group: int, layer: AttentionSpec) -> StepLayout:
        """Return the layout, made by the first layer of each group and window or chunk, then shared by all that see as
        far ahead."""
        key = (group, layer.window, layer.chunk, batch.visible_ends is None)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = _layout(batch, group, layer.window, layer.chunk)
        return layout


def _layout(batch: ForwardBatch, group: int, window: int | None, chunk: int | None) -> StepLayout:
    """Make a layout; rows of one token are grouped by the number of keys that they see, within a factor of two."""
    table, page_size = batch.page_tables[group], batch.kv_pool.groups[group].page_size
    device = table.device
    buckets: dict[int, list[tuple[int, int, int, int]]] = {}
    extend: list[ExtendRow] = []
    token = 0
    rows = batch.req_pool_indices
    for b, num_tokens in enumerate(batch.extend_seq_lens_cpu):
        seq_len, prefix_len = batch.seq_lens_cpu[b], batch.extend_prefix_lens_cpu[b]
        first = first_visible(prefix_len, window, chunk)
        if num_tokens == 1:
            buckets.setdefault((seq_len - first).bit_length(), []).append((b, token, first, seq_len))
        else:
            positions = torch.arange(first, seq_len, device=device)
            slots = slots_of(table, rows[b].expand(len(positions)), positions, page_size)
            ends = None if batch.visible_ends is None else batch.visible_ends[token : token + num_tokens] - first
            visible = _visible(prefix_len - first, seq_len - first, window, chunk, ends, device)
            extend.append(ExtendRow(token, token + num_tokens, slots, visible, prefix_len - first, ends))
        token += num_tokens
    decode = [_bucket(members, table, rows, page_size) for members in buckets.values()]
    return StepLayout(decode, extend)


def _bucket(
    members: list[tuple[int, int, int, int]], table: torch.Tensor, rows: torch.Tensor, page_size: int
) -> DecodeBucket:
    device = table.device
    indices, tokens, first, end = torch.tensor(members, device=device).unbind(1)
    longest = max(m[3] - m[2] for m in members)
    positions = first[:, None] + torch.arange(longest, device=device)
    visible = positions < end[:, None]
    positions = torch.where(visible, positions, first[:, None])
    slots = slots_of(table, rows[indices][:, None].expand_as(positions), positions, page_size)
    return DecodeBucket(tokens, torch.where(visible, slots, 0), visible[:, None, None, :])


def _visible(
    q_offset: int,
    num_keys: int,
    window: int | None,
    chunk: int | None,
    visible_ends: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor | None:
    """[n, L] bool: whether a query sees a key, of L = ``num_keys``; queries are the positions from ``q_offset`` on.
    The first key begins a chunk, where there are chunks.

    None: plain causal, no history.
    """
    if q_offset == 0 and visible_ends is None and min(window or num_keys, chunk or num_keys) >= num_keys:
        return None
    queries = torch.arange(q_offset, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)[None, :]
    visible = keys <= queries
    if visible_ends is not None:
        visible |= keys < visible_ends[:, None]
    if window is not None:
        visible &= keys > queries - window
    if chunk is not None:
        visible &= keys >= queries // chunk * chunk
    return visible


def _decode(
    q: torch.Tensor,
    cache: LayerCache,
    bucket: DecodeBucket,
    layer: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [B, Hq, D] -> [B, Hq, Dv]. The query heads of a key head are computed as the queries of one sequence."""
    num_rows, num_kv_heads = q.shape[0], layer.num_kv_heads
    grouped = q.reshape(num_rows, num_kv_heads, -1, q.shape[-1])
    k, v = _gather(cache, bucket.slots, layer, q.dtype)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if _needs_scores(layer, sinks):
        out = _explicit(grouped, k, v, bucket.visible, layer, sinks)
    else:
        out = scaled_dot_product_attention(grouped, k, v, attn_mask=bucket.visible, scale=layer.scaling)
    return out.reshape(num_rows, layer.num_heads, layer.v_head_dim)


def _needs_scores(layer: AttentionSpec, sinks: torch.Tensor | None) -> bool:
    """Whether scores are changed in ways that torch's own attention does not know."""
    return layer.logit_cap > 0 or layer.alibi_slopes is not None or sinks is not None


def _gather(
    cache: LayerCache, slots: torch.Tensor, layer: AttentionSpec, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [..., Hkv, D] and values [..., Hkv, Dv] at slots [...]; a latent layer's are gathered once."""
    if not layer.latent:
        return cache.numbers(slots, dtype)
    k = cache.keys[slots].to(dtype)
    return k, k[..., : layer.v_head_dim]


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    layer: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [B, Hkv, G, D], k [B, Hkv, L, D], v [B, Hkv, L, Dv] -> [B, Hkv, G, Dv], with caps, slopes or sinks."""
    num_rows, num_kv_heads, group_size, _ = q.shape
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * layer.scaling
    if layer.logit_cap > 0:
        scores = layer.logit_cap * torch.tanh(scores / layer.logit_cap)
    if layer.alibi_slopes is not None:
        last = visible.sum(-1, keepdim=True) - 1  # the query's own key
        distances = torch.arange(k.shape[2], device=k.device) - last
        scores = scores + layer.alibi_slopes.view(num_kv_heads, group_size, 1) * distances
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink_scores = sinks.float().view(1, num_kv_heads, group_size, 1).expand(num_rows, -1, -1, -1)
        scores = torch.cat((scores, sink_scores), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return torch.matmul(weights, v.float()).to(q.dtype)


def _extend(
    q: torch.Tensor,
    cache: LayerCache,
    row: ExtendRow,
    layer: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [n, Hq, D] -> [n, Hq, Dv]."""
    k, v = _gather(cache, row.slots, layer, q.dtype)
    if _needs_scores(layer, sinks):
        return _extend_explicit(q, k, v, row, layer, sinks)
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=row.visible,
        is_causal=row.visible is None,
        scale=layer.scaling,
        enable_gqa=layer.num_heads != layer.num_kv_heads,
    )
    return out[0].transpose(0, 1)


def _extend_explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row: ExtendRow,
    layer: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Compute some queries at a time, so that a long prompt's scores are never all in memory."""
    pieces, start = [], 0
    for piece in q.split(max(1, SCORES_PER_PIECE // (q.shape[1] * len(k)))):
        q_start, end = row.q_offset + start, start + len(piece)
        first = layer.first_visible(q_start)
        if row.visible_ends is None:
            seen, ends = slice(first, row.q_offset + end), None
        else:  # only the device knows how far ahead a query sees
            seen, ends = slice(first, None), row.visible_ends[start:end] - first
        offset = q_start - first
        options = (layer.window, layer.logit_cap, sinks, ends, layer.alibi_slopes, layer.chunk)
        out = reference.attention(piece, k[seen], v[seen], layer.scaling, offset, *options)
        pieces.append(out)
        start = end
    return torch.cat(pieces)
