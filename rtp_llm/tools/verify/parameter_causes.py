"""Experiments on single parameters of the reference, and on what its layers are given beside the hidden states: it is
computed anew with one of them changed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.trace import INPUT, Place

MAX_HANDED_ON = 64  # earlier tensors that a layer is given in the place of an argument
Change = tuple[str, str, Callable[[], AbstractContextManager[None]]]  # (what is changed, how, makes it)


def table_of(evidence: Evidence, place: Place, base: torch.Tensor) -> str | None:
    """Return the table of the reference without which a place's tensor is ``base``; None: there is none."""
    width = base.shape[1]
    with evidence.replay.recording():
        for module, holder in evidence.names.items():
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() < 2 or parameter.shape[-1] != width or isinstance(module, nn.Linear):
                    continue
                with _changed(parameter, torch.zeros_like(parameter)):
                    tensor = evidence.replay.tensor(place, whole=True)
                if tensor is not None and evidence.same(base, tensor):
                    return f"{holder}.{key}"
    return None


def transposed_parameters(modules: Mapping[str, nn.Module]) -> Iterator[Change]:
    """Yield the square parameters of modules, each transposed."""
    for holder, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and parameter.shape[-1] == parameter.shape[-2] > 1:
                yield holder, f"its {key} is used transposed", _maker(parameter)


def _maker(parameter: nn.Parameter) -> Callable[[], AbstractContextManager[None]]:
    return lambda: _changed(parameter, parameter.data.transpose(-1, -2).contiguous())


@contextmanager
def _changed(parameter: nn.Parameter, other: torch.Tensor) -> Iterator[None]:
    before = parameter.data
    parameter.data = other
    try:
        yield
    finally:
        parameter.data = before


def handed_on(evidence: Evidence, place: Place) -> Iterator[Change]:
    """Yield what a layer may be given in the place of an argument: earlier tensors of the reference, as large."""
    tensors = evidence.theirs.tensors
    before = list(tensors)[: list(tensors).index(place)]
    for name, given in evidence.replay.arguments(place).items():
        fitting = [p for p in reversed(before) if p.part != INPUT and tensors[p].numel() == given.numel()]
        for p in fitting[:MAX_HANDED_ON]:
            other = _in_form_of(given, tensors[p])
            if other is not None and not torch.equal(other, given):
                text = f"the layer is given {p} as {name}: earlier layers hand on another tensor than the reference's"
                yield f"{name} of its layer", text, _giver(evidence, place, name, other)


def _giver(
    evidence: Evidence, place: Place, name: str, other: torch.Tensor
) -> Callable[[], AbstractContextManager[None]]:
    return lambda: evidence.replay.argument(place, name, other)


def _in_form_of(given: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """Return rows [tokens, features] in the form of a layer's argument: [1, tokens, ...] or [1, heads, tokens, size];
    None: it is neither."""
    rows = rows.to(given.device, given.dtype)
    if given.dim() == 4 and given.shape[0] == 1 and given.shape[2] == len(rows):
        return rows.view(len(rows), given.shape[1], given.shape[3]).transpose(0, 1)[None]
    return rows.view(given.shape) if given.shape[:2] == (1, len(rows)) else None
