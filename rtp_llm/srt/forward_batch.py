"""The contract between runner and model: everything a forward pass may read besides ids and positions."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import torch

from rtp_llm.srt.plan import SharedPrefix

if TYPE_CHECKING:
    from rtp_llm.srt.attention.base import AttentionBackend
    from rtp_llm.srt.kv_pool import KVPool
    from rtp_llm.srt.layers.multimodal import EmbeddingCache
    from rtp_llm.srt.multimodal.items import MultimodalInputs


class ForwardMode(IntEnum):
    """What the rows of a batch do. ``EXTEND``: each computes a chunk; ``DECODE``: each computes one token."""

    EXTEND = 1
    DECODE = 2
    MIXED = 3  # some of both
    IDLE = 4  # no rows

    def is_extend(self) -> bool:
        return self in (ForwardMode.EXTEND, ForwardMode.MIXED)

    is_prefill = is_extend

    def is_decode(self) -> bool:
        return self == ForwardMode.DECODE

    def is_mixed(self) -> bool:
        return self == ForwardMode.MIXED

    def is_idle(self) -> bool:
        return self == ForwardMode.IDLE

    def is_decode_or_idle(self) -> bool:
        return self in (ForwardMode.DECODE, ForwardMode.IDLE)


@dataclass(slots=True)
class LogprobRow:
    """Prompt logprobs wanted from one row of the batch.

    ``token_rows`` are indices into the batch's flattened tokens; ``targets[i]`` is the token that follows it.
    """

    batch_index: int
    token_rows: list[int]
    targets: list[int]
    top_num: int
    token_ids: list[int]


@dataclass(slots=True)
class ForwardBatch:
    """A step's inputs. Tokens of all rows are flattened: no batch dimension, no padding.

    Shapes: [T] is the number of tokens, [B] the number of rows. Tensors ending in ``_cpu`` are host lists of the same
    values. Row b computes tokens ``[extend_prefix_lens[b], seq_lens[b])`` of its sequence.
    """

    forward_mode: ForwardMode
    batch_size: int
    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    req_pool_indices: torch.Tensor  # [B] int64: the row of each request in the page tables
    seq_lens: torch.Tensor  # [B] int64: tokens of the sequence, this step's included
    extend_prefix_lens: torch.Tensor  # [B] int64: tokens already in the cache
    extend_seq_lens: torch.Tensor  # [B] int64: tokens of this step
    extend_start_loc: torch.Tensor  # [B] int64: where each row's tokens begin in [T]
    seq_lens_cpu: list[int]
    extend_prefix_lens_cpu: list[int]
    extend_seq_lens_cpu: list[int]
    prompt_lens_cpu: list[int]  # of each request, for rotations that depend on the sequence length

    page_tables: list[torch.Tensor]  # per cache group [max_rows, max_pages] int32, page ids; index by req_pool_indices
    out_cache_locs: list[torch.Tensor]  # per cache group [T] int64: token slots that this step's keys are written to
    kv_pool: "KVPool"
    attn_backend: "AttentionBackend"

    sample_rows: torch.Tensor  # [S] int64: the flattened tokens whose logits are sampled from
    prompt_logprobs: list[LogprobRow] = field(default_factory=list)
    mm_inputs: list["MultimodalInputs | None"] | None = None  # per row, its prompt's media; None: no row has any
    embedding_cache: "EmbeddingCache | None" = None  # what encoders made of media before
    # [3, T] int64: each token's time, height and width for M-RoPE, all three its position where it is text; None: a
    # model with M-RoPE takes ``positions``.
    mrope_positions: torch.Tensor | None = None
    # [T] int64: a token at position p sees keys before ``max(visible_ends, p + 1)``, so that a block of an image's
    # tokens sees itself wholly; a sliding window still bounds it from below. A block is computed in one step: no end
    # exceeds its row's ``seq_lens``. None: plain causal attention, as where all ends are ``p + 1`` or less.
    visible_ends: torch.Tensor | None = None
    # Of the plan, but ``rows`` are rows of the batch. A back end may read these once; it need not.
    shared_prefixes: list[SharedPrefix] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]
