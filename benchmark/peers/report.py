"""From the rounds of a run to medians, ratios and a table. Standard library only."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmark.peers.workloads import DECODE, FIRST_TOKEN, OUTPUT, PREFILL, WORKLOADS, Figure

FIGURES = {figure.name: figure for figure in (DECODE, PREFILL, FIRST_TOKEN, OUTPUT)}

# by side, the value of each round
Rounds = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Comparison:
    """One row: medians by side, who of the peers is best, and ours over that one, round by round.

    ``best`` is None, and ``ratios`` is empty, where only one of the two is there.
    """

    figure: Figure
    medians: dict[str, float]
    best: str | None
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None


def compare(figure: Figure, rounds: Rounds, ours: str) -> Comparison:
    """The best peer is the one with the best median; it is compared with us within each round."""
    medians = {side: statistics.median(values) for side, values in rounds.items() if values}
    peers = {side: value for side, value in medians.items() if side != ours}
    if not peers:
        return Comparison(figure, medians, None, ())
    best = (min if figure.smaller_is_better else max)(peers, key=peers.__getitem__)
    pairs = zip(rounds[ours], rounds[best], strict=True) if ours in medians else ()
    return Comparison(figure, medians, best, tuple(figure.ratio(a, b) for a, b in pairs))


def bound(workload: str, figure: Figure, ceilings: Mapping[str, float], model: Mapping[str, float]) -> float | None:
    """The most that the machine allows, in the figure's unit; None where neither bus nor multipliers are the limit.

    Decode reads every weight once for each token, prefill multiplies every weight but the embedding with each token;
    attention is left out of both, so that the bound is a little too high.
    """
    if workload == "W1" and figure == DECODE:
        return ceilings["read_gb_s"] * 1e9 / model["weight_bytes"]
    rate = ceilings.get("int8_gops" if model["bits"] == 8 else "bf16_gflops")
    if rate is None or workload not in ("W1", "W2"):
        return None
    tokens_s = rate * 1e9 / (2 * model["layer_parameters"])
    return tokens_s if figure == PREFILL else WORKLOADS[workload].own_len / tokens_s


def table(rows: Sequence[tuple[str, Comparison, float | None]], titles: Mapping[str, str], ours: str) -> str:
    """Markdown. Rows are (workload, comparison, bound); titles give the sides, in order of columns."""
    head = ["", *titles.values(), "bound", "ours / best peer", "ours / bound"]
    lines = [_line(head), _line(["---"] * len(head))]
    for workload, comparison, limit in rows:
        figure = comparison.figure
        cells = [f"{workload} {figure.name}, {figure.unit}"]
        cells += [_number(comparison.medians.get(side)) for side in titles]
        mine = comparison.medians.get(ours)
        share = None if mine is None or limit is None else figure.ratio(mine, limit)
        lines.append(_line([*cells, _number(limit), _ratio(comparison), _number(share)]))
    return "\n".join(lines)


def _ratio(comparison: Comparison) -> str:
    if comparison.ratio is None:
        return "–"
    spread = f" ({min(comparison.ratios):.2f} to {max(comparison.ratios):.2f})" if len(comparison.ratios) > 1 else ""
    return f"{comparison.ratio:.2f}{spread}"


def _number(value: float | None) -> str:
    """Three digits, or all before the decimal point."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
