"""The contract between runner, model and attention: the inputs of a forward pass besides ids and positions."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import torch

from rtp_llm.srt.kernels.paged import first_visible
from rtp_llm.srt.kv_pool import KVPool
from rtp_llm.srt.multimodal.embedding_cache import EmbeddingCache
from rtp_llm.srt.multimodal.items import MultimodalInputs
from rtp_llm.srt.plan import SharedPrefix
from rtp_llm.srt.state_pool import StatePool


class ForwardMode(IntEnum):
    """The kind of a batch. ``EXTEND``: each row computes a chunk; ``DECODE``: each row computes one token."""

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


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpec:
    """The description of an attention layer on this rank, made once; a back end reads nothing else of the layer.

    The score of query i and key j is ``scaling * (q_i . k_j)``, then ``logit_cap * tanh(score / logit_cap)`` if there
    is a cap, then plus ``alibi_slopes[head] * (j - i)`` if there are slopes. Query head h reads key head
    ``h // (num_heads // num_kv_heads)``.
    """

    layer_id: int  # of the cache that is read and written; several layers may share one
    num_heads: int  # of queries
    num_kv_heads: int  # of keys and values; divides num_heads
    head_dim: int  # of queries and keys
    v_head_dim: int  # of values, and so of the output
    scaling: float
    logit_cap: float = 0.0  # 0: none
    # Tokens visible, the query's own included: key j is visible to query i iff ``i - window < j <= i``. None: all.
    window: int | None = None
    latent: bool = False  # a token's value is the first v_head_dim components of its key, which alone is stored
    alibi_slopes: torch.Tensor | None = None  # [num_heads] float32, on the layer's device. None: no bias by distance
    # Tokens in a chunk, of which a query sees its own alone: key j is visible iff ``i // chunk * chunk <= j <= i``.
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window counts the query's own token, so it is at least 1, not {self.window}")
        if self.chunk is not None and (self.chunk < 1 or self.window is not None):
            raise ValueError(f"a chunk has at least 1 token, and no window: not {self.chunk} with {self.window}")

    def first_visible(self, position: int) -> int:
        """Return the position of the first key that a query at ``position`` sees."""
        return first_visible(position, self.window, self.chunk)


class StepAttention(Protocol):
    """An attention back end that has planned the step, as layers see it. See attention/base.py."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: AttentionSpec,
        batch: "ForwardBatch",
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def forward_encoder(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: AttentionSpec, batch: "ForwardBatch"
    ) -> torch.Tensor: ...


@dataclass(slots=True)
class LogprobRow:
    """Prompt logprobs wanted from one row of the batch.

    ``token_rows`` are indices into the batch's flattened tokens; ``targets[i]`` is the token that follows it.
    """

    batch_index: int
    token_rows: torch.Tensor  # [N] int64
    targets: torch.Tensor  # [N] int64
    top_num: int
    token_ids: torch.Tensor  # [chosen] int64, other ids whose logprobs are wanted at each position


@dataclass(slots=True)
class StateWave:
    """Pieces of rows that recurrent layers compute in one call: [N] pieces, [P] tokens in all.

    A step is one wave, unless a state is to be kept in the middle of a row: then that row's next piece is of the next
    wave, and begins with the state that the piece before it has stored. Waves are computed in order.
    """

    load: torch.Tensor  # [N] int64: slots of the states before each piece; slot 0 has those of no tokens: zeros
    store: torch.Tensor  # [N] int64: slots that the states after each piece go to, no two equal
    cu_seqlens: torch.Tensor  # [N + 1] int64: piece n is tokens [cu_seqlens[n], cu_seqlens[n + 1]) of the wave's
    cu_seqlens_cpu: list[int]
    tokens: torch.Tensor | None = None  # [P] int64: the wave's tokens in the batch's [T]; None: all of them, in order
    first_token: int | None = None  # where they begin in [T], if they are neighbours

    def copy(self) -> "StateWave":
        """Return a wave of all the batch's tokens with tensors of its own."""
        return StateWave(self.load.clone(), self.store.clone(), self.cu_seqlens.clone(), self.cu_seqlens_cpu)


@dataclass(slots=True)
class ForwardBatch:
    """A step's inputs. Tokens of all rows are flattened: no batch dimension, and no row is padded.

    Shapes: [T] is the number of tokens, [B] the number of rows. Tensors ending in ``_cpu`` are host lists of the same
    values. Row b computes tokens ``[extend_prefix_lens[b], seq_lens[b])`` of its sequence.
    """

    forward_mode: ForwardMode
    batch_size: int  # rows, dummies included
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
    kv_pool: KVPool
    attn_backend: StepAttention

    sample_rows: torch.Tensor  # [S] int64: the flattened tokens whose logits are sampled from
    prompt_logprobs: list[LogprobRow] = field(default_factory=list)
    mm_inputs: list[MultimodalInputs | None] | None = None  # per row, its prompt's media; None: no row has any
    embedding_cache: EmbeddingCache | None = None  # embeddings of media from earlier steps
    # [3, T] int64: each token's time, height and width for M-RoPE; for text all three are its position. None: a model
    # with M-RoPE uses ``positions``.
    mrope_positions: torch.Tensor | None = None
    # [T] int64: a token at position p sees keys before ``max(visible_ends, p + 1)``, so that a block of an image's
    # tokens sees itself wholly; a sliding window still bounds it from below. A block is computed in one step: no end
    # exceeds its row's ``seq_lens``. None: plain causal attention, as with all ends at most ``p + 1``.
    visible_ends: torch.Tensor | None = None
    # Number of last rows that only pad the batch to a size that steps are recorded for. They are like decoding rows,
    # in a page that no request owns; their results are dropped.
    num_dummies: int = 0
    # The plan's, with rows of the batch. A back end may read each of them once for all its rows.
    shared_prefixes: list[SharedPrefix] = field(default_factory=list)
    state_pool: StatePool | None = None  # None: the model keeps no states
    state_waves: list[StateWave] = field(default_factory=list)
    # [P] int64: the flattened tokens, ascending, whose hidden states (after the last norm) pooled outputs are made of.
    # None: no row of this step has a pooled output.
    pooled_tokens: torch.Tensor | None = None
    # [T] int64: 1 for tokens of the second text of a pair, else 0 (BERT: Devlin et al., 2019). None: all are 0.
    token_types: torch.Tensor | None = None
    # By row of the batch, why its media cannot be encoded: it ends, and the others go on. None: errors are raised.
    row_errors: dict[int, str] | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]
