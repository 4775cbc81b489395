"""States at the boundaries of a prompt's pieces: what ours keeps in its slot beside what transformers' cache keeps.

Each side lays its states out in a form of its own. Ours is that of ``kernels/recurrent.py``: a convolution's last
inputs [kernel_size - 1, channels], the oldest first, and a matrix [keys, values] for each head.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rtp_llm.srt.layers.causal_conv import CausalConv1d
from rtp_llm.srt.model_traits import KeepsState
from rtp_llm.srt.state_pool import StatePool
from rtp_llm.tools.verify.locate import relative_error

SLOT = 1  # of the one request that runs
MARK = 1232.0  # stands in states that nothing was stored to; a number of every dtype
CONVOLUTION, RECURRENT = "convolution's state", "recurrent state"


@dataclass(frozen=True)
class State:
    """A state of ours. ``module``: the one around the layer that keeps it; ``kind``: in words; ``layer``, ``name``: the
    layer that keeps it, and what that calls it."""

    module: str
    kind: str
    layer_id: int
    tensor: torch.Tensor  # float32 on the host
    layer: str = ""
    name: str = ""

    @property
    def is_marked(self) -> bool:
        """Nothing was stored since ``mark_states``."""
        return bool((self.tensor == MARK).all())


@dataclass(frozen=True)
class StatePair:
    """A state of both sides after the first ``position`` tokens, in our form: [tokens or heads, ...] each."""

    module: str
    kind: str
    position: int
    ours: torch.Tensor
    theirs: torch.Tensor

    @property
    def error(self) -> float:
        return relative_error(self.ours.flatten(1), self.theirs.flatten(1))

    @property
    def part(self) -> str:
        return f"{self.kind} after {self.position} tokens"


class StateLog:
    """The states of both sides after so many tokens of a prompt."""

    def __init__(self) -> None:
        self.ours: dict[int, list[State]] = {}
        self.theirs: dict[int, list[list[torch.Tensor]]] = {}

    def pairs(self) -> list[StatePair]:
        """Return the states that both sides have, those of earlier positions first."""
        return [
            pair
            for position in sorted(self.ours.keys() & self.theirs.keys())
            for pair in _paired(self.ours[position], self.theirs[position], position)
        ]


def our_states(model: nn.Module, pool: StatePool) -> list[State]:
    """Return copies of the states of the request in ``SLOT``."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, KeepsState):
            around = name.rpartition(".")[0]
            kind = CONVOLUTION if isinstance(module, CausalConv1d) else RECURRENT
            for tensor in module.state_spec().tensors:
                state = pool.tensor(module.layer_id, tensor.name)[SLOT]
                found.append(State(around, kind, module.layer_id, _host(state), name, tensor.name))
    return found


def forget_states(model: nn.Module, pool: StatePool) -> None:
    """Set the states of the request in ``SLOT`` to zero."""
    for module in model.modules():
        if isinstance(module, KeepsState):
            for tensor in module.state_spec().tensors:
                pool.tensor(module.layer_id, tensor.name)[SLOT].zero_()


def mark_states(model: nn.Module, pool: StatePool, spare: int) -> None:
    """Copy the states of the request in ``SLOT`` to a spare slot, and fill ``SLOT`` with MARK."""
    for module in model.modules():
        if isinstance(module, KeepsState):
            for tensor in module.state_spec().tensors:
                states = pool.tensor(module.layer_id, tensor.name)
                states[spare] = states[SLOT]
                states[SLOT].fill_(MARK)


def their_states(cache: Any) -> list[list[torch.Tensor]]:
    """Return copies of the states of each layer of transformers' cache; none for layers without.

    MiniMax's cache has them in a list beside its layers.
    """
    beside = getattr(cache, "linear_cache", ())
    layers = getattr(cache, "layers", ())
    kept = [
        [_host(state[0]) for states in _kept_by(layer) for state in states.values() if state is not None]
        for layer in layers
    ]
    kept += [[] for _ in range(len(beside) - len(kept))]
    for layer, state in zip(kept, beside, strict=False):
        layer += [_host(state[0])] if isinstance(state, torch.Tensor) else []
    return kept


def _kept_by(layer: Any) -> Sequence[Mapping[int, torch.Tensor | None]]:
    return [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _paired(ours: Sequence[State], theirs: Sequence[Sequence[torch.Tensor]], position: int) -> Iterator[StatePair]:
    for state in ours:
        mine = torch.atleast_2d(state.tensor)
        layer = theirs[state.layer_id] if state.layer_id < len(theirs) else ()
        forms = [form for tensor in layer for form in _forms(tensor) if form.shape == mine.shape]
        if forms:  # of square matrices either form may be meant
            pairs = [StatePair(state.module, state.kind, position, mine, form) for form in forms]
            yield min(pairs, key=lambda pair: pair.error)


def _forms(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a state of transformers in the forms that ours may have: as it is, or, with its last axes exchanged, all of
    it or without a convolution's oldest column, which no later token reads."""
    yield torch.atleast_2d(tensor)
    if tensor.dim() > 1:
        yield tensor.transpose(-1, -2)
        yield tensor.t()[1:] if tensor.dim() == 2 else tensor
