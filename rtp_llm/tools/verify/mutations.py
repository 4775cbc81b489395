"""Changes of the reference that people make by mistake in a model file: modules left out, attributes of other values.

Each is made, the reference computed again, and what comes out compared with ours.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.parameter_causes import handed_on, reordered_rows, transposed_parameters
from rtp_llm.tools.verify.trace import Place

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh", "mish")
MAX_SECONDS = 120.0  # for changes of the reference, each of which computes a layer or all anew
MAX_COUNT = 64  # integers up to this are taken for counts, and changed by one
_POOLINGS = ((nn.AvgPool1d, F.max_pool1d), (nn.AvgPool2d, F.max_pool2d))
_NOT_CHANGED = {
    "initializer_range",
    "training",
    "is_causal",
    "layer_idx",
    "layer_id",
    "hidden_size",
    "gradient_checkpointing",
}


@dataclass(frozen=True)
class Mutation:
    """``module``: the name of what is changed, a module or another; ``text``: how, as a cause; ``made``: makes it."""

    module: str
    text: str
    made: Callable[[], AbstractContextManager[None]]


def find_mutation(evidence: Evidence, place: Place) -> Mutation | None:
    """Return the change of the reference that gives ours at a place; None: there is none among those that are tried
    within MAX_SECONDS."""
    ours, theirs = evidence.pair(place)
    deadline = time.monotonic() + MAX_SECONDS
    with evidence.replay.recording():
        right = evidence.replay.tensor(place)
        if right is None or not evidence.same(right, theirs):
            return None
        for mutation in mutations(evidence, place):
            changed = _changed(evidence, place, mutation)
            if changed is not None and evidence.same(ours, changed):
                return mutation
            if time.monotonic() > deadline:
                break
    return None


def _changed(evidence: Evidence, place: Place, mutation: Mutation) -> torch.Tensor | None:
    try:
        with mutation.made():
            return evidence.replay.tensor(place)
    except Exception:  # of any kind: the attribute cannot have that value
        return None


def without_effect(evidence: Evidence, place: Place, names: Sequence[str]) -> list[str]:
    """Return those of the modules whose absence alone gives ours at a place: all of them, or one; empty: none."""
    ours, modules = evidence.ours.tensors[place], evidence.their_modules
    sets = [list(names), *([name] for name in names if len(names) > 1)]
    with evidence.replay.recording():
        for each, change in product(sets if names else [], (_passed_on, _nothing)):
            with ExitStack() as stack:
                for name in each:
                    stack.enter_context(_hooked(modules[name], change)())
                changed = evidence.replay.tensor(place)
            if changed is not None and evidence.same(ours, changed):
                return each
    return []


def mutations(evidence: Evidence, place: Place) -> Iterator[Mutation]:
    """Yield changes of what is computed up to a place: modules left out first, then parameters and what layers are
    given, then attributes."""
    modules = {name: m for name, m in evidence.replay.modules_around(place).items() if name}
    for name, module in modules.items():
        if Place(name, "output") in evidence.theirs.tensors:
            yield Mutation(name, "it is left out: what goes in comes out", _hooked(module, _passed_on))
            yield Mutation(name, "its output is left out: nothing is added", _hooked(module, _nothing))
            yield Mutation(name, "its output counts twice", _hooked(module, _twice))
    heads = [value for key, value in vars(evidence.config).items() if "heads" in key and isinstance(value, int)]
    changes = (*transposed_parameters(modules), *handed_on(evidence, place), *reordered_rows(modules, heads))
    for what, text, made in changes:
        yield Mutation(what, text, made)
    yield from _replaced(modules)
    yield from _config_mutations(evidence)
    for name, module in modules.items():
        yield from attribute_mutations(name, module)


def _replaced(modules: Mapping[str, nn.Module]) -> Iterator[Mutation]:
    """Yield exchanges of a module by another with equally large weights."""
    leaves = {name: m for name, m in modules.items() if not list(m.children()) and list(m.parameters())}
    for (name, module), (other_name, other) in permutations(leaves.items(), 2):
        shapes = [[parameter.shape for parameter in m.parameters()] for m in (module, other)]
        if type(module) is type(other) and shapes[0] == shapes[1]:
            yield Mutation(name, f"{other_name} is used in its place", _hooked(module, _called_instead(other)))


def _called_instead(other: nn.Module) -> Callable[[Any, Any], Any]:
    return lambda given, output: other.forward(given)


def _activated(name: str) -> Callable[[Any, Any], Any]:
    return lambda given, output: get_act_fn(name)(given)


def _config_mutations(evidence: Evidence) -> Iterator[Mutation]:
    """Yield other values of numbers and switches of the configuration, which some models read while they compute."""
    for key, value in sorted(vars(evidence.config).items()):
        if isinstance(value, (bool, float)) and not key.startswith("_") and key not in _NOT_CHANGED:
            for other in _others(value):
                text = f"as if the configuration had {key} {_shown(other)}, not {_shown(value)}"
                yield Mutation(key, text, _set(evidence.config, key, other))


def attribute_mutations(name: str, module: nn.Module) -> Iterator[Mutation]:
    for key, value in sorted(vars(module).items()):
        if not key.startswith("_") and key not in _NOT_CHANGED:
            for other in _others(value):
                text = f"as if {key} of the reference's were {_shown(other)}, not {_shown(value)}"
                yield Mutation(name, text, _set(module, key, other))
    for key, child in module.named_children():
        if type(child).__name__ in ("ReLU", "SiLU", "GELU", "Sigmoid", "Tanh") or "ctivation" in type(child).__name__:
            for act in ACTIVATIONS:
                text = f"it computes {act}, the reference {type(child).__name__}"
                yield Mutation(f"{name}.{key}", text, _hooked(child, _activated(act)))
        for mean, maximum in _POOLINGS:
            if isinstance(child, mean):
                text = f"it takes the maximum of each window, the reference the mean ({type(child).__name__})"
                yield Mutation(f"{name}.{key}", text, _hooked(child, _pooled(maximum, child)))


def _pooled(function: Callable[..., torch.Tensor], pool: Any) -> Callable[[Any, Any], Any]:
    return lambda given, output: function(given, pool.kernel_size, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)


def _others(value: Any) -> Iterator[Any]:
    """Yield values that may stand in the place of an attribute's."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, float) and value:
        root = value**0.5 if value > 0 else 0.0
        yield from (other for other in (1.0, 0.0, math.inf, None, 1 / value, value**2, root) if other != value)
    elif isinstance(value, int) and 1 <= value <= MAX_COUNT:
        yield from (value + 1, value - 1)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _set(module: Any, key: str, value: Any) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def made() -> Iterator[None]:
        before = getattr(module, key)
        setattr(module, key, value)
        try:
            yield
        finally:
            setattr(module, key, before)

    return made


def _hooked(module: nn.Module, change: Callable[[Any, Any], Any]) -> Callable[[], AbstractContextManager[None]]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        first = output[0] if isinstance(output, tuple) else output
        if given is None or not isinstance(first, torch.Tensor):
            raise ValueError("it takes or returns no tensor")
        changed = change(given, first)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    @contextmanager
    def made() -> Iterator[None]:
        handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    return made


def _passed_on(given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    if given.shape != output.shape:
        raise ValueError("input and output have other shapes")
    return given


def _nothing(given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)


def _twice(given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return 2 * output
