"""Traces: inputs and outputs of a model's modules while it computes a prompt, for ours and for transformers'.

Both sides are recorded in the same form, under the names of the checkpoint: packed projections are split, norms that
add the residual have it in their input, decoder layers that return the residual separately have it in their output.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from rtp_llm.tools.verify.expert_calls import ExpertsCall
from rtp_llm.tools.verify.recurrent_calls import (
    CONVOLVED,
    SCAN_INPUTS,
    TO_CONVOLVE,
    ConvolutionCall,
    ScanCall,
)

INPUT, OUTPUT = "input", "output"
QUERIES, KEYS, VALUES, ATTENDED = "queries", "keys", "values", "attention output"
HEAD = "lm_head"  # what ours gives to its head stands under this name
GATE = "gate"  # of a norm that multiplies by one
LOGITS = "logits"  # [1, vocab_size] after the last token, of the head
EMBEDDINGS = "embeddings of text and media"  # the input of a language model's first layer
ROUTING = "experts' weights"  # [tokens, num_experts], zero where a token does not go
UNROTATED = {QUERIES: "queries before rotation", KEYS: "keys before rotation"}
LATENT = {QUERIES: "queries over latents", KEYS: "latents"}
# Every query needs all of them, and every state.
_KEPT_WHOLE = (KEYS, VALUES, UNROTATED[KEYS], LATENT[KEYS], TO_CONVOLVE, CONVOLVED, *SCAN_INPUTS)


class Place(NamedTuple):
    """A tensor of a forward pass. ``part``: INPUT or OUTPUT of a module; of an attention block also QUERIES, KEYS,
    VALUES, and the output ATTENDED; of experts also ROUTING; of layers with states those of ``recurrent_calls``."""

    module: str
    part: str

    def __str__(self) -> str:
        return f"{self.part} of {self.module}"


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of a layer's attention for ``kernels.reference.attention``.

    Args:
        window: counts the query's own token.
        bias: added to the scores, [1 or heads, tokens, tokens]; None: nothing but the causal mask and the window.
        slopes: of ALiBi, in ours; in the reference they are in ``bias``.
        chunk: tokens of each part of the sequence that sees itself alone (Llama 4); None: there are none.
    """

    num_heads: int
    num_kv_heads: int
    scaling: float
    window: int | None
    logit_cap: float
    sinks: torch.Tensor | None
    bias: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class VisionCall:
    """Attention of patches to all of their segment. ``lengths``: patches of each. ``cos_sin``: [patches, 2 * head_dim],
    the rotation of queries and keys; None: none, or unknown."""

    num_heads: int
    scaling: float
    lengths: tuple[int, ...]
    cos_sin: torch.Tensor | None


@dataclass(frozen=True)
class CallSite:
    """A line of a function that is called while a model computes, ``Class.function``."""

    function: str
    filename: str
    line: int

    def __str__(self) -> str:
        return f"{self.function}, {self.filename}:{self.line}"


@dataclass(frozen=True)
class Parts:
    """The parts of a multimodal model, by the checkpoint's names, which are equal on both sides.

    Args:
        language_model: the module that contains the text embedding; empty: a text model.
        embedding: the text embedding.
        head: the module that computes logits.
    """

    language_model: str = ""
    embedding: str = ""
    head: str = ""

    @classmethod
    def of(cls, model: Any) -> "Parts":
        """Return the parts of a multimodal transformers model."""
        names = {module: name for name, module in model.named_modules()}
        embedding = names[model.get_input_embeddings()]
        return cls(embedding.rpartition(".")[0], embedding, names.get(model.get_output_embeddings(), ""))

    def is_tower(self, name: str) -> bool:
        """Return whether a module computes on patches, or values made of them, instead of the prompt's tokens."""
        if not self.language_model or not name:
            return False
        return not (_is_below(name, self.language_model) or _is_below(self.language_model, name) or name == self.head)


def _is_below(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")


class Trace:
    """Tensors [tokens, features], float32 on the host, at each place, in the order of execution.

    Of tokens before ``first_kept`` only keys and values are kept. The second use of a module in a step is a place of
    its own, ``module#2``. In a vision tower rows are patches, merged or not, and all are kept; images are in the
    prompt's order, whichever steps encode them.
    """

    def __init__(self, num_tokens: int, first_kept: int = 0, parts: Parts | None = None) -> None:
        self.num_tokens = num_tokens
        self.first_kept = first_kept
        self.parts = parts or Parts()
        self.calls: dict[str, AttentionCall] = {}
        self.vision_calls: dict[str, VisionCall] = {}
        self.ropes: dict[str, str] = {}  # of attention blocks of ours: their rotary embeddings
        self.latent_sizes: dict[str, int] = {}  # rotated components of latent attention
        self.experts: dict[str, ExpertsCall] = {}  # the last call of each module of experts
        self.convolutions: dict[str, ConvolutionCall] = {}
        self.scans: dict[str, ScanCall] = {}
        self.call_sites: dict[str, tuple[CallSite, ...]] = {}  # of our modules' last calls
        self.positions: torch.Tensor | None = None  # inputs of rotations: [tokens], or [3, tokens] of M-RoPE
        self._position_pieces: list[torch.Tensor] = []
        self.tensors: dict[Place, torch.Tensor] = {}
        self.joined: set[Place] = set()  # whose several uses in a step are one tensor
        self._pieces: defaultdict[Place, list[torch.Tensor]] = defaultdict(list)
        self._uses: Counter[Place] = Counter()
        self.starts: list[int] = []  # of the steps: a prompt's pieces
        self._start = self._num = self._num_steps = 0

    @property
    def num_in_step(self) -> int:
        """The tokens of this step."""
        return self._num

    @contextmanager
    def step(self, start: int, num: int) -> Iterator[None]:
        """Record the computation of tokens [start, start + num) within the context."""
        self._start, self._num = start, num
        self.starts.append(start)
        self._num_steps += 1
        self._uses.clear()
        try:
            yield
        finally:  # of a step that fails, what comes before that
            self._join_pieces()

    def _join_pieces(self) -> None:
        self.tensors = {
            place: torch.cat(pieces)
            for place, pieces in sorted(self._pieces.items(), key=lambda item: self._turn_of(item[0]))
            if len({piece.shape[1] for piece in pieces}) == 1
        }
        self.positions = torch.cat(self._position_pieces, dim=-1) if self._position_pieces else None

    def _turn_of(self, place: Place) -> int:
        """Return a place's rank: text embedding, tower, the rest, though later steps may encode images first."""
        if self.parts.is_tower(place.module):
            return 1
        is_text = place.part == OUTPUT and place.module == self.parts.embedding
        return 0 if is_text else 2

    def forget_pieces(self) -> None:
        """Forget what tensors are made of: no step follows."""
        self._pieces.clear()

    def add_positions(self, positions: Any) -> None:
        """Add positions [tokens] or [3, tokens], as ours, or with a batch dimension of one before the tokens. All
        layers share them: the first call of a step counts."""
        if not isinstance(positions, torch.Tensor) or positions.is_floating_point():
            return
        rows = positions.reshape(-1, positions.shape[-1])
        if rows.shape[1] == self._num and len(self._position_pieces) < self._num_steps and len(rows) in (1, 3):
            self._position_pieces.append((rows[0] if len(rows) == 1 else rows).detach().cpu().clone())

    def add_vision_call(self, module: str, call: VisionCall) -> None:
        """Add the segments of a call after those of earlier calls, for images encoded one by one."""
        before = self.vision_calls.get(module)
        if before is not None:
            tables = [table for table in (before.cos_sin, call.cos_sin) if table is not None]
            cos_sin = torch.cat(tables) if tables else None
            call = VisionCall(call.num_heads, call.scaling, before.lengths + call.lengths, cos_sin)
        self.vision_calls[module] = call

    def add_in_pieces(self, module: str, part: str, tensor: torch.Tensor) -> None:
        """Add [1, heads, patches, head_dim] of some segments of a tower's attention; others come in other calls."""
        self._pieces[Place(module, part)].append(kept(tensor.transpose(1, 2).flatten(0, 1).flatten(1)))

    def add(self, module: str, part: str, tensor: Any) -> None:
        is_tower = self.parts.is_tower(module)
        rows = _patches(tensor) if is_tower else _rows(tensor, self._num)
        if rows is None:
            return
        self._uses[Place(module, part)] += 1
        use = self._uses[Place(module, part)]
        skipped = 0 if part in _KEPT_WHOLE or is_tower else max(0, self.first_kept - self._start)
        place = Place(module, part) if use == 1 else _use(Place(module, part), use)
        self._pieces[place].append(kept(rows[skipped:]))

    def add_experts(self, module: str, call: ExpertsCall, routing: torch.Tensor) -> None:
        """Add what experts are given, and their weights [tokens, num_experts]."""
        self.experts[module] = call
        self.add(module, INPUT, call.given)
        self.add(module, ROUTING, routing)

    def join_uses(self, other: "Trace") -> None:
        """Join what a tower's modules have in several uses, one for each image, where the other side has all images in
        one: rows of all uses, in their order."""
        for place, tensor in list(self.tensors.items()):
            right = other.tensors.get(place)
            if not self.parts.is_tower(place.module) or right is None or _use(place, 2) in other.tensors:
                continue
            uses = self._uses_of(place)
            is_joined = len(uses) > 1 and tensor.shape[1] == right.shape[1]
            if is_joined and sum(len(self.tensors[use]) for use in uses) == len(right):
                self._join(place)

    def join_as(self, other: "Trace") -> None:
        """Join the uses that are joined in another trace of the same model."""
        for place in other.joined:
            self._join(place)

    def _join(self, place: Place) -> None:
        uses = self._uses_of(place)
        if len({self.tensors[use].shape[1] for use in uses}) == 1:
            self.tensors[place] = torch.cat([self.tensors[use] for use in uses])
            self.joined.add(place)
            for use in uses[1:]:
                del self.tensors[use]

    def _uses_of(self, place: Place) -> list[Place]:
        """Return the place and its later uses in a step."""
        uses = [place] if place in self.tensors else []
        while uses and (use := _use(place, len(uses) + 1)) in self.tensors:
            uses.append(use)
        return uses

    def rename(self, place: Place, other: Place) -> None:
        self.tensors = {other if p == place else p: tensor for p, tensor in self.tensors.items()}

    def insert_after(self, place: Place, added: dict[Place, torch.Tensor]) -> None:
        """Add places behind another one; behind all, if there is none."""
        items = list(self.tensors.items())
        at = next((i + 1 for i, (p, _) in enumerate(items) if p == place), len(items))
        self.tensors = dict([*items[:at], *added.items(), *items[at:]])

    def insert_before(self, place: Place, added: dict[Place, torch.Tensor]) -> None:
        items = list(self.tensors.items())
        at = next((i for i, (p, _) in enumerate(items) if p == place), len(items))
        self.tensors = dict([*items[:at], *added.items(), *items[at:]])

    def first_position(self, place: Place) -> int:
        """Return the position of the first row that is kept."""
        return self.num_tokens - len(self.tensors[place])


def _use(place: Place, number: int) -> Place:
    """Return the place of a later use of a module in a step."""
    return Place(f"{place.module}#{number}", place.part)


def _rows(tensor: Any, num_tokens: int) -> torch.Tensor | None:
    """Return [tokens, features] from the shapes that models use for one sequence; None: not one of them."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dim() < 2:
        return None
    if tensor.shape[0] == num_tokens or tensor.shape[:2] == (1, num_tokens):
        return tensor.reshape(num_tokens, -1)
    if tensor.dim() == 4 and tensor.shape[0] == 1 and tensor.shape[2] == num_tokens:  # heads first
        return tensor.transpose(1, 2).reshape(num_tokens, -1)
    return None


def _patches(tensor: Any) -> torch.Tensor | None:
    """Return [rows, features] of a tower's tensor, whose rows may have several dimensions; None: no features."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dim() < 2:
        return None
    return tensor.reshape(-1, tensor.shape[-1])


def kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
