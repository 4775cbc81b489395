"""The attention of vision towers, within segments.

A tower computes the patches of several images or frames at once, one after another; a patch sees only its own segment.
Nothing is cached.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.distributed.parallel_state import RankGroup, divide, get_tp_group
from rtp_llm.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.weights import ShardId
from rtp_llm.srt.utils import add_prefix

CosSin = tuple[torch.Tensor, torch.Tensor]
PositionApplier = Callable[[torch.Tensor, torch.Tensor, Any, torch.Size], tuple[torch.Tensor, torch.Tensor]]
Sources = dict[str, tuple[str, ShardId]]


@dataclass(frozen=True, slots=True)
class SegmentGroup:
    """The segments of one length. ``tokens``: [num_segments * length] indices of their tokens; None: all, in order."""

    length: int
    tokens: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class VisionAttentionMetadata:
    """The bounds of segments: token t is in the segment s with ``cu_seqlens[s] <= t < cu_seqlens[s + 1]``."""

    cu_seqlens: torch.Tensor  # [segments + 1] int32, from 0 to the number of tokens
    seq_lens: torch.Tensor  # [segments] int32
    max_seqlen: int
    num_tokens: int
    groups: tuple[SegmentGroup, ...]  # without empty segments


def prepare_vision_attention_metadata(cu_seqlens: torch.Tensor, device: torch.device | str) -> VisionAttentionMetadata:
    """Make the metadata of the segments, once for all layers of a tower.

    Raises:
        ValueError: ``cu_seqlens`` does not begin with 0, or decreases.
    """
    bounds = cu_seqlens.tolist()
    if cu_seqlens.dim() != 1 or not bounds or bounds[0] != 0 or any(end < start for start, end in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must be one row of bounds that begins with 0 and never falls, got {bounds}")
    cu_seqlens = cu_seqlens.to(device=device, dtype=torch.int32)
    lengths = [end - start for start, end in pairwise(bounds)]
    groups = _segment_groups(bounds, lengths, device)
    return VisionAttentionMetadata(cu_seqlens, cu_seqlens.diff(), max(lengths, default=0), bounds[-1], groups)


def _segment_groups(bounds: list[int], lengths: list[int], device: torch.device | str) -> tuple[SegmentGroup, ...]:
    distinct = sorted(set(lengths) - {0})
    if len(distinct) == 1:
        return (SegmentGroup(distinct[0], None),)
    groups = []
    for length in distinct:
        starts = torch.tensor([start for start, n in zip(bounds, lengths, strict=False) if n == length], device=device)
        groups.append(SegmentGroup(length, (starts[:, None] + torch.arange(length, device=device)).flatten()))
    return tuple(groups)


class SingletonCache:
    """The ``cu_seqlens`` of a forward pass: the first layer fills it, the others read it."""

    def __init__(self, data: torch.Tensor | None = None) -> None:
        self.set_data(data)

    def set_data(self, data: torch.Tensor | None) -> None:
        self._data = data
        self._metadata: VisionAttentionMetadata | None = None

    def get_data(self) -> torch.Tensor | None:
        return self._data

    def empty(self) -> bool:
        return self._data is None

    def metadata(self, num_rows: int, row_len: int, device: torch.device) -> VisionAttentionMetadata:
        """Return the metadata of its ``cu_seqlens``; if it is empty, of one segment per row."""
        if self._data is None:
            self.set_data(_rows_as_segments(num_rows, row_len))
        if self._metadata is None:
            assert self._data is not None
            self._metadata = prepare_vision_attention_metadata(self._data, device)
        return self._metadata


class VisionAttention(nn.Module):
    """Attention of patches to all patches of their segment.

    Parameters: ``qkv_proj`` and ``proj``. In a checkpoint they may also be named ``qkv``, or ``q_proj``, ``k_proj`` and
    ``v_proj``; and ``out_proj``, ``o_proj`` or ``projection_layer``: a model file need not rename them.

    Args:
        embed_dim: of input and output.
        projection_size: ``num_heads * head_dim``.
        use_qkv_parallel: the checkpoint has all queries, then all keys, then all values; False: it has query, key and
            value of the first head, then of the second, ...
        num_kv_heads: None: as many as query heads.
        head_dim: None: ``projection_size / num_heads``.
        qkv_backend: None or ``"sdpa"``, the only one so far.
        dropout: only for training, not used.
        softmax_in_single_precision: scores, softmax and weighted sum in float32 whatever the input dtype.
        softmax_scale: factor of the scores; None: ``head_dim ** -0.5``.
        flatten_batch: the input is one row of packed segments; more rows are an error.
        num_dummy_heads: heads that pad the split over ranks; not supported.
        qk_normalization: root-mean-square norms ``q_norm`` and ``k_norm`` over all heads together.
        qk_normalization_by_head_size: the same over each head.
        customized_position_embedding_applier: called as ``(q, k, position_embeddings, x.shape) -> (q, k)`` in place of
            the rotation; q and k are [tokens, heads, head_dim].
        use_data_parallel: each rank has all heads.

    Raises:
        ValueError: an argument is not supported, or sizes do not fit.
    """

    # Names of the two layers in checkpoints: of the first layer or its parts -> shard id, and of the second.
    qkv_sources = {"qkv": None, "q_proj": "q", "k_proj": "k", "v_proj": "v"}
    proj_sources = ("out_proj", "o_proj", "projection_layer")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        projection_size: int,
        use_qkv_parallel: bool = True,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_backend: str | None = None,
        quant_config: QuantizationConfig | None = None,
        dropout: float = 0.0,
        softmax_in_single_precision: bool = False,
        softmax_scale: float | None = None,
        flatten_batch: bool = False,
        prefix: str = "",
        proj_bias: bool = True,
        num_dummy_heads: int = 0,
        qkv_bias: bool = True,
        qk_normalization: bool = False,
        qk_normalization_by_head_size: bool = False,
        layer_norm_eps: float = 1e-6,
        customized_position_embedding_applier: PositionApplier | None = None,
        use_data_parallel: bool = False,
        tp_group: RankGroup | None = None,
    ) -> None:
        super().__init__()
        self.name = prefix or type(self).__name__
        self.tp_group = RankGroup(0, 1) if use_data_parallel else tp_group or get_tp_group()
        self.head_dim = _head_dim(self.name, num_heads, projection_size, head_dim)
        self.use_qkv_parallel = use_qkv_parallel
        self.total_num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self._refuse(qkv_backend, num_dummy_heads, num_heads, qk_normalization and qk_normalization_by_head_size)
        self.scaling = self.head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.dropout = dropout
        self.softmax_in_single_precision = softmax_in_single_precision
        self.flatten_batch = flatten_batch
        self.apply_positions = customized_position_embedding_applier
        self.qkv_proj = self._make_qkv(embed_dim, num_heads, qkv_bias, quant_config, add_prefix("qkv_proj", prefix))
        self.proj = RowParallelLinear(
            projection_size,
            embed_dim,
            bias=proj_bias,
            quant_config=quant_config,
            prefix=add_prefix("proj", prefix),
            tp_group=self.tp_group,
        )
        self.norms_heads_together = qk_normalization
        self.norms_heads = qk_normalization or qk_normalization_by_head_size
        if self.norms_heads:
            num_normed, num_kv_normed = (num_heads, self.total_num_kv_heads) if qk_normalization else (1, 1)
            self.q_norm = RMSNorm(num_normed * self.head_dim, eps=layer_norm_eps)
            self.k_norm = RMSNorm(num_kv_normed * self.head_dim, eps=layer_norm_eps)

    def _refuse(self, qkv_backend: str | None, num_dummy_heads: int, num_heads: int, both_norms: bool) -> None:
        if qkv_backend not in (None, "sdpa"):
            raise ValueError(f"{self.name}: unknown qkv_backend {qkv_backend!r}; have ['sdpa']")
        if num_dummy_heads:
            raise ValueError(
                f"{self.name}: num_dummy_heads={num_dummy_heads} is not supported: choose a tp_size that divides the "
                f"{num_heads} heads, or use_data_parallel=True"
            )
        if num_heads % self.total_num_kv_heads:
            raise ValueError(f"{self.name}: {num_heads} heads cannot share {self.total_num_kv_heads} key/value heads")
        if not self.use_qkv_parallel and self.total_num_kv_heads != num_heads:
            raise ValueError(f"{self.name}: fewer key/value heads than query heads need use_qkv_parallel=True")
        if both_norms:
            raise ValueError(f"{self.name}: qk_normalization and qk_normalization_by_head_size exclude each other")

    def _make_qkv(
        self, embed_dim: int, num_heads: int, bias: bool, quant_config: QuantizationConfig | None, prefix: str
    ) -> ColumnParallelLinear:
        parallel: dict[str, Any] = dict(bias=bias, quant_config=quant_config, prefix=prefix, tp_group=self.tp_group)
        if not self.use_qkv_parallel:
            heads = divide(num_heads, self.tp_group.world_size, f"{self.name}: number of attention heads")
            self.num_heads, self.num_kv_heads, self.num_kv_head_replicas = heads, heads, 1
            return ColumnParallelLinear(embed_dim, 3 * num_heads * self.head_dim, **parallel)
        qkv = QKVParallelLinear(embed_dim, self.head_dim, num_heads, self.total_num_kv_heads, **parallel)
        self.num_heads, self.num_kv_heads = qkv.num_heads, qkv.num_kv_heads
        self.num_kv_head_replicas = qkv.num_kv_head_replicas
        return qkv

    @property
    def weight_sources(self) -> Sources:
        """Other names of the parameters in checkpoints, see ``load_weights_declaratively``."""
        sources: Sources = {}
        for kind, _ in self.qkv_proj.named_parameters():
            for name, shard_id in self.qkv_sources.items():
                if shard_id is None or self.use_qkv_parallel:
                    sources[f"{name}.{kind}"] = (f"qkv_proj.{kind}", shard_id)
        for kind, _ in self.proj.named_parameters():
            sources |= {f"{name}.{kind}": (f"proj.{kind}", None) for name in self.proj_sources}
        return sources

    def forward(
        self,
        x: torch.Tensor,
        cu_seqlens: "torch.Tensor | SingletonCache | None" = None,
        position_embeddings: Any = None,
        rotary_pos_emb_cos: torch.Tensor | None = None,
        rotary_pos_emb_sin: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        forward_metadata: VisionAttentionMetadata | None = None,
    ) -> torch.Tensor:
        """Attend within segments.

        Args:
            x: [b, s, embed_dim], or [s, embed_dim] as one row.
            cu_seqlens: [segments + 1] int32, bounds among the b * s tokens; None: each row is a segment.
            position_embeddings: (cos, sin), each [b * s, head_dim], or [s, head_dim] the same for all rows, or half as
                wide, the same for both halves of a head; or the input of the customized applier.
            rotary_pos_emb_cos, rotary_pos_emb_sin: the same two, separately, where ``position_embeddings`` is None.
            attention_mask: [1 or b, s, s] or [1 or b, 1 or heads of this rank, s, s], bool (True: seen) or added to the
                scores; other segments stay hidden.
            forward_metadata: of ``cu_seqlens``, computed once for all layers; used in place of them.

        Returns:
            [b, s, embed_dim].

        Raises:
            ValueError: shapes do not fit.
        """
        x = x[None] if x.dim() == 2 else x
        num_rows, row_len, _ = x.shape
        if self.flatten_batch and num_rows != 1:
            raise ValueError(f"{self.name}: flatten_batch takes one row of packed segments, got {num_rows} rows")
        q, k, v = self._project(x.flatten(0, 1))
        if position_embeddings is None:
            q, k = self._rotate(q, k, rotary_pos_emb_cos, rotary_pos_emb_sin)
        elif self.apply_positions is not None:
            q, k = self.apply_positions(q, k, position_embeddings, x.shape)
        else:
            q, k = self._rotate(q, k, *position_embeddings)
        metadata = self._metadata(cu_seqlens, forward_metadata, num_rows, row_len, x.device)
        if attention_mask is not None:
            out = self._attend_masked(q, k, v, attention_mask, metadata, num_rows, row_len)
        else:
            out = self._attend_segments(q, k, v, metadata, row_len)
        out, _ = self.proj(out.flatten(1).unflatten(0, (num_rows, row_len)))
        return out

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, embed_dim] -> q [T, heads, head_dim], k and v [T, kv heads, head_dim]; q and k normed if configured."""
        qkv, _ = self.qkv_proj(x)
        if self.use_qkv_parallel:
            heads = qkv.unflatten(-1, (-1, self.head_dim))
            q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        else:
            q, k, v = qkv.unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(2)
        if self.norms_heads_together:
            q = self._norm_together(self.q_norm, q, 1)
            k = self._norm_together(self.k_norm, k, self.num_kv_head_replicas)
        elif self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _norm_together(self, norm: RMSNorm, heads: torch.Tensor, num_replicas: int) -> torch.Tensor:
        """Norm over the heads of all ranks; each head is on ``num_replicas`` neighbouring ranks."""
        parts = self.tp_group.all_gather(heads.flatten(1)).split(heads.shape[1] * self.head_dim, dim=-1)
        normed = norm(torch.cat(parts[::num_replicas], dim=-1)).split(parts[0].shape[-1], dim=-1)
        return normed[self.tp_group.rank // num_replicas].view(heads.shape)

    def _rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate in float32 and round once; return q and k unchanged if there is neither cosine nor sine."""
        if cos is None and sin is None:
            return q, k
        if cos is None or sin is None:
            raise ValueError(f"{self.name}: a rotation needs both cosines and sines")
        cos, sin = self._per_token(cos, len(q)), self._per_token(sin, len(q))
        return _rotate_halves(q, cos, sin), _rotate_halves(k, cos, sin)

    def _per_token(self, table: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Cosines or sines -> [T, 1, head_dim] float32."""
        table = table.reshape(-1, table.shape[-1]).float()
        if 2 * table.shape[1] == self.head_dim:
            table = torch.cat((table, table), dim=-1)
        if table.shape[1] != self.head_dim or not len(table) or num_tokens % len(table):
            raise ValueError(
                f"{self.name}: cosines and sines for {num_tokens} tokens and heads of {self.head_dim} components "
                f"cannot be of shape {tuple(table.shape)}"
            )
        return table.repeat(num_tokens // len(table), 1)[:, None]

    def _metadata(
        self,
        cu_seqlens: torch.Tensor | SingletonCache | None,
        metadata: VisionAttentionMetadata | None,
        num_rows: int,
        row_len: int,
        device: torch.device,
    ) -> VisionAttentionMetadata | None:
        """Return the metadata of the segments; None if each row is a segment."""
        if metadata is None and isinstance(cu_seqlens, SingletonCache):
            metadata = cu_seqlens.metadata(num_rows, row_len, device)
        elif metadata is None and isinstance(cu_seqlens, torch.Tensor):
            metadata = prepare_vision_attention_metadata(cu_seqlens, device)
        if metadata is not None and metadata.num_tokens != num_rows * row_len:
            raise ValueError(
                f"{self.name}: cu_seqlens end at {metadata.num_tokens}, but there are {num_rows} x {row_len} tokens"
            )
        return metadata

    def _attend_segments(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        metadata: VisionAttentionMetadata | None,
        row_len: int,
    ) -> torch.Tensor:
        """[T, heads, head_dim], of q [T, heads, head_dim], k and v [T, kv heads, head_dim]."""
        if not len(q):
            return q
        groups = (SegmentGroup(row_len, None),) if metadata is None else metadata.groups
        if groups[0].tokens is None:
            return self._attend(*(x.unflatten(0, (-1, groups[0].length)) for x in (q, k, v))).flatten(0, 1)
        out = torch.empty_like(q)
        for group in groups:
            segments = (x[group.tokens].unflatten(0, (-1, group.length)) for x in (q, k, v))
            out[group.tokens] = self._attend(*segments).flatten(0, 1)
        return out

    def _attend_masked(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
        metadata: VisionAttentionMetadata | None,
        num_rows: int,
        row_len: int,
    ) -> torch.Tensor:
        mask = mask[:, None] if mask.dim() == 3 else mask
        fits = mask.dim() == 4 and mask.shape[0] in (1, num_rows) and mask.shape[1] in (1, self.num_heads)
        if not fits or mask.shape[2:] != (row_len, row_len):
            raise ValueError(
                f"{self.name}: attention_mask must be [1 or {num_rows}, 1 or {self.num_heads}, {row_len}, {row_len}] "
                f"or without the second, got {list(mask.shape)}"
            )
        mask = mask.to(q.device) if mask.dtype == torch.bool else mask.to(q)
        if metadata is not None:
            is_other = _is_of_other_segment(metadata, num_rows, row_len)
            mask = mask & ~is_other if mask.dtype == torch.bool else mask.masked_fill(is_other, float("-inf"))
        q, k, v = (x.unflatten(0, (num_rows, row_len)) for x in (q, k, v))
        return self._attend(q, k, v, mask).flatten(0, 1)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """q, k, v [n, s, (kv) heads, head_dim] -> [n, s, heads, head_dim], for n segments or rows of s tokens each."""
        dtype = q.dtype
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.softmax_in_single_precision:
            q, k, v = q.float(), k.float(), v.float()
            mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        is_grouped = self.num_heads != self.num_kv_heads
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scaling, enable_gqa=is_grouped)
        return out.transpose(1, 2).to(dtype)


def _head_dim(name: str, num_heads: int, projection_size: int, head_dim: int | None) -> int:
    if projection_size % num_heads or (head_dim is not None and head_dim * num_heads != projection_size):
        size = "" if head_dim is None else f" of {head_dim} components"
        raise ValueError(f"{name}: projection_size {projection_size} does not fit {num_heads} heads{size}")
    return projection_size // num_heads


def _rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + half) of [T, heads, head_dim] by tables [T, 1, head_dim] float32."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def _rows_as_segments(num_rows: int, row_len: int) -> torch.Tensor:
    return torch.arange(num_rows + 1, dtype=torch.int32, device="cpu") * row_len


def _is_of_other_segment(metadata: VisionAttentionMetadata, num_rows: int, row_len: int) -> torch.Tensor:
    """[b, 1, s, s] bool: whether query and key are in different segments."""
    tokens = torch.arange(num_rows * row_len, device=metadata.cu_seqlens.device, dtype=torch.int32)
    segments = torch.bucketize(tokens, metadata.cu_seqlens[1:], right=True).view(num_rows, row_len)
    return segments[:, None, :, None] != segments[:, None, None, :]
