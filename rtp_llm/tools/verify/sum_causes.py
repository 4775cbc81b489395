"""Ours as other tensors of the reference: of another place, a multiple, a sum, what a module makes of a sum."""

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import nn

from rtp_llm.tools.verify.activation_causes import is_before
from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.locate import layer_of
from rtp_llm.tools.verify.number_names import factor_reason, is_named, value_name
from rtp_llm.tools.verify.order_causes import explain_order
from rtp_llm.tools.verify.row_causes import earlier as earlier_places
from rtp_llm.tools.verify.step_causes import step_between
from rtp_llm.tools.verify.trace import INPUT, KEYS, OUTPUT, QUERIES, UNROTATED, Place

ELSEWHERE = "it is what the reference has as"
NEARBY = 24  # places of the reference before and after one that are tried
ROUGH = 1e-4  # of a target's square, that a sum may miss before it is compared closely
MAX_SUMMED = 12  # earlier tensors of which sums are given to modules


def own_order(evidence: Evidence, place: Place) -> str | None:
    """Try the reference's values in another order, also before a table of the module, such as positions, is added."""
    ours, theirs = evidence.pair(place)
    found = explain_order(ours, theirs, evidence.tolerance)
    if found:
        return found
    for name, parameter in evidence.their_parameters.items():
        if not name.startswith(f"{place.module}.") or parameter.dim() < 2 or parameter.shape[-1] != theirs.shape[1]:
            continue
        table = parameter.reshape(-1, theirs.shape[1])
        if len(table) > 1 and len(theirs) % len(table) == 0 and bool(table.any()):
            added = table.repeat(len(theirs) // len(table), 1)
            found = explain_order(ours - added, theirs - added, 10 * evidence.tolerance)
            if found:
                return f"before {name} is added, {found}"
    return None


def _nearby(evidence: Evidence, place: Place) -> list[Place]:
    """Return places of the reference with tensors of this shape, the nearest first, earlier before later ones."""
    places = list(evidence.theirs.tensors)
    here = places.index(place)
    shape = evidence.ours.tensors[place].shape
    fitting = [p for p in places if evidence.theirs.tensors[p].shape == shape and p != place]
    fitting.sort(key=lambda p: (p.part != place.part, abs(places.index(p) - here)))
    return [p for p in fitting if abs(places.index(p) - here) <= NEARBY]


def elsewhere(evidence: Evidence, place: Place) -> str | None:
    ours = evidence.ours.tensors[place]
    for other in _nearby(evidence, place):
        if evidence.same(ours, evidence.theirs.tensors[other]):
            step = step_between(evidence, place, other)
            return f"{ELSEWHERE} {other}{f', {step}' if step else ': a wrong slot or order'}"
    return None


def early_rotation(evidence: Evidence, place: Place) -> str | None:
    """Try whether the input of a norm of heads has already been rotated by our attention."""
    attention = place.module.rpartition(".")[0]
    unrotated = (evidence.theirs.tensors[place], evidence.ours.tensors[place])
    for part in (QUERIES, KEYS):
        before = evidence.ours.tensors.get(Place(attention, UNROTATED[part]))
        if before is not None and evidence.same(before, unrotated[0]):
            return f"it comes after the rotary embedding, which in the reference follows it: it is given rotated {part}"
    return None


def named_multiple(evidence: Evidence, place: Place) -> str | None:
    """Try a multiple whose factor is exactly what the configuration's numbers make: that says more than another place
    with the same values."""
    factor = _factor(evidence, place)
    return None if factor is None or not is_named(factor, evidence.config) else multiple(evidence, place)


def multiple(evidence: Evidence, place: Place) -> str | None:
    """Try ours as a multiple of the reference's."""
    factor = _factor(evidence, place)
    if factor is None:
        return None
    reason = _of_a_table(evidence, place, factor) or factor_reason(factor, evidence.config)
    return f"it is the reference's times {factor:.6g}: {reason}"


def _factor(evidence: Evidence, place: Place) -> float | None:
    """Return f with ``ours == f * theirs``; None: there is none."""
    ours, theirs = evidence.pair(place)
    factor = float((ours * theirs).sum() / theirs.square().sum().clamp(min=1e-30))
    return factor if abs(factor) > 1e-6 and evidence.same(ours, factor * theirs) else None


def _of_a_table(evidence: Evidence, place: Place, factor: float) -> str | None:
    """Return what both sides multiply the rows of an embedding's table by; None: it is no embedding, or the reference's
    rows are no multiples of its table's."""
    module, theirs = evidence.their_modules.get(place.module), evidence.theirs.tensors[place]
    if place.part != OUTPUT or not isinstance(module, nn.Embedding) or module.weight.shape[1] != theirs.shape[1]:
        return None
    table = module.weight.detach().float().cpu()
    rows = table[(theirs @ table.t() / table.norm(dim=1).clamp(min=1e-30)).abs().argmax(dim=1)]
    own = float((theirs * rows).sum() / rows.square().sum().clamp(min=1e-30))
    if not evidence.same(theirs, own * rows):
        return None
    right = f"the reference by {value_name(own, evidence.config)}" if abs(own - 1) > 1e-3 else "the reference does not"
    mine = value_name(factor * own, evidence.config)
    return (
        f"ours multiplies the table's rows by {mine}, {right}"
        if abs(factor * own - 1) > 1e-3
        else (f"ours has the table's rows as they are, {right.replace('by', 'multiplies by', 1)}")
    )


def combination(evidence: Evidence, place: Place) -> str | None:
    """Try ours and the reference's as sums of two multiples of the reference's earlier tensors."""
    earlier = [p for p in _nearby(evidence, place) if is_before(evidence.theirs, p, place)]
    earlier.sort(key=lambda p: p.part != OUTPUT)  # outputs first: a tensor's origin explains more than its use
    ours = _sum(evidence, evidence.ours.tensors[place], earlier, 2)
    theirs = _sum(evidence, evidence.theirs.tensors[place], earlier, 2)
    if ours is None:
        distinct = _distinct(evidence, earlier_places(evidence, place))
        ours = _sum(evidence, evidence.ours.tensors[place], distinct, 3)
        theirs = theirs or (_sum(evidence, evidence.theirs.tensors[place], distinct, 3) if ours else None)
    if ours is None:
        return None
    return f"a sum of something else: ours is {ours}" + (f"; the reference's is {theirs}" if theirs else "")


def _distinct(evidence: Evidence, places: Sequence[Place]) -> list[Place]:
    """Return the first MAX_SUMMED of places that have other tensors than those before them."""
    found: list[Place] = []
    for p in places:
        tensor = evidence.theirs.tensors[p]
        if len(found) < MAX_SUMMED and not any(evidence.same(tensor, evidence.theirs.tensors[q]) for q in found):
            found.append(p)
    return found


def _sum(evidence: Evidence, target: torch.Tensor, places: Sequence[Place], num: int) -> str | None:
    """Return the target as a sum of multiples of so many tensors of the reference; None: it is none."""
    finite = [p for p in places if bool(evidence.theirs.tensors[p].isfinite().all())]
    if not bool(target.isfinite().all()) or target.numel() <= num or len(finite) < num:
        return None
    columns = torch.stack([evidence.theirs.tensors[p].flatten() for p in finite]).double()
    sought = target.flatten().double()
    gram, products, size = columns @ columns.t(), columns @ sought, float(sought.square().sum())
    for chosen in combinations(range(len(finite)), num):
        own = list(chosen)
        factors = torch.linalg.lstsq(gram[own][:, own], products[own, None]).solution[:, 0]
        if size - float(factors @ products[own]) > ROUGH * size or factors.abs().min() <= 1e-3:
            continue
        if evidence.same((factors @ columns[own]).float().view(target.shape), target):
            return " + ".join(
                f"{finite[i]}" if abs(factor - 1) < 1e-3 else f"{value_name(factor, evidence.config, 4)} * {finite[i]}"
                for factor, i in zip(factors.tolist(), own, strict=True)
            )
    return None


def module_of_sum(evidence: Evidence, place: Place) -> str | None:
    """Try ours as what a module of the layer makes of an earlier tensor or of a sum of two: a norm that is applied once
    more, or to the sum of input and attention's output where blocks stand side by side."""
    layer = layer_of(place.module)
    modules = {
        name: module
        for name, module in evidence.their_modules.items()
        if layer_of(name) == layer and not list(module.children()) and list(module.parameters())
    }
    for text, names, given in _summands(evidence, place, layer):
        for name, module in modules.items():
            made = _made_by(module, given, evidence.ours.tensors[place].shape)
            if made is not None and evidence.same(evidence.ours.tensors[place], made):
                if _takes_the_place(evidence, place, name, given):
                    return None
                return f"it is {name} of ({text}){_instead(evidence, place, name, names)}"
    return None


def _takes_the_place(evidence: Evidence, place: Place, module: str, given: torch.Tensor) -> bool:
    """Return whether the reference has what another module makes of the same input: that is told as an exchange."""
    tensors, theirs = evidence.theirs.tensors, evidence.theirs.tensors[place]
    return any(
        evidence.same(tensors[Place(p.module, INPUT)], given)
        for p in _before(evidence, place, OUTPUT)
        if p.module != module and Place(p.module, INPUT) in tensors and evidence.same(tensors[p], theirs)
    )


def _instead(evidence: Evidence, place: Place, module: str, names: Sequence[Place]) -> str:
    """Say what the reference has in the place of a module's output, and what follows from that."""
    theirs = evidence.theirs.tensors[place]
    right = next(
        (p for p in _before(evidence, place, OUTPUT) if evidence.same(theirs, evidence.theirs.tensors[p])), None
    )
    text = "" if right is None else f"; the reference has {right} here"
    given = evidence.theirs.tensors.get(Place(module, INPUT))
    if right != Place(module, OUTPUT) or given is None or len(names) < 2:
        return text
    is_given = [evidence.same(evidence.theirs.tensors[p], given) for p in names]
    if not any(is_given):
        return text
    return f"{text}. Your blocks follow one another, the reference's stand side by side"


def _before(evidence: Evidence, place: Place, part: str) -> list[Place]:
    places = list(evidence.theirs.tensors)
    return [p for p in reversed(places[: places.index(place)]) if p.part == part]


def _summands(evidence: Evidence, place: Place, layer: str) -> Iterator[tuple[str, list[Place], torch.Tensor]]:
    """Yield earlier tensors of a layer and sums of two of them, each tensor once."""
    places, tensors = list(evidence.theirs.tensors), evidence.theirs.tensors
    found: list[Place] = []
    for p in reversed(places[: places.index(place)]):
        is_own = p.part in (INPUT, OUTPUT) and layer_of(p.module) == layer
        if is_own and len(found) < MAX_SUMMED and not any(evidence.same(tensors[p], tensors[q]) for q in found):
            found.append(p)
    found.reverse()
    yield from ((str(p), [p], tensors[p]) for p in found)
    for p, q in combinations(found, 2):
        if tensors[p].shape == tensors[q].shape:
            yield f"{p} + {q}", [p, q], tensors[p] + tensors[q]


@torch.inference_mode()
def _made_by(module: nn.Module, given: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """Return a module's output for rows, or for each head in them; None: it does not take them."""
    parameter = next(module.parameters())
    width = parameter.shape[-1]
    x = given.to(parameter.device, parameter.dtype)
    if parameter.dim() == 1 and width != x.shape[-1] and x.shape[-1] % width == 0:
        x = x.unflatten(-1, (-1, width))
    try:
        made = module(x[None])
    except Exception:  # of any kind: it takes something else
        return None
    return (
        made.float().cpu().reshape(shape) if isinstance(made, torch.Tensor) and made.numel() == shape.numel() else None
    )
