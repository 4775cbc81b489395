"""Calls of attention in our vision towers, as they are recorded."""

from typing import Any

import torch
from torch import nn

from rtp_llm.srt.layers.encoder_attention import MMEncoderAttention
from rtp_llm.srt.layers.vision import VisionAttention, VisionAttentionMetadata
from rtp_llm.tools.verify.trace import VisionCall, kept


def our_vision_call(layer: VisionAttention, given: dict[str, Any]) -> VisionCall:
    x, metadata, cu_seqlens = given["x"], given.get("forward_metadata"), given.get("cu_seqlens")
    if isinstance(metadata, VisionAttentionMetadata):
        lengths = metadata.seq_lens.tolist()
    elif isinstance(cu_seqlens, torch.Tensor):
        lengths = cu_seqlens.diff().tolist()
    else:
        lengths = [x.shape[-2]] * (x[..., 0].numel() // x.shape[-2])
    return VisionCall(layer.num_heads, layer.scaling, tuple(lengths), cos_sin_of(given, layer.head_dim))


def our_encoder_call(layer: MMEncoderAttention, given: dict[str, Any]) -> VisionCall:
    query, cu_seqlens = given["query"], given.get("cu_seqlens")
    lengths = [query.shape[1]] * len(query) if cu_seqlens is None else cu_seqlens.diff().tolist()
    return VisionCall(layer.num_heads, layer.scale, tuple(lengths), None)


def cos_sin_of(given: dict[str, Any], head_dim: int) -> torch.Tensor | None:
    """Return [patches, 2 * head_dim] float32 of (cos, sin), each [patches, head_dim] or one half of it for both."""
    tables = given.get("position_embeddings") or (given.get("rotary_pos_emb_cos"), given.get("rotary_pos_emb_sin"))
    if not isinstance(tables, (tuple, list)) or not all(isinstance(table, torch.Tensor) for table in tables):
        return None
    rows = [table.reshape(-1, table.shape[-1]) for table in tables]
    return torch.cat([kept(row.repeat(1, head_dim // row.shape[1])) for row in rows], dim=1)


def vision_aliases(model: nn.Module, name: str) -> list[str]:
    """Return the checkpoint names of a VisionAttention's projection, taken as a whole."""
    parent, _, last = name.rpartition(".")
    if not isinstance(dict(model.named_modules()).get(parent), VisionAttention):
        return []
    others: dict[str, tuple[str, ...]] = {"qkv_proj": ("qkv",), "proj": VisionAttention.proj_sources}
    return [f"{parent}.{other}" for other in others.get(last, ())]
