"""The contract between engine and model files: what a model and its layers may declare besides their mathematics.

A model file imports none of this: it declares a trait by an attribute or a method of that name. The tables in
docs/supported_models/support_new_models.md explain each trait.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import nn

from rtp_llm.srt.cache.spec import CacheSpec, LengthScaling, StateSpec
from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.gguf.form import GGUFForm, is_form


class TraitError(ValueError):
    """A trait of a model is misspelt, or has the wrong form."""


# Traits of models


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """The traits of a model; those that it does not declare, or sets to None, have these defaults."""

    packed_modules_mapping: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rename: Sequence[tuple[str, str]] = ()
    ignore: Sequence[str] = ()
    weight_defaults: Mapping[str, str] = field(default_factory=dict)
    load_weights: Callable[[Iterable[tuple[str, torch.Tensor]]], object] | None = None
    forward_batch: Callable[[ForwardBatch], Any] | None = None
    pad_input_ids: Callable[[list[int], Any], Sequence[int]] | None = None
    max_positions: int | None = None
    max_media_block: int = 0
    replays_steps: bool = True
    config_class: type | None = None
    gguf: GGUFForm | Sequence[GGUFForm] = ()
    poolers: Mapping[str, Any] = field(default_factory=dict)
    generates: bool = True

    @classmethod
    def of(cls, model: object) -> Self:
        """Read the traits of a model, or of its class before it is built (without properties).

        Raises:
            TraitError: a trait of the model or of one of its layers is misspelt, or has the wrong form.
        """
        _check_spelling(model)
        declared: dict[str, Any] = {}
        for trait in fields(cls):
            value = getattr(model, trait.name, None)
            if value is None or isinstance(value, property):
                continue
            form, is_right = _FORMS[trait.name]
            if not is_right(value):
                name = (model if isinstance(model, type) else type(model)).__name__
                raise TraitError(f"{name}.{trait.name} must be {form}, not {value!r}")
            declared[trait.name] = value
        return cls(**declared)


def _is_list(value: object, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_right, value))


def _is_mapping(value: object, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(map(_is_name, value)) and all(map(is_right, value.values()))


def _is_name(value: object) -> bool:
    return isinstance(value, str)


def _is_regex(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# The form of each trait, in words and as a test.
_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "packed_modules_mapping": (
        'a dict {module: [modules of the checkpoint in it]}, such as {"gate_up_proj": ["gate_proj", "up_proj"]}',
        lambda value: _is_mapping(value, lambda sources: _is_list(sources, _is_name)),
    ),
    "rename": (
        "a list of pairs (regular expression, replacement)",
        lambda value: _is_list(value, lambda pair: _is_list(pair, _is_name) and len(pair) == 2 and _is_regex(pair[0])),
    ),
    "ignore": ("a list of regular expressions", lambda value: _is_list(value, _is_regex)),
    "weight_defaults": ("a dict {parameter: other parameter}", lambda value: _is_mapping(value, _is_name)),
    "load_weights": ("a method", callable),
    "forward_batch": ("a method", callable),
    "pad_input_ids": ("a method", callable),
    "max_positions": ("a number of tokens", _is_count),
    "max_media_block": ("a number of tokens", _is_count),
    "replays_steps": ("True or False", lambda value: isinstance(value, bool)),
    "gguf": ("a GGUFForm, or a tuple of them", is_form),
    "poolers": (
        'a dict {task: Pooler}, such as {"embed": Pooler("mean", width=384, finish="normalize")}',
        lambda value: _is_mapping(value, callable),
    ),
    "generates": ("True or False", lambda value: isinstance(value, bool)),
    "config_class": ("a dataclass or a transformers configuration", lambda value: isinstance(value, type)),
}


# Traits of layers


@runtime_checkable
class KeepsCache(Protocol):
    """Keeps something of each token for later steps. Layers with the same ``layer_id`` share it."""

    @property
    def layer_id(self) -> int: ...

    def cache_spec(self) -> CacheSpec: ...


@runtime_checkable
class KeepsState(Protocol):
    """Keeps something of a whole sequence for its next tokens. Layers with the same ``layer_id`` have other names."""

    @property
    def layer_id(self) -> int: ...

    def state_spec(self) -> StateSpec: ...


@runtime_checkable
class PreparesForward(Protocol):
    """Computes something once a step, before the model runs."""

    def prepare_for_forward(self, forward_batch: ForwardBatch, /) -> None: ...


@runtime_checkable
class ReplaysForward(PreparesForward, Protocol):
    """Lists the tensors that it prepared, so that recorded steps can use the next step's. Else none are recorded."""

    def step_tensors(self) -> list[torch.Tensor]: ...


@runtime_checkable
class ScalesWithLength(Protocol):
    """Makes keys that depend on the length of their sequence, unless ``length_scaling`` is None."""

    length_scaling: LengthScaling | None


@runtime_checkable
class TakesMropePositions(Protocol):
    """Reads ``forward_batch.mrope_positions``, which are made if a module has True here."""

    takes_mrope_positions: bool


@runtime_checkable
class SeesWholePrompts(Protocol):
    """Attention in which tokens of a prompt see those behind them, if True: all of the model's, or none."""

    sees_whole_prompts: bool


@runtime_checkable
class NamesSources(Protocol):
    """Has other names for its parameters: {checkpoint name: (parameter, shard id)}, relative to the module."""

    @property
    def weight_sources(self) -> Mapping[str, tuple[str, Any]]: ...


@runtime_checkable
class FinishesLoad(Protocol):
    """Computes something from its weights once all are loaded."""

    def finish_load(self) -> None: ...


LAYER_TRAITS = frozenset(
    {
        "cache_spec",
        "finish_load",
        "length_scaling",
        "prepare_for_forward",
        "sees_whole_prompts",
        "state_spec",
        "step_tensors",
        "takes_mrope_positions",
        "weight_sources",
    }
)
MODEL_TRAITS = frozenset(trait.name for trait in fields(ModelTraits)) | LAYER_TRAITS


# Misspelt names

_ALIKE = 0.85  # difflib's ratio: one letter of six differs, two of eleven, three of eighteen
_FOREIGN = {"abc", "builtins", "torch", "transformers", "transformers_modules", "typing"}  # not model files


def _check_spelling(model: object) -> None:
    """Raise TraitError for a name that is almost a trait's: it would silently have no effect.

    All other names are a model's own.
    """
    owner = model if isinstance(model, type) else type(model)
    if owner is not model:
        _check_names(owner.__name__, frozenset(vars(model)), MODEL_TRAITS)
    traits_of: dict[type, frozenset[str]] = {owner: MODEL_TRAITS}
    for module in model.modules() if isinstance(model, nn.Module) else ():
        traits_of.setdefault(type(module), LAYER_TRAITS)
    for kind, traits in traits_of.items():
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] not in _FOREIGN:
                _check_names(base.__name__, frozenset(vars(base)), traits)


@cache
def _check_names(owner: str, names: frozenset[str], traits: frozenset[str]) -> None:
    for name in sorted(names - traits):
        alike = [] if name.startswith("_") else get_close_matches(name, traits - names, 1, _ALIKE)
        if alike:
            raise TraitError(
                f"{owner}.{name} is not among what the engine reads: is {alike[0]} meant? If it is something else, "
                "begin its name with an underscore"
            )
