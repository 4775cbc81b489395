"""What the reference makes of a tensor of its own that ours has in the place of a later or an earlier one: what it adds
to that, or which module makes the one of the other."""

from collections.abc import Iterator
from itertools import pairwise

import torch

from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.number_names import value_name
from rtp_llm.tools.verify.trace import INPUT, OUTPUT, Place

MIN_SIZE = 1e-3  # of what is added, relative to what it is added to


def step_between(evidence: Evidence, place: Place, other: Place) -> str | None:
    """Return how the reference comes from its tensor at ``other``, which is what ours has at ``place``, to its own
    there, or the other way round; None: by more than one addition or module."""
    theirs, elsewhere = evidence.theirs.tensors[place], evidence.theirs.tensors[other]
    module = _module_between(evidence, elsewhere, theirs)
    if module:
        return f"of which {module} makes what the reference has here"
    module = _module_between(evidence, theirs, elsewhere)
    if module:
        return f"which {module} makes of what the reference has here"
    added = theirs - elsewhere
    if float(added.norm()) <= MIN_SIZE * float(elsewhere.norm()):
        return None
    text = next(_addends(evidence, place, added), None)
    if text:
        return f"to which the reference then adds {text}{_added_by_ours(evidence, place, added)}"
    text = next(_addends(evidence, place, -added), None)
    return f"which is what the reference has here and {text}" if text else None


def _module_between(evidence: Evidence, given: torch.Tensor, made: torch.Tensor) -> str | None:
    """Return the module of the reference that makes one tensor of the other."""
    tensors = evidence.theirs.tensors
    through = (p.module for p in tensors if p.part == INPUT and evidence.same(tensors[p], given))
    outputs = ((name, tensors.get(Place(name, OUTPUT))) for name in through)
    return next((name for name, output in outputs if output is not None and evidence.same(output, made)), None)


def _addends(evidence: Evidence, place: Place, added: torch.Tensor) -> Iterator[str]:
    """Yield what is added: a tensor of the reference before a place or a parameter, or a multiple of it, or its rows in
    some rows alone."""
    tensors = evidence.theirs.tensors
    places = list(tensors)
    before = sorted(reversed(places[: places.index(place)]), key=lambda p: p.part != OUTPUT)
    sizes = added.norm(dim=1)
    rows = (sizes > evidence.tolerance * sizes.max()).nonzero()[:, 0]
    for p in before:
        factor = _factor(evidence, added, tensors[p])
        if factor is not None:
            yield f"{_times(evidence, factor)}{p}"
    for name, parameter in evidence.their_parameters.items():
        if parameter.numel() == added.shape[1]:
            factor = _factor(evidence, added, parameter.reshape(1, -1).expand_as(added))
            if factor is not None:
                yield f"{_times(evidence, factor)}{name}"
    for p in before:
        factor = _factor(evidence, added[rows], tensors[p]) if len(rows) < len(added) else None
        if factor is not None:
            which = f"{len(rows)} of {len(added)} rows, the first of them row {int(rows[0])}"
            yield f"{_times(evidence, factor)}{p} (to {which})"


def _factor(evidence: Evidence, target: torch.Tensor, tensor: torch.Tensor) -> float | None:
    """Return f > 0 with ``target == f * tensor``; None: there is none."""
    if tensor.shape != target.shape or not bool(tensor.isfinite().all()):
        return None
    factor = float((target * tensor).sum() / tensor.square().sum().clamp(min=1e-30))
    fits = factor > 1e-6 and evidence.same(target, factor * tensor)
    return factor if fits else None


def _times(evidence: Evidence, factor: float) -> str:
    return "" if abs(factor - 1) < 1e-3 else f"{value_name(factor, evidence.config, 4)} * "


def _added_by_ours(evidence: Evidence, place: Place, added: torch.Tensor) -> str:
    """Say to what ours adds the same, later than the reference; empty: to nothing that is recorded."""
    tensors = evidence.ours.tensors
    places = list(tensors)
    later = [p for p in places[places.index(place) :] if tensors[p].shape == added.shape]
    to = next((p for p, q in pairwise(later) if evidence.same(tensors[q] - tensors[p], added)), None)
    return "" if to is None else f"; ours adds that to {to}"
