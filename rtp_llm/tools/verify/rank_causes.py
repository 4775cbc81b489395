"""Causes of differences between several tensor-parallel ranks and one, found by what the ranks' tensors are made of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from rtp_llm.tools.verify.evidence import Finding
from rtp_llm.tools.verify.joining import BY_COLUMNS, SAME, SUMMANDS, Joining, columns_of, joined
from rtp_llm.tools.verify.locate import Difference, first_difference, layer_of, relative_error
from rtp_llm.tools.verify.pointer import module_name
from rtp_llm.tools.verify.ranks import tensors_of
from rtp_llm.tools.verify.trace import ATTENDED, EMBEDDINGS, LOGITS, OUTPUT, AttentionCall, Place, Trace

LOOSE = 2e-3  # of differences of nearly equal numbers


@dataclass(frozen=True)
class RankEvidence:
    """What one rank and several compute of a prompt, at once.

    Args:
        model: of one rank.
        tensors: returns what modules hold on each rank, see ``tensors_of``.
    """

    model: nn.Module
    whole: Trace
    ranks: Sequence[Trace]
    tolerance: float
    tensors: Callable[[Sequence[str]], list[dict[str, torch.Tensor]]]

    def parts(self, place: Place) -> list[torch.Tensor]:
        return [trace.tensors[place] for trace in self.ranks]

    @cached_property
    def joinings(self) -> dict[Place, Joining]:
        """How the ranks' tensors make up one rank's, at places that all have, in the order of execution."""
        return {
            place: joined(self.parts(place), tensor, self.tolerance)
            for place, tensor in self.whole.tensors.items()
            if all(place in trace.tensors for trace in self.ranks)
        }

    @cached_property
    def differences(self) -> list[Difference]:
        return [
            Difference(place, 0.0 if found.how else found.error)
            for place, found in self.joinings.items()
            if place.part != LOGITS
        ]

    def before(self, place: Place, how: str) -> list[Place]:
        """Return earlier places of a kind, the nearest first."""
        places = list(self.joinings)
        return [p for p in reversed(places[: places.index(place)]) if self.joinings[p].how == how]

    def same(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        return one.shape == other.shape and relative_error(one, other) <= LOOSE


def explain_ranks(evidence: RankEvidence) -> tuple[int, Finding] | None:
    """Return the index of the first difference, and what is found there; None: all agree."""
    index = first_difference(evidence.differences, evidence.tolerance)
    if index is None:
        return _explain_rank_logits(evidence)
    place, error = evidence.differences[index]
    return index, _explain(evidence, place, error)


def _explain(evidence: RankEvidence, place: Place, error: float) -> Finding:
    for search in (_on_wrong_ranks, _not_summed, _summed_again, _bias_again, _call_of_ranks, _held_wrongly):
        found = search(evidence, place)
        if found is not None:
            where, cause = found
            return Finding(where.module, where.part, error, [cause])
    said = _own_statistics(evidence, place) or _part_of_another(evidence, place)
    return Finding(place.module, place.part, error, [said] if said else [], is_description=True)


def _explain_rank_logits(evidence: RankEvidence) -> tuple[int, Finding] | None:
    """Explain logits, where all modules agree."""
    logits = Place("", LOGITS)
    found = evidence.joinings.get(logits)
    if found is None or found.how == SAME:
        return None
    text = "logits of all ranks are wrong though what the head is given is right"
    if found.how == SUMMANDS:
        text = "each rank has its own summand of the logits: they are not summed over the ranks"
    held = _held_wrongly(evidence, Place("lm_head", OUTPUT)) if "lm_head" in _modules(evidence) else None
    where, cause = held or (Place("lm_head", LOGITS), text)
    return len(evidence.differences) - 1, Finding(where.module, where.part, found.error, [cause])


Found = tuple[Place, str] | None


def _on_wrong_ranks(evidence: RankEvidence, place: Place) -> Found:
    """Try whether an earlier place of the same block has its parts on other ranks than layers of the box put them."""
    block = place.module if place.part == ATTENDED else place.module.rpartition(".")[0]
    around = [p for p in evidence.before(place, BY_COLUMNS) if block and p.module.startswith(block)]
    wrong = [p for p in around if not evidence.joinings[p].is_in_order]
    if not wrong:
        return None
    columns = evidence.joinings[wrong[-1]].columns
    held = "; ".join(f"rank {rank} has features {_ranges(own)}" for rank, own in enumerate(columns))
    return wrong[-1], f"its heads, or features, are on the wrong ranks: of what one rank computes, {held}"


def _not_summed(evidence: RankEvidence, place: Place) -> Found:
    """Try whether what differs between the ranks are summands that were never summed."""
    whole, parts = _wrong_rows(evidence, place)
    if any(part.shape != whole.shape for part in parts):
        return None
    found: Place | None = None
    factor = 1.0
    for p in evidence.before(place, SUMMANDS):
        theirs = evidence.whole.tensors[p]
        if theirs.shape != whole.shape:
            continue
        ours, own = (torch.cat([part - x for part in of]) for of, x in ((parts, whole), (evidence.parts(p), theirs)))
        scale = float((ours * own).sum() / own.square().sum().clamp(min=1e-30))
        if abs(scale) > 1e-3 and evidence.same(ours, scale * own):
            found, factor = p, scale  # the earliest is the origin
    if found is None:
        return None
    times = "" if abs(factor - 1) < LOOSE else f", times {factor:.4g},"
    return (
        found,
        f"it is not summed over the ranks: each has a summand{times} and goes on with that. A reduction is left out "
        "(reduce_results=False without an all_reduce behind it)",
    )


def _wrong_rows(evidence: RankEvidence, place: Place) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return one rank's tensor and the ranks'; of embeddings of text and media only the rows that differ."""
    whole, parts = evidence.whole.tensors[place], evidence.parts(place)
    if place.part != EMBEDDINGS:
        return whole, parts
    differs = torch.stack([(part - whole).norm(dim=-1) > LOOSE * whole.norm(dim=-1) for part in parts]).any(dim=0)
    return whole[differs], [part[differs] for part in parts]


def _summed_again(evidence: RankEvidence, place: Place) -> Found:
    """Try whether something that every rank has counts once for each rank, as in a second sum over them."""
    (whole, parts), num = _wrong_rows(evidence, place), len(evidence.ranks)
    if any(not evidence.same(part, parts[0]) for part in parts[1:]) or parts[0].shape != whole.shape:
        return None
    extra = parts[0] - whole
    if evidence.same(parts[0], num * whole):
        return place, f"it is {num} times what one rank computes: it is summed over the ranks though each has all of it"
    if evidence.same(parts[0], whole / num):
        return place, f"it is 1 / {num} of what one rank computes: the ranks' mean, or a part that is not summed"
    for p in evidence.before(place, SAME):
        known = evidence.whole.tensors[p]
        if known.shape != whole.shape:
            continue
        factor = float((extra * known).sum() / known.square().sum().clamp(min=1e-30))
        if abs(factor) > 1e-3 and evidence.same(extra, factor * known):
            text = f"{p} counts {factor + 1:.4g} times: every rank has all of it, and it is added before a sum over"
            return place, f"{text} the ranks, or summed again"
    return None


def _bias_again(evidence: RankEvidence, place: Place) -> Found:
    """Try whether a bias is added by each rank, or by none."""
    (whole, parts), num = _wrong_rows(evidence, place), len(evidence.ranks)
    if any(not evidence.same(part, parts[0]) for part in parts[1:]) or parts[0].shape != whole.shape:
        return None
    extra = parts[0] - whole
    for name, bias in _biases(evidence, place):
        if bias.shape != extra.shape[1:]:
            continue
        if evidence.same(extra, (num - 1) * bias.expand_as(extra)):
            return Place(name, OUTPUT), f"its bias is added on every rank, and so {num} times in their sum"
        if evidence.same(extra, -bias.expand_as(extra)):
            return Place(name, OUTPUT), "its bias is added on no rank"
    return None


def _biases(evidence: RankEvidence, place: Place) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the biases of the place's module, and of others in its layer."""
    layer = layer_of(place.module)
    names = [name for name in _modules(evidence) if layer and name.startswith(f"{layer}.")]
    for name in [module_name(evidence.model, place.module), *names]:
        bias = tensors_of(evidence.model, [name]).get(f"{name}.bias")
        if bias is not None:
            yield name, bias


def _call_of_ranks(evidence: RankEvidence, place: Place) -> Found:
    """Compare what attention is called with."""
    if place.part != ATTENDED:
        return None
    whole = evidence.whole.calls[place.module]
    for rank, trace in enumerate(evidence.ranks):
        other = _call_text(trace.calls[place.module], whole)
        if other:
            return place, f"on rank {rank} {other}"
    for name in ("sinks", "slopes"):
        values = [getattr(trace.calls[place.module], name) for trace in evidence.ranks]
        right = getattr(whole, name)
        text = None if right is None or None in values else _held_text(values, right)
        if text:
            return place, f"its {'sinks' if name == 'sinks' else 'slopes of the bias by distance'}: {text}"
    return None


def _call_text(call: AttentionCall, whole: AttentionCall) -> str:
    for name, what in (("scaling", "the scores' factor"), ("window", "the window"), ("logit_cap", "the soft cap")):
        own, right = getattr(call, name), getattr(whole, name)
        if own != right:
            return f"{what} is {own}, on one rank {right}: it is made of a number that is a rank's, and not all ranks'"
    return ""


def _held_wrongly(evidence: RankEvidence, place: Place) -> Found:
    """Try whether ranks hold other parts of a tensor than of a module near the place they should."""
    for name in _near(evidence, place):
        ours = tensors_of(evidence.model, [name])
        held = evidence.tensors([name])
        for key, right in ours.items():
            if any(key not in own for own in held):
                continue
            text = _held_text([own[key] for own in held], right)
            if text:
                return Place(name, OUTPUT), f"its {key.rpartition('.')[2]} is not the ranks' own part: {text}"
    return None


def _near(evidence: RankEvidence, place: Place) -> list[str]:
    """Return the module of a place, those within, and those beside it; of parts of attention also those within."""
    name, modules = module_name(evidence.model, place.module), _modules(evidence)
    around = name.rpartition(".")[0]
    within = [other for other in modules if other.startswith(f"{name}.")]
    beside = [other for other in modules if other.rpartition(".")[0] == around and around]
    return list(dict.fromkeys([name, *within, *([around] if around else []), *beside]))


def _held_text(parts: Sequence[torch.Tensor], right: torch.Tensor) -> str | None:
    """Return how the ranks' parts are not those of a tensor; None: they are, or cannot be told."""
    if any(part.dim() != right.dim() for part in parts):
        return None
    if all(part.shape == right.shape for part in parts):
        wrong = [rank for rank, part in enumerate(parts) if not torch.allclose(part, right, rtol=1e-4, atol=1e-6)]
        return f"rank {wrong[0]} has another one than a single rank" if wrong else None
    dims = [d for d in range(right.dim()) if parts[0].shape[d] != right.shape[d]]
    if len(dims) != 1:
        return None
    whole, *own = (x.movedim(dims[0], 0).flatten(1) if x.dim() > 1 else x[:, None] for x in (right, *parts))
    places = [columns_of(part.t(), whole.t(), 1e-5) for part in own]
    what = "rows" if dims[0] == 0 else "columns"
    for rank, found in enumerate(places):
        if found is None:
            return f"rank {rank} has what is no part of it"
    columns = tuple(tuple(found) for found in places if found is not None)
    missing = sorted(set(range(len(whole))) - {i for found in columns for i in found})
    told = "; ".join(f"rank {rank} has {what} {_ranges(found)}" for rank, found in enumerate(columns))
    if missing and columns_of(whole[missing].t(), torch.cat(own).t(), 1e-5) is None:
        return f"{told}; no rank has {what} {_ranges(missing)}"
    return None if Joining(BY_COLUMNS, 0.0, columns).is_in_order or missing else f"{told}: in the wrong order"


def _own_statistics(evidence: RankEvidence, place: Place) -> str | None:
    """Try whether each rank's part is right but for a factor for each token."""
    whole, parts = evidence.whole.tensors[place], evidence.parts(place)
    if sum(part.shape[1] for part in parts) != whole.shape[1]:
        return None
    for part, right in zip(parts, whole.split([part.shape[1] for part in parts], dim=1), strict=True):
        factors = (part * right).sum(1, keepdim=True) / right.square().sum(1, keepdim=True).clamp(min=1e-30)
        if not evidence.same(part, factors * right):
            return None
    return (
        "each token's part is another multiple of the right one on each rank: its mean or sum is over the "
        "rank's own, and not over all ranks'"
    )


def _part_of_another(evidence: RankEvidence, place: Place) -> str | None:
    whole, parts = evidence.whole.tensors[place], evidence.parts(place)
    if any(part.shape == whole.shape for part in parts):
        ranks = [rank for rank, part in enumerate(parts) if not evidence.same(part, whole)]
        return f"it is right on all ranks but {', '.join(map(str, ranks))}" if 0 < len(ranks) < len(parts) else None
    columns = [columns_of(part, whole, evidence.tolerance) for part in parts]
    told = [f"rank {rank} has features {_ranges(own)}" for rank, own in enumerate(columns) if own is not None]
    return "; ".join(told) + " of what one rank computes" if told else None


def _modules(evidence: RankEvidence) -> list[str]:
    return [name for name, _ in evidence.model.named_modules() if name]


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as ranges: "0 to 3, 8 to 11"."""
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    texts = [f"{first} to {last}" if last > first else str(first) for first, last in ends[:4]]
    return ", ".join(texts) + (", ..." if len(ends) > 4 else "")
