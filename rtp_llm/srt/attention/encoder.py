"""Attention of encoders in plain torch: each token sees its whole row, and nothing is cached."""

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from rtp_llm.srt.forward_batch import AttentionSpec


def attend_both_ways(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: AttentionSpec, lengths: Sequence[int]
) -> torch.Tensor:
    """Compute attention within rows of these lengths; rows of one length are computed together, and none is padded.

    Args:
        q: [T, num_heads, head_dim]; k and v likewise with their heads.

    Returns:
        [T, num_heads * v_head_dim], in q's dtype.
    """
    out = q.new_empty(len(q), layer.num_heads, layer.v_head_dim)
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    of_length = torch.tensor(lengths)
    for length in sorted(set(lengths)):
        tokens = (starts[of_length == length, None] + torch.arange(length)).flatten().to(q.device)
        rows = [x[tokens].unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v)]
        out[tokens] = _attend(rows[0], rows[1], rows[2], layer).transpose(1, 2).flatten(0, 1)
    return out.flatten(1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: AttentionSpec) -> torch.Tensor:
    """q [N, heads, L, head_dim], k and v with their heads -> [N, heads, L, v_head_dim]."""
    length = q.shape[2]
    places = torch.arange(length, device=q.device)
    visible = None
    if layer.window is not None and layer.window < length:
        visible = (places[:, None] - places).abs() < layer.window
    if layer.logit_cap > 0:
        return _capped(q, k, v, layer, visible)
    grouped = layer.num_heads != layer.num_kv_heads
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=layer.scaling, enable_gqa=grouped)


def _capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: AttentionSpec, visible: torch.Tensor | None
) -> torch.Tensor:
    k, v = (x.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=1).float() for x in (k, v))
    scores = layer.logit_cap * torch.tanh(q.float() @ k.transpose(2, 3) * (layer.scaling / layer.logit_cap))
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v).to(q.dtype)
