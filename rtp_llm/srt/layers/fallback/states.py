"""States of a model that transformers runs: modules that keep one are found once, then computed with states of ours.

Such a module computes whole sequences: each from its first token on, or all of them from states on. So its call for the
tokens of a step becomes calls for pieces of sequences: for those of equal length that begin, or go on, in one call.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from rtp_llm.srt.cache.spec import StateSpec, StateTensor
from rtp_llm.srt.forward_batch import ForwardBatch, StateWave
from rtp_llm.srt.layers.fallback.cache import KeepsStates, Key, ServedCache, States
from rtp_llm.srt.layers.fallback.masks import UnservableModelError
from rtp_llm.srt.layers.fallback.own_states import own_states
from rtp_llm.srt.state_pool import StatePool

KEPT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(eq=False)
class Call:
    """A module's call in a pass over one sequence, [1, T, ...]; ``keys``: of the states that it asked for."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    keys: list[Key] = field(default_factory=list)

    def __str__(self) -> str:
        layers = sorted({key.layer_idx for key in self.keys})
        return f"{type(self.module).__name__} (layer {', '.join(map(str, layers))})"


class StateProbe:
    """Finds the calls of modules that keep states, in a pass over one sequence with this cache."""

    def __init__(self, cache: ServedCache) -> None:
        self.calls: list[Call] = []
        self.places: list[KeepsStates] = []  # where the module of each call has its states
        self._cache = cache
        self._running: list[Call] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(self._enter, with_kwargs=True) for module in model.modules()]
        handles += [module.register_forward_hook(self._leave) for module in model.modules()]
        self._cache.probe = self._record
        try:
            yield
        finally:
            self._cache.probe = None
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(Call(module, args, kwargs))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, own = self._running.pop(), own_states(module)
        call.output = output
        if own is not None:
            call.keys.extend(own.states(output))
            self.calls.append(call)
            self.places.append(own)

    def _record(self, key: Key) -> None:
        call = self._running[-1]
        other = next((other for other in self.calls if other is not call and key in other.keys), None)
        if other is not None:
            name = type(call.module).__name__
            raise UnservableModelError(f"{name} uses the state {key} of another module, {other}")
        if call not in self.calls:
            self.calls.append(call)
            self.places.append(self._cache)
        if key not in call.keys:
            call.keys.append(key)

    def check(self, attending: Sequence[nn.Module]) -> None:
        """Raise UnservableModelError if a module that keeps states attends, or holds one that does either."""
        others = {id(module) for module in attending}
        keeping = {id(call.module) for call in self.calls}
        for call in self.calls:
            for module in call.module.modules():
                if id(module) in others or (module is not call.module and id(module) in keeping):
                    raise UnservableModelError(
                        f"{call} keeps a state, and within it {type(module).__name__} attends or keeps another: its "
                        "sequences cannot be computed apart"
                    )


@dataclass(slots=True)
class Pieces:
    """Pieces of a wave that are computed in one call: N of L tokens.

    Args:
        places: [N] int64, which ones of the wave; None: all, in order.
        tokens: [N, L] int64, their tokens among the step's.
        are_new: they begin their sequences.
    """

    places: torch.Tensor | None
    tokens: torch.Tensor
    are_new: bool


def pieces_of(wave: StateWave) -> list[Pieces]:
    """Group a wave's pieces by their lengths, and by whether they begin a sequence."""
    device, bounds = wave.load.device, wave.cu_seqlens_cpu
    groups: dict[tuple[int, bool], list[int]] = {}
    for place, (slot, start, end) in enumerate(zip(wave.load.tolist(), bounds, bounds[1:], strict=False)):
        groups.setdefault((end - start, slot == 0), []).append(place)
    found = []
    for (length, are_new), places in groups.items():
        starts = torch.tensor([bounds[place] for place in places], device=device)
        tokens = starts[:, None] + torch.arange(length, device=device)
        if wave.tokens is not None:
            tokens = wave.tokens[tokens]
        found.append(Pieces(None if len(groups) == 1 else torch.tensor(places, device=device), tokens, are_new))
    return found


class Steps:
    """The step that is being served. While none is, modules compute as transformers has them."""

    def __init__(self) -> None:
        self.pool: StatePool | None = None
        self.waves: list[tuple[StateWave, list[Pieces]]] = []

    @contextmanager
    def serving(self, batch: ForwardBatch) -> Iterator[None]:
        self.pool = batch.state_pool
        self.waves = [(wave, pieces_of(wave)) for wave in batch.state_waves]
        try:
            yield
        finally:
            self.pool, self.waves = None, []


class StateKeeper(nn.Module):
    """A module of the model, as a layer of ours that keeps states.

    Args:
        call: of the module in the pass over a sequence of ``num_tokens``.
        place: where the module has its states.

    Raises:
        UnservableModelError: it keeps what cannot be kept here.
    """

    def __init__(self, call: Call, layer_id: int, num_tokens: int, place: KeepsStates, steps: Steps) -> None:
        super().__init__()
        self.layer_id = layer_id
        self._name, self._plain, self._place, self._steps = str(call), call.module.forward, place, steps
        leaves, self._form = tree_flatten((call.args, call.kwargs))
        self._is_by_token = [is_by_token(leaf, num_tokens) for leaf in leaves]
        self._returns_by_token = [is_by_token(leaf, num_tokens) for leaf in tree_flatten(call.output)[0]]
        states = place.states(call.output)
        self._like = {key: self._checked(key, states.get(key)) for key in call.keys}
        self.goes_on_by_several = self._reads_states(leaves)
        call.module.forward = self._compute

    def _checked(self, key: Key, state: torch.Tensor | None) -> torch.Tensor:
        if state is None or state.dtype not in KEPT_DTYPES or state.shape[0] != 1:
            what = "nothing" if state is None else f"a tensor {list(state.shape)} of {state.dtype}"
            raise UnservableModelError(f"{self._name} keeps {what} as its state {key}, which is not served here")
        return torch.empty_like(state, device="meta")

    def state_spec(self) -> StateSpec:
        return StateSpec(
            tuple(
                StateTensor(str(key), tuple(state.shape[1:]), str(state.dtype).removeprefix("torch."))
                for key, state in self._like.items()
            )
        )

    def _reads_states(self, leaves: list[Any]) -> bool:
        """Return whether a call for two tokens goes on from every state: if one holds NaN, so does the output.

        Some modules take any call for several tokens for the beginning of a sequence.
        """
        device = self._first_by_token(leaves).device
        tokens = torch.arange(2, device=device)[None]
        for broken in self._like:
            states = {key: torch.zeros_like(state, device=device) for key, state in self._like.items()}
            states[broken].fill_(float("nan"))
            output = [leaf for leaf in self._call(leaves, tokens, states, are_new=False)[0] if leaf is not None]
            if not any(bool(leaf.isnan().any()) for leaf in output):
                return False
        return True

    def _first_by_token(self, leaves: list[Any]) -> torch.Tensor:
        return next(leaf for leaf, of in zip(leaves, self._is_by_token, strict=True) if of)

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module for all tokens of a step, with states of the pool."""
        pool = self._steps.pool
        if pool is None:
            return self._plain(*args, **kwargs)
        leaves, form = tree_flatten((args, kwargs))
        if form != self._form:
            raise RuntimeError(f"{self._name} is called with other arguments than at loading")
        kept = {key: pool.tensor(self.layer_id, str(key)) for key in self._like}
        output = _Output(self._first_by_token(leaves).shape[1])
        for wave, groups in self._steps.waves:
            states = {key: tensor[wave.load] for key, tensor in kept.items()}
            for pieces in groups:
                own = states if pieces.places is None else {key: s[pieces.places] for key, s in states.items()}
                output.put(*self._call_for(leaves, pieces, own), pieces.tokens)
                if pieces.places is not None:
                    for key, state in states.items():
                        state[pieces.places] = own[key]
            for key, tensor in kept.items():
                tensor[wave.store] = states[key]
        return output.joined()

    def _call_for(self, leaves: list[Any], pieces: Pieces, states: States) -> "_Leaves":
        """Call the module as often as it needs for pieces; ``states`` change in place."""
        if len(pieces.tokens) > 1 and not self._place.takes_several_rows:
            rows = []
            for i, tokens in enumerate(pieces.tokens.split(1)):
                own = {key: state[i : i + 1] for key, state in states.items()}
                rows.append(self._call_for(leaves, Pieces(None, tokens, pieces.are_new), own))
            return _cat(rows, dim=0)
        if pieces.are_new or self.goes_on_by_several:
            return self._call(leaves, pieces.tokens, states, pieces.are_new)
        return _cat([self._call(leaves, token, states, False) for token in pieces.tokens.split(1, dim=1)], dim=1)

    def _call(self, leaves: list[Any], tokens: torch.Tensor, states: States, are_new: bool) -> "_Leaves":
        """Call the module for ``tokens`` [N, L] of what it is given for all tokens [1, T, ...].

        Of the output, tensors that do not have a row for each token are left out.
        """
        given = [leaf[0, tokens] if of else leaf for leaf, of in zip(leaves, self._is_by_token, strict=True)]
        args, kwargs = tree_unflatten(given, self._form)
        output, form = tree_flatten(self._place.call(self._plain, args, kwargs, states, are_new))
        return [leaf if of else None for leaf, of in zip(output, self._returns_by_token, strict=True)], form


_Leaves = tuple[list[torch.Tensor | None], TreeSpec]  # an output's tensors, [N, L, ...], and its form


def _cat(outputs: list[_Leaves], dim: int) -> _Leaves:
    joined = [
        None if parts[0] is None else torch.cat([part for part in parts if part is not None], dim)
        for parts in zip(*(leaves for leaves, _ in outputs), strict=True)
    ]
    return joined, outputs[0][1]


class _Output:
    """A module's output for all tokens of a step, [1, T, ...], put together from its outputs for pieces."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._whole: list[torch.Tensor | None] = []
        self._form: TreeSpec | None = None

    def put(self, leaves: list[torch.Tensor | None], form: TreeSpec, tokens: torch.Tensor) -> None:
        """Add the output of pieces, [N, L, ...], of ``tokens`` [N, L] of the step."""
        if self._form is None:
            self._form = form
            self._whole = [
                None if leaf is None else leaf.new_empty(1, self._num_tokens, *leaf.shape[2:]) for leaf in leaves
            ]
        for whole, leaf in zip(self._whole, leaves, strict=True):
            if whole is not None and leaf is not None:
                whole[0, tokens] = leaf

    def joined(self) -> Any:
        if self._form is None:
            raise RuntimeError("the step has tokens, but no pieces for layers that keep states")
        return tree_unflatten(self._whole, self._form)


def is_by_token(value: Any, num_tokens: int) -> bool:
    """Whether a value of a pass over one sequence has a row for each token, [1, num_tokens, ...]."""
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[:2] == (1, num_tokens)
