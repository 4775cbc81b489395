"""What ours is in terms of the reference's tensors at the same place and before it: a factor, an offset, a part that is
missing, a gate, limits."""

from collections.abc import Iterator, Mapping
from itertools import permutations

import torch
import torch.nn.functional as F

from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.locate import layer_of
from rtp_llm.tools.verify.number_names import ratio_name
from rtp_llm.tools.verify.rounding_causes import describe_rounding
from rtp_llm.tools.verify.row_causes import (
    MAX_SOURCES,
    MIN_ROWS,
    columns_elsewhere,
    describe_added,
    earlier,
    other_parts,
    other_rows,
)
from rtp_llm.tools.verify.trace import OUTPUT, Place

NAMELESS = "which is not a parameter or a gate of the reference"
MAX_RUNS = 5  # of columns that have one factor


def explain_relation(evidence: Evidence, place: Place) -> str | None:
    """Return the first relation that holds, and that names what it is."""
    searches = (
        _column_factors,
        _row_factors,
        _difference,
        _gated,
        other_rows,
        other_parts,
        columns_elsewhere,
        _limits,
    )
    causes = (search(evidence, place) for search in searches)
    return next((cause for cause in causes if cause and not cause.endswith(NAMELESS)), None)


def describe_relation(evidence: Evidence, place: Place) -> str | None:
    """Return the first relation that holds, though it may not name what the factors are."""
    searches = (_column_factors, describe_rounding, _row_factors, _difference, _other_factor, describe_added)
    return next((cause for search in searches if (cause := search(evidence, place))), None)


def _column_factors(evidence: Evidence, place: Place) -> str | None:
    """Try ``ours = factor * theirs + offset``, with a factor and an offset for each column."""
    ours, theirs = evidence.pair(place)
    if len(ours) < MIN_ROWS:
        return None
    centred = theirs - theirs.mean(0)
    factor = ((ours - ours.mean(0)) * centred).sum(0) / centred.square().sum(0).clamp(min=1e-30)
    for slope in (torch.ones_like(factor), factor):
        offset = (ours - slope * theirs).mean(0)
        is_offset = bool(offset.abs().max() > 1e-3 * theirs.abs().mean())
        if evidence.same(ours, slope * theirs + (offset if is_offset else 0)):
            texts = [] if bool((slope == 1).all()) else [_factor_text(slope, evidence)]
            if is_offset and not _is_bias_of_factor(offset, slope, evidence.their_parameters):
                texts.append(_offset_text(offset, evidence.their_parameters))
            return "; ".join(texts) or None
    return None


def _factor_text(factor: torch.Tensor, evidence: Evidence) -> str:
    for name, parameter in _vectors(evidence.their_parameters, len(factor)):
        for text, value in (
            (f"{name} is not multiplied", 1 / parameter),
            (f"{name} is multiplied where the reference does not, or twice", parameter),
            (f"1 + {name} is multiplied in place of {name}", (1 + parameter) / parameter),
            (f"{name} is multiplied in place of 1 + {name}", parameter / (1 + parameter)),
        ):
            if torch.allclose(factor, value, rtol=1e-2, atol=1e-5):
                return text
    if (same := _constant(factor)) is not None:
        return f"every component is multiplied by {same:.6g}"
    runs = _constant_runs(factor)
    if len(runs) <= MAX_RUNS:
        named = [(run, ratio_name(run[2], evidence.config)) for run in runs if run[2] != 1]
        return ", ".join(
            f"columns {first} to {last} are multiplied by {value:.4g}{f' ({name})' if name else ''}"
            for (first, last, value), name in named
        )
    return f"each column has a factor of its own (weights of a norm, a scale), {NAMELESS}"


def _constant_runs(values: torch.Tensor) -> list[tuple[int, int, float]]:
    """Return (first, last, number) of neighbours that are the same number; those that are nearly one are one."""
    runs: list[tuple[int, int, float]] = []
    for i, value in enumerate(values.tolist()):
        value = 1.0 if abs(value - 1) < 1e-3 else value
        if runs and abs(value - runs[-1][2]) <= 1e-3 * abs(value):
            runs[-1] = (runs[-1][0], i, runs[-1][2])
        else:
            runs.append((i, i, value))
    return runs


def _constant(values: torch.Tensor) -> float | None:
    """Return the number that all values are; None: they are several."""
    mean = float(values.mean())
    is_constant = bool((values - mean).abs().max() <= 1e-3 * abs(mean))
    return (float(round(mean)) if abs(mean - round(mean)) < 1e-3 else mean) if is_constant and mean else None


def _is_bias_of_factor(offset: torch.Tensor, factor: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a bias is added rightly, after a wrong factor: ``factor * (x + b) + offset = factor * x + b``."""
    biases = (value for _, value in _vectors(parameters, len(offset)))
    return any(torch.allclose(offset, bias * (1 - factor), rtol=1e-2, atol=1e-4) for bias in biases if bias.any())


def _offset_text(offset: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> str:
    for name, parameter in _vectors(parameters, len(offset)):
        if torch.allclose(offset, -parameter, rtol=1e-2, atol=1e-4):
            return f"{name} is not added"
        if torch.allclose(offset, parameter, rtol=1e-2, atol=1e-4):
            return f"{name} is added where the reference does not, or twice"
    if (same := _constant(offset)) is not None:
        hint = (
            "" if abs(same) != 1 else f" ({'bias + 1, or 1 + ...' if same > 0 else '1 + ...'} where it does not belong)"
        )
        return f"{abs(same):.6g} is {'added to' if same > 0 else 'missing from'} every component{hint}"
    return f"the same is added to all rows (a bias, an embedding), {NAMELESS}"


def _vectors(parameters: Mapping[str, torch.Tensor], size: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in parameters.items():
        if parameter.dim() >= 1 and parameter.shape[-1] == size and parameter.numel() <= MAX_SOURCES * size:
            for i, row in enumerate(parameter.reshape(-1, size)):
                yield (name if parameter.numel() == size else f"row {i} of {name}"), row


def _row_factors(evidence: Evidence, place: Place) -> str | None:
    """Try ``ours = factor * theirs`` with a factor for each row."""
    ours, theirs = evidence.pair(place)
    if theirs.shape[1] < MIN_ROWS:
        return None
    factor = (ours * theirs).sum(1) / theirs.square().sum(1).clamp(min=1e-30)
    if not evidence.same(ours, factor[:, None] * theirs):
        return None
    for text, value in _norms_of(theirs):
        if torch.allclose(factor, value, rtol=1e-2):
            return text
    for text, value in _norms_of(ours):
        if torch.allclose(1 / factor, value, rtol=1e-2):
            return text.replace("it is ", "it is not ")
    for name, gate in _gates(evidence, place):
        for text, value in ((f"not multiplied by {name}", 1 / gate), (f"multiplied by {name}, or twice", gate)):
            if torch.allclose(factor, value, rtol=1e-2):
                return f"it is {text}"
    values = ", ".join(f"{value:.4g}" for value in factor[:3].tolist())
    return f"each token has a factor of its own ({values}, ...; a gate, a norm, a scale by position), {NAMELESS}"


def _norms_of(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield "it is normalised (root mean square), without weight", x.square().mean(1).clamp(min=1e-30).rsqrt()
    yield "it is normalised to length 1", 1 / x.norm(dim=1).clamp(min=1e-30)


def _gates(evidence: Evidence, place: Place) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the reference has one number of for each token: outputs, and functions of them."""
    num_rows = len(evidence.theirs.tensors[place])
    for p, tensor in evidence.theirs.tensors.items():
        if p.part == OUTPUT and tensor.shape[1] == 1 and len(tensor) >= num_rows:
            value = tensor[-num_rows:, 0]
            yield f"sigmoid of {p}", value.sigmoid()
            yield f"tanh of {p}", value.tanh()
            yield str(p), value


def _difference(evidence: Evidence, place: Place) -> str | None:
    """Try whether ours and the reference's differ by a multiple of one tensor, the same or another for each token."""
    ours, theirs = evidence.pair(place)
    difference = ours - theirs
    significant = difference.norm(dim=1) > evidence.tolerance * theirs.norm(dim=1)
    for p in earlier(evidence, place):
        tensor = evidence.theirs.tensors[p]
        factor = float((difference * tensor).sum() / tensor.square().sum().clamp(min=1e-30))
        if abs(abs(factor) - 1) < 1e-3 and evidence.same(ours, theirs + factor * tensor):
            return f"{p} is not added" if factor < 0 else f"{p} is added once more"
    for p in earlier(evidence, place):
        cause = _scaled_columns(evidence, difference, theirs, p)
        if cause:
            return cause
    for p in earlier(evidence, place):
        tensor = evidence.theirs.tensors[p]
        factors = (difference * tensor).sum(1) / tensor.square().sum(1).clamp(min=1e-30)
        if evidence.same(ours, theirs + factors[:, None] * tensor) and bool(significant.any()):
            gates = [("1: not at all", torch.ones(len(ours))), ("0: it is missing", torch.zeros(len(ours)))]
            known = list(_gates(evidence, place))
            gates += [*known, *((f"2 times {name}", 2 * gate) for name, gate in known)]
            pairs = [
                (f"{p} is multiplied by {mine}; in the reference by {yours}", right)
                for (mine, own), (yours, right) in permutations(gates, 2)
                if torch.allclose(factors, own - right, rtol=1e-2, atol=1e-4)
            ]
            for text, right in pairs:  # what the reference's own factor is, the rest of its sum tells
                if _is_known(evidence, place, theirs - right[:, None] * tensor):
                    return text
            if pairs:
                return pairs[0][0]
            return f"{p} counts with other factors, one for each token, {NAMELESS}"
    return None


def _is_known(evidence: Evidence, place: Place, tensor: torch.Tensor) -> bool:
    return any(evidence.same(tensor, evidence.theirs.tensors[p]) for p in earlier(evidence, place))


def _scaled_columns(evidence: Evidence, difference: torch.Tensor, theirs: torch.Tensor, place: Place) -> str | None:
    """Try whether a part counts with other factors of its columns: with or without a vector of parameters."""
    tensor = evidence.theirs.tensors[place]
    if len(tensor) < MIN_ROWS:
        return None
    factors = (difference * tensor).sum(0) / tensor.square().sum(0).clamp(min=1e-30)
    if not evidence.same(theirs + difference, theirs + factors * tensor):
        return None
    vectors = list(_vectors(evidence.their_parameters, len(factors)))
    for name, parameter in vectors:
        if torch.allclose(factors, 1 - parameter, rtol=1e-2, atol=1e-4):
            return f"{place} is not multiplied by {name}"
        if torch.allclose(factors, parameter - 1, rtol=1e-2, atol=1e-4):
            return f"{place} is multiplied by {name}, in the reference not"
    near = [(name, value) for name, value in vectors if layer_of(name) == layer_of(place.module)]
    for (name, own), (other, right) in permutations(near, 2):
        if torch.allclose(factors, own - right, rtol=1e-2, atol=1e-4):
            return f"{place} is multiplied by {name}, in the reference by {other}"
    return None


def _other_factor(evidence: Evidence, place: Place) -> str | None:
    """Try whether ours and the reference's differ by any multiple of one tensor."""
    ours, theirs = evidence.pair(place)
    for p in earlier(evidence, place):
        tensor = evidence.theirs.tensors[p]
        factor = float(((ours - theirs) * tensor).sum() / tensor.square().sum().clamp(min=1e-30))
        if abs(factor) > 1e-6 and evidence.same(ours, theirs + factor * tensor):
            return f"{p} has another factor: ours is the reference's {factor:+.6g} times it"
    return None


def _gated(evidence: Evidence, place: Place) -> str | None:
    """Try whether one side is the other times a function of an earlier tensor: a gate that is missing or not."""
    ours, theirs = evidence.pair(place)
    for p in earlier(evidence, place):
        tensor = evidence.theirs.tensors[p]
        for name, function in (("sigmoid", torch.sigmoid), ("silu", F.silu), ("tanh", torch.tanh), ("", None)):
            gate = tensor if function is None else function(tensor)
            named = f"{name} of {p}" if name else str(p)
            if evidence.same(ours * gate, theirs):
                return f"it is not multiplied by {named}"
            if evidence.same(ours, theirs * gate):
                return f"it is multiplied by {named}, in the reference not"
    return None


def _limits(evidence: Evidence, place: Place) -> str | None:
    """Try rounding, and limits of the values on one side."""
    ours, theirs = evidence.pair(place)
    for dtype in (torch.bfloat16, torch.float16):
        is_rounded, is_right = (torch.equal(x, x.to(dtype).float()) for x in (ours, theirs))
        if is_rounded and not is_right and torch.allclose(ours, theirs, rtol=2e-2, atol=1e-3):
            return f"it is rounded to {str(dtype).removeprefix('torch.')}, the reference is not"
    for text, limited, other in (("the reference limits", theirs, ours), ("it limits", ours, theirs)):
        low, high = float(limited.min()), float(limited.max())
        if evidence.same(limited, other.clamp(low, high)) and not evidence.same(limited, other):
            return f"{text} values to [{low:.6g}, {high:.6g}]"
    return None
