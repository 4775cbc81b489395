"""What ours is made of: rows, columns and parts of the reference's tensors, of another layer, another token, or of what
a tower adds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.locate import Difference, layer_of, relative_error
from rtp_llm.tools.verify.order_causes import explain_order
from rtp_llm.tools.verify.parameter_causes import table_of
from rtp_llm.tools.verify.trace import OUTPUT, Place

MAX_SOURCES = 64  # tensors whose rows are looked at
MAX_PARTS = 16  # of a row
NUM_BASES = 3  # earlier tensors to which something may be added
ALIKE = 0.7  # of what is added: more is another matter
MIN_ROWS = 3  # from which factors of columns are told apart from chance


def earlier(evidence: Evidence, place: Place) -> list[Place]:
    """Return places of this shape before this one, outputs first and the nearest first."""
    places = list(evidence.theirs.tensors)
    places = places[: places.index(place)]
    shape = evidence.theirs.tensors[place].shape
    fitting = [p for p in reversed(places) if evidence.theirs.tensors[p].shape == shape]
    return sorted(fitting, key=lambda p: p.part != OUTPUT)[:MAX_SOURCES]


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


def other_parts(evidence: Evidence, place: Place) -> str | None:
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
        return f"{text}; the reference's is not: it has none of these {what} by itself"
    text += f"; the reference's of {_runs(yours, what)}"
    first = next((i for i, (own, right) in enumerate(zip(mine, yours, strict=True)) if own != right), None)
    if first is None or mine[first][0] != yours[first][0]:
        return text
    return f"{text}. The first that differs is {mine[first][1]} in ours, {yours[first][1]} in the reference"


def explain_added(evidence: Evidence, place: Place) -> str | None:
    """Try whether what is added to an earlier tensor is the reference's in another order, or rows of another tensor."""
    ours, theirs = evidence.pair(place)
    for p in earlier(evidence, place)[:NUM_BASES]:
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


def from_the_tower(evidence: Evidence, differences: Sequence[Difference], index: int) -> int:
    """Return the index of the first difference within a module of the tower whose output ours adds at ``index``, in the
    language model, as the reference adds its own; ``index``, if there is no such module."""
    place = differences[index].place
    parts = evidence.ours.parts
    if not parts.language_model or parts.is_tower(place.module):
        return index
    ours, theirs = evidence.pair(place)
    outputs = [p for p in evidence.theirs.tensors if p.part == OUTPUT and parts.is_tower(p.module)]
    outputs.sort(key=lambda p: p.module.count("."))  # the outermost first, whose last part has the same output
    wrong = {d.place for d in differences if d.error > evidence.tolerance}
    for base in earlier(evidence, place)[:NUM_BASES]:
        mine, yours = ours - evidence.theirs.tensors[base], theirs - evidence.theirs.tensors[base]
        rows = (yours.norm(dim=1) > evidence.tolerance * theirs.norm(dim=1)).nonzero()[:, 0]
        for p in outputs:
            if p not in wrong or evidence.theirs.tensors[p].shape != yours[rows].shape:
                continue
            pairs = zip(evidence.pair(p), (mine[rows], yours[rows]), strict=True)
            if all(relative_error(added, made) <= 10 * evidence.tolerance for made, added in pairs):
                within = (i for i, d in enumerate(differences) if d.place in wrong and _is_in(d.place, p))
                return next(within, index)
    return index


def _is_in(place: Place, other: Place) -> bool:
    return place.module == other.module or place.module.startswith(f"{other.module}.")


def describe_added(evidence: Evidence, place: Place) -> str | None:
    """Return how far what a tower of ours adds to the tensor before differs, if it is much less than what is added, and
    if that is made of a learned table of the reference: without the table nothing is added."""
    if not evidence.ours.parts.is_tower(place.module):
        return None
    ours, theirs = evidence.pair(place)
    for p in earlier(evidence, place)[:1]:
        base = evidence.theirs.tensors[p]
        ratio = float((ours - theirs).norm() / (theirs - base).norm().clamp(min=1e-30))
        table = table_of(evidence, place, base) if 0 < ratio < ALIKE else None
        if table:
            return (
                f"what is added to {p} is not quite what the reference adds: they are {ratio:.0%} apart, and it is "
                f"made of {table} (another interpolation of it, or other rows)"
            )
    return None


def columns_elsewhere(evidence: Evidence, place: Place) -> str | None:
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
