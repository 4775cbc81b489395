"""Whether one tensor is another with its rows, columns or parts in another order, and which order that is."""

from collections.abc import Iterator, Sequence

import torch

MAX_ROWS = 4096  # compared with each other
MAX_PARTS = 16  # of a row: merged patches, say
MAX_RUNS = 4  # of rows that are named
SMALL_SHIFT = 2  # rows; larger ones are told as two runs
SHOWN = 8
MIXED_PARTS = "its rows are made of"


def explain_order(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> str | None:
    """Return in which order ours, [rows, columns], has the reference's values; None: in none, or in the same."""
    if ours.shape != theirs.shape or ours.dim() != 2 or torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5):
        return None
    rows = matching_rows(ours, theirs, tolerance)
    if rows is not None:
        return f"its rows are the reference's in another order: {order_text(rows)}"
    parts = next(_orders_of_parts(ours, theirs, tolerance), None)
    if parts is not None and not parts.startswith(MIXED_PARTS):
        return parts
    columns = matching_rows(ours.T, theirs.T, tolerance)  # one order in all rows, of which some have equal parts
    return parts if columns is None else f"its columns are the reference's in another order: {order_text(columns)}"


def _orders_of_parts(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> Iterator[str]:
    """Yield orders of the equal parts that a row, and so a merge of several patches, is made of."""
    num_rows, width = ours.shape
    for num in range(2, MAX_PARTS + 1):
        if width % num or width // num < 2 or num * num_rows > MAX_ROWS:
            continue
        right = theirs.unflatten(1, (num, -1)).flatten(0, 1)
        neighbours = right.unflatten(0, (-1, num)).transpose(1, 2).flatten(1)  # parts that take turns
        if torch.allclose(ours, neighbours, rtol=1e-3, atol=1e-5):
            yield f"the {num} parts of a row take turns in ours, and lie one after another in the reference"
        for text, parts in (
            ("", ours.unflatten(1, (num, -1)).flatten(0, 1)),
            (" and take turns", ours.unflatten(1, (-1, num)).transpose(1, 2).flatten(0, 1)),
        ):
            found = matching_rows(parts, right, tolerance)
            if found is not None:
                yield _parts_text(found, num) + text


def _parts_text(order: list[int], num: int) -> str:
    first = [part % num for part in order[:num]]
    within = all(part // num == i // num for i, part in enumerate(order))
    if within and all(part % num == first[i % num] for i, part in enumerate(order)):
        side = round(num**0.5)
        exchanged = [column * side + row for row in range(side) for column in range(side)]
        hint = ": rows and columns of a square are exchanged" if side**2 == num and first == exchanged else ""
        return f"the {num} parts of a row are the reference's numbers {_numbers(first)}{hint}"
    sources = [f"{part // num}.{part % num}" for part in order[:num]]
    return (
        f"{MIXED_PARTS} {num} parts each, and other parts are together (a shuffle or merge in another order): "
        f"row 0 has the reference's parts (row.part) {', '.join(sources)}"
    )


def matching_rows(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> list[int] | None:
    """Return the order p with ``ours[i] == theirs[p[i]]``; None: there is none, or it changes nothing."""
    if ours.shape != theirs.shape or not 2 <= len(ours) <= MAX_ROWS:
        return None
    distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.min(dim=1)
    size = theirs.norm(dim=1)
    if bool((nearest.values > tolerance * size[nearest.indices].clamp(min=0.1 * float(size.mean()) + 1e-30)).any()):
        return None
    order = nearest.indices.tolist()
    if len(set(order)) < len(order):  # some rows are equal, such as the class tokens of several images
        return paired_rows(ours, theirs, tolerance)
    return order if order != sorted(order) else None


def paired_rows(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> list[int] | None:
    """Return the order p with ``ours[i] == theirs[p[i]]`` where some rows may be equal, as separators are: of those, it
    takes the one that follows the row before. None: there is none, or it changes nothing."""
    if ours.shape != theirs.shape or not 2 <= len(ours) <= MAX_ROWS:
        return None
    distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
    size = theirs.norm(dim=1)
    fits = distances <= tolerance * size.clamp(min=0.1 * float(size.mean()) + 1e-30)
    free, order = set(range(len(theirs))), list[int]()
    for row in fits:
        candidates = [i for i in row.nonzero()[:, 0].tolist() if i in free]
        if not candidates:
            return None
        following = order[-1] + 1 if order else 0
        order.append(following if following in candidates else candidates[0])
        free.remove(order[-1])
    return order if order != sorted(order) else None


def runs_text(order: Sequence[int]) -> str | None:
    """Describe an order that is made of a few runs of neighbouring rows, from the reference's first; None: of many."""
    starts = [i for i in range(len(order)) if not i or order[i] != order[i - 1] + 1]
    if not 2 <= len(starts) <= MAX_RUNS:
        return None
    runs = [(order[i], order[end - 1]) for i, end in zip(starts, [*starts[1:], len(order)], strict=True)]
    shown = [f"{first} to {last}" if first < last else f"{first}" for first, last in runs]
    ranks = {rank: f"number {rank + 1} of {len(runs)} runs" for rank in range(len(runs))} | {0: "first"}
    ranks[len(runs) - 1] = "last"
    place = next(rank for rank, (first, _) in enumerate(runs) if first == min(order))
    return f"rows {', then '.join(shown)} of the reference (its rows {shown[place]} stand {ranks[place]} in ours)"


def order_text(order: Sequence[int]) -> str:
    """Describe an order of rows: a shift, a reversal, or a grid with its directions exchanged."""
    return _known_order(order) or runs_text(order) or f"{_numbers(order)} of the reference"


def _known_order(order: Sequence[int]) -> str | None:
    num = len(order)
    if list(order) == list(range(num - 1, -1, -1)):
        return "the last first"
    is_shift = all(row == (i + order[0]) % num for i, row in enumerate(order))
    if is_shift and min(order[0], num - order[0]) > SMALL_SHIFT and (runs := runs_text(order)) is not None:
        return runs
    if is_shift:
        return f"shifted by {order[0] if order[0] <= num // 2 else order[0] - num}"
    for rows in range(2, num // 2 + 1):
        if num % rows == 0 and list(order) == [j * rows + i for i in range(rows) for j in range(num // rows)]:
            return f"rows and columns are exchanged, of a grid of {num // rows} x {rows}"
    for block in (size for size in range(num // 2, 1, -1) if num % size == 0):
        if all(order[i] == order[i - 1] + 1 for i in range(num) if i % block):
            return f"blocks of {block} in the order {_numbers([row // block for row in order[::block]])}"
    for block in (size for size in range(2, num) if num % size == 0):
        inner = list(order[:block])
        if sorted(inner) == list(range(block)) and all(
            order[i] == inner[i % block] + i - i % block for i in range(num)
        ):
            return f"within each {block} of them, {order_text(inner)}"
    if num > 2 and order[0] == 0 and (rest := _known_order([row - 1 for row in order[1:]])):
        return f"behind the first, {rest}"
    return None


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (", ..." if len(values) > SHOWN else "")
