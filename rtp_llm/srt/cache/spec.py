"""What layers keep: keys and values of tokens, in groups of equal layers, and states of sequences. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The cache of one attention layer, per token on one rank. Layers with equal specs form a cache group.

    ``window`` counts visible tokens, the query's own included, as Hugging Face configurations do:
    key j is visible to query i iff ``i - window < j <= i``. None: all of them.

    ``latent``: a token's value is the first ``v_head_dim`` components of its key, which alone is stored (multi-head
    latent attention; DeepSeek-V2, 2024).
    """

    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str  # a torch dtype's name: "float32", "bfloat16", "float16"; "int8": with a float32 scale for each head
    window: int | None = None
    latent: bool = False

    def __post_init__(self) -> None:
        if self.latent and self.v_head_dim > self.head_dim:
            raise ValueError(
                f"a latent cache holds values within keys: v_head_dim must be at most head_dim={self.head_dim}, "
                f"got {self.v_head_dim}"
            )
        if self.latent and self.has_scales:
            raise ValueError("a latent cache cannot be int8: its values, within keys, would need a scale of their own")

    @property
    def kind(self) -> Literal["full", "window", "latent"]:
        if self.latent:
            return "latent"
        return "full" if self.window is None else "window"

    @property
    def has_scales(self) -> bool:
        return self.dtype == "int8"

    @property
    def bytes_per_token(self) -> int:
        item_size = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}[self.dtype]
        per_head = self.head_dim if self.latent else self.head_dim + self.v_head_dim
        return self.num_kv_heads * (per_head * item_size + (2 * 4 if self.has_scales else 0))


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers (by ``layer_id``) that share page ids: one allocator, one page table, one pool of tensors."""

    spec: CacheSpec
    layer_ids: tuple[int, ...]
    page_size: int = 1

    @property
    def window(self) -> int | None:
        return self.spec.window

    @property
    def bytes_per_page(self) -> int:
        return self.spec.bytes_per_token * len(self.layer_ids) * self.page_size


def whole_pages(groups: Sequence[CacheGroup]) -> int:
    """Return the least number of tokens that fills whole pages of every group."""
    return math.lcm(*(group.page_size for group in groups))


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of a layer's state, for one sequence on one rank."""

    name: str  # unique among those of a layer
    shape: tuple[int, ...]
    dtype: str  # a torch dtype's name

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]


@dataclass(frozen=True, slots=True)
class StateSpec:
    """What a layer keeps of a whole sequence, of one size however long it is: a recurrent layer's memory.

    A state belongs to one position: it sums up the tokens before it, and cannot be cut back. The state of no tokens is
    all zeros.
    """

    tensors: tuple[StateTensor, ...]


@dataclass(frozen=True, slots=True)
class StateGroup:
    """The states of all layers. They share slot ids: a slot holds one sequence's states of all layers at one position.

    Running requests have a slot each; others hold *checkpoints*, from which the prefix cache lets requests resume.
    """

    layers: tuple[tuple[int, StateSpec], ...]  # (layer_id, its tensors)

    @property
    def bytes_per_slot(self) -> int:
        return sum(tensor.num_bytes for _, spec in self.layers for tensor in spec.tensors)


@dataclass(frozen=True, slots=True)
class LengthScaling:
    """Keys that depend on the length of the sequence they were computed in (dynamic NTK and LongRoPE rotations).

    As in transformers, prompt tokens are rotated for the prompt's length, each later token for its own. Up to
    ``original_len`` tokens all lengths give the same keys. Beyond, with ``per_length`` each length gives others
    (dynamic NTK), without it all longer ones give the same (LongRoPE). The prefix cache must not mix them: classes of
    ``key_class`` are separate namespaces. Within a class a token's key depends only on the tokens up to it.
    """

    original_len: int
    per_length: bool

    def key_class(self, prompt_len: int) -> int:
        """Return a prompt's class: requests share cached prefixes only within a class."""
        if prompt_len <= self.original_len:
            return 0
        return prompt_len if self.per_length else self.original_len + 1


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The worker's report after loading: its cache groups, whether keys depend on the sequence length, its states."""

    groups: tuple[CacheGroup, ...]
    length_scaling: LengthScaling | None = None
    states: StateGroup | None = None  # None: no layer keeps one
