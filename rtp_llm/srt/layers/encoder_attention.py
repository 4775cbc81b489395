"""Attention of encoders without projections: of texts, over a step's rows, and of media, under the name and with the
arguments that vLLM's towers have."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rtp_llm.srt.forward_batch import AttentionSpec, ForwardBatch
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.vision import VisionAttentionMetadata, prepare_vision_attention_metadata

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["EncoderAttention", "MMEncoderAttention", "encoder_window", "sees_both_ways"]


def sees_both_ways(config: "PretrainedConfig") -> bool:
    """Whether a decoder's configuration says that it is used as an encoder: tokens see those behind them."""
    return getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None) is True


def encoder_window(config: "PretrainedConfig", window: int | None) -> int | None:
    """Return the window of EncoderAttention for a decoder's, which counts the query's own token.

    Gemma's configurations count it likewise; where ``is_causal`` is false, transformers lets tokens see each other that
    are as far apart as the window is long.
    """
    return window if window is None or getattr(config, "is_causal", True) else window + 1


class EncoderAttention(nn.Module):
    """Attention in which every token of an input sees all others, before and behind it. Nothing is cached, and inputs
    are computed in one step. It takes the place of RadixAttention, and is called alike.

    Args:
        num_heads, num_kv_heads: of this rank.
        scaling: factor of the scores, usually ``head_dim ** -0.5``.
        layer_id: part of the call shape: nothing is kept.
        logit_cap: c > 0 replaces each score s by ``c * tanh(s / c)``.
        window: tokens i and j see each other iff ``|i - j| < window``; None: all do.
        attention_chunk_size: must be None, as there are no chunks here.
        quant_config, prefix: parts of the call shape.
    """

    sees_whole_prompts = True

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        num_kv_heads: int | None = None,
        layer_id: int = 0,
        logit_cap: float = 0.0,
        window: int | None = None,
        attention_chunk_size: int | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        if attention_chunk_size is not None:
            raise ValueError(f"{prefix or 'EncoderAttention'}: chunks of the sequence are for decoders")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.spec = AttentionSpec(
            layer_id, num_heads, num_kv_heads, head_dim, head_dim, scaling, logit_cap=logit_cap, window=window
        )

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """[T, num_heads * head_dim] queries, keys and values with their heads -> [T, num_heads * head_dim]."""
        spec = self.spec
        q = q.view(-1, spec.num_heads, spec.head_dim)
        k, v = (x.view(-1, spec.num_kv_heads, spec.head_dim) for x in (k, v))
        return forward_batch.attn_backend.forward_encoder(q, k, v, spec, forward_batch)


class MMEncoderAttention(nn.Module):
    """Attention of every token to all of its segment: what ``VisionAttention`` does between its projections.

    Args:
        num_heads, num_kv_heads: of this rank; num_kv_heads None: as many as heads.
        scale: factor of the scores; None: ``head_size ** -0.5``.
        prefix: part of the call shape that model files share, not needed here.
    """

    attn_backend = None  # there is no choice of kernels

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float | None = None,
        num_kv_heads: int | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.num_heads, self.head_size = num_heads, head_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.scale = head_size**-0.5 if scale is None else scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: torch.Tensor | int | None = None,
        sequence_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within segments.

        Args:
            query: [b, s, heads * head_size] or [b, s, heads, head_size]; key and value likewise with their heads.
            cu_seqlens: [segments + 1], bounds among the b * s tokens; None: each row is a segment.
            max_seqlen, sequence_lengths: parts of the call shape; they follow from ``cu_seqlens``.

        Returns:
            Of the query's shape.

        Raises:
            ValueError: the segments do not end where the tokens do.
        """
        num_rows = len(query)
        q, k, v = (
            x.reshape(-1, heads, self.head_size)
            for x, heads in ((query, self.num_heads), (key, self.num_kv_heads), (value, self.num_kv_heads))
        )
        if cu_seqlens is None:
            return self._attend(q, k, v, num_rows).reshape(query.shape)
        metadata = _metadata(cu_seqlens, query.device)
        if metadata.num_tokens != len(q):
            raise ValueError(f"cu_seqlens end at {metadata.num_tokens}, but there are {len(q)} tokens")
        out = torch.empty_like(q)
        for group in metadata.groups:
            tokens = slice(None) if group.tokens is None else group.tokens
            num_segments = len(q[tokens]) // group.length
            out[tokens] = self._attend(q[tokens], k[tokens], v[tokens], num_segments)
        return out.reshape(query.shape)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_segments: int) -> torch.Tensor:
        """[T, heads, head_size], of segments that are equally long."""
        q, k, v = (x.unflatten(0, (num_segments, -1)).transpose(1, 2) for x in (q, k, v))
        is_grouped = self.num_heads != self.num_kv_heads
        out = scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=is_grouped)
        return out.transpose(1, 2).flatten(0, 1)


def _metadata(cu_seqlens: torch.Tensor, device: torch.device) -> VisionAttentionMetadata:
    """Return the metadata of segments, made by the first layer of a pass and kept with the tensor for the others."""
    found: VisionAttentionMetadata | None = getattr(cu_seqlens, "segments", None)
    if found is None:
        found = prepare_vision_attention_metadata(cu_seqlens, device)
        cu_seqlens.segments = found  # type: ignore[attr-defined]
    return found
