"""What ours is in terms of the reference's tensors at the same place and before it: a factor, a part that is missing,
rows of another tensor."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F

from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.locate import layer_of
from rtp_llm.tools.verify.order_causes import explain_order
from rtp_llm.tools.verify.parameter_causes import table_of
from rtp_llm.tools.verify.trace import OUTPUT, Place

MAX_SOURCES = 64  # tensors whose rows are looked at
NAMELESS = "which is not a parameter or a gate of the reference"
MAX_PARTS = 16  # of a row
NUM_BASES = 3  # earlier tensors to which something may be added
ALIKE = 0.7  # of what is added: more is another matter
MIN_ROWS = 3  # from which factors of columns are told apart from chance


def explain_relation(evidence: Evidence, place: Place) -> str | None:
    """Return the first relation that holds, and that names what it is."""
    searches = (
        _column_factors,
        _row_factors,
        _difference,
        _gated,
        other_rows,
        _other_parts,
        _other_columns,
        _limits,
    )
    causes = (search(evidence, place) for search in searches)
    return next((cause for cause in causes if cause and not cause.endswith(NAMELESS)), None)


def describe_relation(evidence: Evidence, place: Place) -> str | None:
    """Return the first relation that holds, though it may not name what the factors are."""
    searches = (_column_factors, _row_factors, _difference, _other_factor, describe_added)
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
            texts = [] if bool((slope == 1).all()) else [_factor_text(slope, evidence.their_parameters)]
            if is_offset and not _is_bias_of_factor(offset, slope, evidence.their_parameters):
                texts.append(_offset_text(offset, evidence.their_parameters))
            return "; ".join(texts) or None
    return None


def _factor_text(factor: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> str:
    for name, parameter in _vectors(parameters, len(factor)):
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
    return f"each column has a factor of its own (weights of a norm, a scale), {NAMELESS}"


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
    for p in _earlier(evidence, place):
        tensor = evidence.theirs.tensors[p]
        factor = float((difference * tensor).sum() / tensor.square().sum().clamp(min=1e-30))
        if abs(abs(factor) - 1) < 1e-3 and evidence.same(ours, theirs + factor * tensor):
            return f"{p} is not added" if factor < 0 else f"{p} is added once more"
    for p in _earlier(evidence, place):
        cause = _scaled_columns(evidence, difference, theirs, p)
        if cause:
            return cause
    for p in _earlier(evidence, place):
        tensor = evidence.theirs.tensors[p]
        factors = (difference * tensor).sum(1) / tensor.square().sum(1).clamp(min=1e-30)
        if evidence.same(ours, theirs + factors[:, None] * tensor) and bool(significant.any()):
            gates = [("1: not at all", torch.ones(len(ours))), ("0: it is missing", torch.zeros(len(ours)))]
            gates += _gates(evidence, place)
            for (mine, own), (yours, right) in permutations(gates, 2):
                if torch.allclose(factors, own - right, rtol=1e-2, atol=1e-4):
                    return f"{p} is multiplied by {mine}; in the reference by {yours}"
            return f"{p} counts with other factors, one for each token, {NAMELESS}"
    return None


def _scaled_columns(evidence: Evidence, difference: torch.Tensor, theirs: torch.Tensor, place: Place) -> str | None:
    """Try whether a part counts with other factors of its columns: with or without a vector of parameters."""
    tensor = evidence.theirs.tensors[place]
    if len(tensor) < MIN_ROWS:
        return None
    factors = (difference * tensor).sum(0) / tensor.square().sum(0).clamp(min=1e-30)
    if not evidence.same(theirs + difference, theirs + factors * tensor):
        return None
    for name, parameter in _vectors(evidence.their_parameters, len(factors)):
        if torch.allclose(factors, 1 - parameter, rtol=1e-2, atol=1e-4):
            return f"{place} is not multiplied by {name}"
        if torch.allclose(factors, parameter - 1, rtol=1e-2, atol=1e-4):
            return f"{place} is multiplied by {name}, in the reference not"
    return None


def _other_factor(evidence: Evidence, place: Place) -> str | None:
    """Try whether ours and the reference's differ by any multiple of one tensor."""
    ours, theirs = evidence.pair(place)
    for p in _earlier(evidence, place):
        tensor = evidence.theirs.tensors[p]
        factor = float(((ours - theirs) * tensor).sum() / tensor.square().sum().clamp(min=1e-30))
        if abs(factor) > 1e-6 and evidence.same(ours, theirs + factor * tensor):
            return f"{p} has another factor: ours is the reference's {factor:+.6g} times it"
    return None


def _earlier(evidence: Evidence, place: Place) -> list[Place]:
    """Return places of this shape before this one, outputs first and the nearest first."""
    places = list(evidence.theirs.tensors)
    places = places[: places.index(place)]
    shape = evidence.theirs.tensors[place].shape
    fitting = [p for p in reversed(places) if evidence.theirs.tensors[p].shape == shape]
    return sorted(fitting, key=lambda p: p.part != OUTPUT)[:MAX_SOURCES]


def _gated(evidence: Evidence, place: Place) -> str | None:
    """Try whether one side is the other times a function of an earlier tensor: a gate that is missing or not."""
    ours, theirs = evidence.pair(place)
    for p in _earlier(evidence, place):
        tensor = evidence.theirs.tensors[p]
        for name, function in (("sigmoid", torch.sigmoid), ("silu", F.silu), ("tanh", torch.tanh), ("", None)):
            gate = tensor if function is None else function(tensor)
            named = f"{name} of {p}" if name else str(p)
            if evidence.same(ours * gate, theirs):
                return f"it is not multiplied by {named}"
            if evidence.same(ours, theirs * gate):
                return f"it is multiplied by {named}, in the reference not"
    return None


def other_rows(evidence: Evidence, place: Place) -> str | None:
    """Try whether each row of ours is a row of some tensor of the reference: of another layer, another token, ..."""
    ours, theirs = evidence.pair(place)
    sources = _row_sources(evidence, place, ours.shape[1])
    mine = _origins(ours, sources | {str(place): theirs}, evidence.tolerance)
    yours = _origins(theirs, sources, evidence.tolerance)
    here = str(place)
    if mine is not None and yours is not None:  # never by the place itself
        mine = [yours[row] if name == here else (name, row) for name, row in mine]
    if mine is not None and any(name == here for name, _ in mine):
        return f"its rows are the reference's at other places: {_runs(mine).replace(f' of {here}', '')}"
    return None if mine is None else _made_of(mine, yours, "rows") + _feature_layer(evidence, mine, yours)


def _feature_layer(evidence: Evidence, mine: list[tuple[str, int]], yours: list[tuple[str, int]] | None) -> str:
    """Return the configuration's field that chooses layers of a tower, if rows are another layer's; empty: they are
    not, or there is none."""
    own, right = ({layer_of(name.partition(" of ")[2]) for name, _ in origins} for origins in (mine, yours or ()))
    if not own or not right or own == right or "" in own | right:
        return ""
    fields = {key: value for key, value in vars(evidence.their_model.config).items() if "feature_layer" in key}
    return "".join(f". The configuration has {key} {value}" for key, value in fields.items() if value is not None)


def origin_of(evidence: Evidence, place: Place, rows: torch.Tensor) -> str | None:
    """Return of what the reference's given rows at a place are made, if that is one tensor before it."""
    found = _origins(rows, _row_sources(evidence, place, rows.shape[1]), evidence.tolerance)
    names = {name for name, _ in found or ()}
    return names.pop() if len(names) == 1 else None


def _other_parts(evidence: Evidence, place: Place) -> str | None:
    """Try the same of equal parts of a row, merged patches: of another layer, or with the class token among them."""
    ours, theirs = evidence.pair(place)
    for num in range(2, MAX_PARTS + 1):
        if ours.shape[1] % num or ours.shape[1] // num < MIN_ROWS:
            continue
        sources = _row_sources(evidence, place, ours.shape[1] // num)
        parts = [x.unflatten(1, (num, -1)).flatten(0, 1) for x in (ours, theirs)]
        mine, yours = (_origins(x, sources, evidence.tolerance) for x in parts)
        if mine is not None and mine != yours:
            return _made_of(mine, yours, f"rows (as its {num} parts)")
    return None


def _row_sources(evidence: Evidence, place: Place, width: int) -> dict[str, torch.Tensor]:
    """Return what rows may come from: the reference's tensors of this width before the place, and parameters."""
    places = list(evidence.theirs.tensors)
    here = places.index(place)
    before = sorted(places[:here], key=lambda p: (p.part != OUTPUT, here - places.index(p)))
    sources = {str(p): t for p in before if (t := evidence.theirs.tensors[p]).shape[1] == width}
    vectors = {
        name: p.reshape(-1, width)
        for name, p in evidence.their_parameters.items()
        if _is_table(p, width) or (name.startswith(f"{place.module}.") and p.dim() == 2 and p.shape[1] == width)
    }
    return dict(list(sources.items())[: 4 * MAX_SOURCES]) | vectors


def _made_of(mine: list[tuple[str, int]], yours: list[tuple[str, int]] | None, what: str) -> str:
    text = f"it is made of {_runs(mine, what)}"
    if yours is None:
        return text
    text += f"; the reference's of {_runs(yours, what)}"
    first = next((i for i, (own, right) in enumerate(zip(mine, yours, strict=True)) if own != right), None)
    if first is None or mine[first][0] != yours[first][0]:
        return text
    return f"{text}. The first that differs is {mine[first][1]} in ours, {yours[first][1]} in the reference"


def explain_added(evidence: Evidence, place: Place) -> str | None:
    """Try whether what is added to an earlier tensor is the reference's in another order, or rows of another tensor."""
    ours, theirs = evidence.pair(place)
    for p in _earlier(evidence, place)[:NUM_BASES]:
        base = evidence.theirs.tensors[p]
        mine, yours = ours - base, theirs - base
        rows = (mine.norm(dim=1) > evidence.tolerance * base.norm(dim=1)).nonzero()[:, 0]
        if len(rows) < 2 or not bool((mine[rows] - yours[rows]).any()):
            continue
        order = explain_order(mine[rows], yours[rows], 10 * evidence.tolerance)
        if order:
            return f"what is added to {p}: {order}"
        sources = {n: t for n, t in _row_sources(evidence, place, ours.shape[1]).items() if n != str(p)}
        own, right = (_origins(x[rows], sources, 10 * evidence.tolerance) for x in (mine, yours))
        if own is not None and own != right:
            return f"what is added to {p}: {_made_of(own, right, 'rows')}"
    return None


def describe_added(evidence: Evidence, place: Place) -> str | None:
    """Return how far what a tower of ours adds to the tensor before differs, if it is much less than what is added, and
    if that is made of a learned table of the reference: without the table nothing is added."""
    if not evidence.ours.parts.is_tower(place.module):
        return None
    ours, theirs = evidence.pair(place)
    for p in _earlier(evidence, place)[:1]:
        base = evidence.theirs.tensors[p]
        ratio = float((ours - theirs).norm() / (theirs - base).norm().clamp(min=1e-30))
        table = table_of(evidence, place, base) if 0 < ratio < ALIKE else None
        if table:
            return (
                f"what is added to {p} is not quite what the reference adds: they are {ratio:.0%} apart, and it is "
                f"made of {table} (another interpolation of it, or other rows)"
            )
    return None


def _other_columns(evidence: Evidence, place: Place) -> str | None:
    """Try whether each column of ours is a column of another tensor of the reference: parts of a fused projection."""
    ours, theirs = evidence.pair(place)
    if len(ours) < MIN_ROWS:
        return None
    num = len(ours)
    tensors = {str(p): evidence.theirs.tensors[p] for p in _around(evidence, place) if p.part == OUTPUT and p != place}
    sources = {name: tensor[-num:].T for name, tensor in tensors.items() if len(tensor) >= num}
    mine, yours = (_origins(x.T, sources, evidence.tolerance) for x in (ours, theirs))
    if mine is None or mine == yours:
        return None
    return _made_of(mine, yours, "columns")


def other_columns(evidence: Evidence, place: Place, ours: torch.Tensor) -> str | None:
    """Return of which columns of the reference's outputs around a place ours are made; None: of others, too."""
    tensors = {str(p): evidence.theirs.tensors[p] for p in _around(evidence, place) if p.part == OUTPUT}
    sources = {name: tensor[-len(ours) :].T for name, tensor in tensors.items() if len(tensor) >= len(ours)}
    found = _origins(ours.T, sources, evidence.tolerance) if len(ours) >= MIN_ROWS else None
    return None if found is None else _runs(found, "columns")


def _is_table(parameter: torch.Tensor, width: int) -> bool:
    return parameter.dim() >= 1 and parameter.shape[-1] == width and parameter.numel() <= MAX_SOURCES * width


def _around(evidence: Evidence, place: Place) -> list[Place]:
    places = list(evidence.theirs.tensors)
    here = places.index(place)
    return sorted(places, key=lambda p: (p.part != OUTPUT, abs(places.index(p) - here)))[: 4 * MAX_SOURCES]


def _origins(rows: torch.Tensor, sources: Mapping[str, torch.Tensor], tolerance: float) -> list[tuple[str, int]] | None:
    """Return (source, row of it) of each row; None: not all are found. Few sources are preferred."""
    found: list[tuple[str, int] | None] = [None] * len(rows)
    sizes = rows.norm(dim=1).clamp(min=1e-30)
    counted: list[tuple[int, str, Any]] = []
    for name, source in sources.items():
        if len(source):
            nearest = torch.cdist(rows, source, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
            fits = nearest.values <= tolerance * sizes
            counted.append((int(fits.sum()), name, (fits.tolist(), nearest.indices.tolist())))
    counted.sort(key=lambda item: -item[0])
    for _, name, (fits, indices) in counted:
        for i, (is_it, index) in enumerate(zip(fits, indices, strict=True)):
            if is_it and found[i] is None:
                found[i] = (name, index)
    return None if None in found else [origin for origin in found if origin is not None]


def _runs(origins: list[tuple[str, int]], what: str = "rows") -> str:
    """Describe origins by runs of neighbouring rows."""
    runs: list[list[Any]] = []
    for name, row in origins:
        if runs and runs[-1][0] == name and row == runs[-1][2] + 1:
            runs[-1][2] = row
        else:
            runs.append([name, row, row])
    if len(runs) > 3:
        counts = Counter(name for name, _ in origins)
        return ", ".join(f"{number} {what} of {name}" for name, number in counts.most_common(3))
    shown = [f"{first}" if first == last else f"{first} to {last}" for _, first, last in runs]
    texts = [f"{what} {rows} of {name}" for rows, (name, _, _) in zip(shown, runs, strict=True)]
    return ", ".join(texts)


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
