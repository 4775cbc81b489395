"""Recorders of layers with a state: ours are layers of the box, the reference's are functions of its file.

A function of the reference is known by the names of its arguments, which are those of transformers' files.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import nn

from rtp_llm.srt.layers.causal_conv import CausalConv1d
from rtp_llm.srt.layers.delta_rule import GatedDeltaRule
from rtp_llm.srt.layers.mamba import StateSpaceDual
from rtp_llm.tools.verify.recurrent_calls import (
    CONVOLVED,
    SCANNED,
    TO_CONVOLVE,
    ConvolutionCall,
    ScanCall,
    delta_rule_parts,
    dual_call,
    dual_parts,
    step_sizes,
)
from rtp_llm.tools.verify.trace import Trace

Given = Mapping[str, Any]


ChangeOfInput = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


class Recording(Protocol):
    """What a recorder of either side has."""

    trace: Trace

    def before(self, module: nn.Module, action: Callable[[tuple[Any, ...]], None]) -> None: ...

    def after(self, module: nn.Module, action: Callable[[tuple[Any, ...], Any], None]) -> None: ...

    def called(self, module: nn.Module, action: Callable[[dict[str, Any]], None]) -> None: ...

    def changed(self, module: nn.Module, given: ChangeOfInput | None, made: Callable[[Any], Any]) -> None: ...


# Ours


def watch_ours(recorder: Recording, name: str, layer: nn.Module) -> None:
    """Record a layer with a state, under the name of the module around it."""
    around = name.rpartition(".")[0]
    actions: dict[type[nn.Module], tuple[Callable[[Given], None], str]] = {
        CausalConv1d: (lambda given: _add_our_convolution(recorder.trace, around, layer, given), CONVOLVED),
        GatedDeltaRule: (lambda given: _add_our_delta_rule(recorder.trace, around, layer, given), SCANNED),
        StateSpaceDual: (lambda given: _add_our_dual(recorder.trace, around, layer, given), SCANNED),
    }
    gates = _Gates(layer)
    if isinstance(layer, CausalConv1d):
        recorder.changed(layer, gates.apply_before, lambda output: output)
    found = next((actions[kind] for kind in actions if isinstance(layer, kind)), None)
    if found is not None:
        action, part = found
        recorder.called(layer, action)
        recorder.after(layer, lambda args, output: recorder.trace.add(around, part, output))
    if isinstance(layer, CausalConv1d):
        recorder.changed(layer, None, gates.apply_after)


class _Gates:
    """Has a convolution computed without the gates that it is given: they multiply around it, as the reference does."""

    def __init__(self, layer: nn.Module) -> None:
        self._signature = inspect.signature(layer.forward)
        self._after: torch.Tensor | None = None

    def apply_before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(self._signature.bind(*args, **kwargs).arguments)
        before, self._after = given.pop("before", None), given.pop("after", None)
        return (), given if before is None else given | {"x": before * given["x"]}

    def apply_after(self, output: torch.Tensor) -> torch.Tensor:
        return output if self._after is None else self._after * output


def _add_our_convolution(trace: Trace, name: str, layer: Any, given: Given) -> None:
    trace.convolutions[name] = ConvolutionCall.of(layer.weight, layer.bias, layer.activation)
    trace.add(name, TO_CONVOLVE, given["x"])


def _add_our_delta_rule(trace: Trace, name: str, layer: Any, given: Given) -> None:
    trace.scans[name] = ScanCall("delta rule", layer.num_v_heads, layer.num_k_heads, layer.normalize)
    _add_parts(trace, name, delta_rule_parts(*(given[key] for key in ("q", "k", "v", "g", "beta"))))


def _add_our_dual(trace: Trace, name: str, layer: Any, given: Given) -> None:
    x = given["x"].unflatten(-1, (layer.num_heads, layer.head_dim))
    b = given["b"].unflatten(-1, (layer.num_groups, layer.state_size))
    trace.scans[name] = dual_call(x, b, given["d"], given["dt"], given["dt_bias"], layer.dt_limit)
    steps = step_sizes(given["dt"], given["dt_bias"], layer.dt_limit)
    _add_parts(trace, name, dual_parts(x, b, given["c"], steps, given["a"]))


def _add_parts(trace: Trace, name: str, parts: Mapping[str, torch.Tensor]) -> None:
    for part, tensor in parts.items():
        trace.add(name, part, tensor)


# The reference's


class RecurrentWatch:
    """Wraps the functions of the reference's files while it is open, and knows which module calls them."""

    def __init__(self, recorder: Recording) -> None:
        self._recorder = recorder
        self._inside: list[str] = []  # names of modules that are being computed, the innermost last
        self._replaced: list[tuple[dict[str, Any], str, Any]] = []

    def open(self, names: Mapping[nn.Module, str]) -> None:
        """Wrap the functions of these modules' files, and watch the modules of such files."""
        self._inside.clear()
        files = {type(module).__module__ for module in names}
        with_states = {file for file in files if self._wrap(file)}
        for module, name in names.items():
            if type(module).__module__ in with_states:
                self._recorder.before(module, lambda args, name=name: self._inside.append(name))  # type: ignore[misc]
                self._recorder.after(module, lambda args, output: self._leave())

    def close(self) -> None:
        while self._replaced:
            space, name, function = self._replaced.pop()
            space[name] = function
        self._inside.clear()

    def forget(self) -> None:
        """Forget the modules that a forward pass was in when it failed."""
        self._inside.clear()

    def _leave(self) -> None:
        if self._inside:  # a hook of a module that was open when a pass failed
            self._inside.pop()

    def _wrap(self, file: str) -> bool:
        """Wrap the functions of a file; return whether there are any."""
        space = vars(sys.modules[file]) if file in sys.modules else {}
        found = [(name, value, add) for name, value in list(space.items()) if (add := adder_of(value)) is not None]
        for name, function, add in found:
            self._replaced.append((space, name, function))
            space[name] = self._recording(function, add)
        return bool(found)

    def _recording(self, function: Callable[..., Any], add: "Adder") -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = function(*args, **kwargs)
            if self._inside:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                first = output[0] if isinstance(output, tuple) else output
                add(self._recorder.trace, self._inside[-1], bound.arguments, first)
            return output

        return recorded


Adder = Callable[[Trace, str, Given, torch.Tensor], None]
_DELTA_RULE = {"query", "key", "value", "g", "beta", "initial_state"}
_DUAL = {"hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "initial_states", "dt_softplus", "dt_limit"}
_CONVOLUTION = {"hidden_states", "weight", "bias", "activation"}


def adder_of(value: object) -> Adder | None:
    """Return what records the calls of a function of the reference's file; None: it is none of those known."""
    if not isinstance(value, FunctionType):
        return None
    names = set(inspect.signature(value).parameters)
    if names >= _DELTA_RULE:
        return _add_delta_rule
    if names >= _DUAL:
        return _add_dual
    if names >= _CONVOLUTION and "conv" in value.__name__ and "conv_state" not in names:
        return _add_convolution
    return None


def _add_convolution(trace: Trace, name: str, given: Given, output: torch.Tensor) -> None:
    """``hidden_states``: [1, channels, tokens], with those that the state has before them; ``output`` likewise."""
    num = trace.num_in_step
    trace.convolutions[name] = ConvolutionCall.of(given["weight"].t(), given["bias"], given["activation"])
    for part, tensor in ((TO_CONVOLVE, given["hidden_states"]), (CONVOLVED, output)):
        trace.add(name, part, tensor.transpose(1, 2)[:, -num:])


def _add_delta_rule(trace: Trace, name: str, given: Given, output: torch.Tensor) -> None:
    """All are [1, tokens, heads, ...]."""
    normalizes = bool(given.get("use_qk_l2norm_in_kernel"))
    trace.scans[name] = ScanCall("delta rule", given["value"].shape[2], given["key"].shape[2], normalizes)
    _add_parts(trace, name, delta_rule_parts(*(given[key] for key in ("query", "key", "value", "g", "beta"))))
    trace.add(name, SCANNED, output)


def _add_dual(trace: Trace, name: str, given: Given, output: torch.Tensor) -> None:
    x, b, dt, limit = given["hidden_states"], given["B"], given["dt"], given["dt_limit"]
    trace.scans[name] = dual_call(x, b, given["D"], dt, given["dt_bias"], limit)
    steps = step_sizes(dt, given["dt_bias"], limit, given["dt_softplus"])
    _add_parts(trace, name, dual_parts(x, b, given["C"], steps, given["A"]))
    trace.add(name, SCANNED, output.flatten(2))
