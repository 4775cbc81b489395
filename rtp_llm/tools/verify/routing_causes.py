"""Search for the routing that gives each token its experts and their weights, and for how ours departs from it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import torch

from rtp_llm.tools.verify.locate import relative_error
from rtp_llm.tools.verify.rounding_causes import DTYPES, ROUNDED

FACTOR_ALONE = "factor of the experts' weights"
MANY_EXPERTS = 16  # with more, only groups that the configuration names are tried
NEARLY_ALL = 0.9  # of the tokens
LOGITS, SCORES, SUMS, WEIGHTS = "logits", "scores", "sum", "weights"
_ROUNDED_STEPS = (
    *((step,) for step in (LOGITS, SCORES, SUMS, WEIGHTS)),
    (LOGITS, SCORES),
    (LOGITS, WEIGHTS),
    (SCORES, SUMS),
    (SCORES, SUMS, WEIGHTS),
    (LOGITS, SCORES, SUMS, WEIGHTS),
)
_FACTORS = ("routed_scaling_factor", "router_scaling_factor", "moe_router_scaling_factor", "scaling_factor")


@dataclass(frozen=True)
class Routing:
    """How logits become weights.

    Args:
        scores: what a logit becomes: softmax over all experts, sigmoid, or the logit itself.
        bias: the parameter that is added to choose; empty: none. ``bias_in_weights``: to the weights, too.
        groups: (number, chosen ones, how a group is scored): experts are taken from the best groups; None: from all.
        normalise: what is done with the weights of the chosen: nothing, divided by their sum, or a softmax.
        num_chosen: experts of a token.
        chosen_by: what a logit becomes to choose experts; empty: the scores.
    """

    scores: str
    bias: str
    bias_in_weights: bool
    groups: tuple[int, int, str] | None
    normalise: str
    num_chosen: int
    chosen_by: str = ""

    def changes(self, other: "Routing") -> list[str]:
        return [item.name for item in fields(self) if getattr(self, item.name) != getattr(other, item.name)]


class RoutingTrials:
    """Trials of routings.

    Args:
        logits: the reference's [tokens, num_experts], before any of them.
        biases: parameters [num_experts] beside the router, by name.
        config: the model's; its groups are tried first.
    """

    def __init__(self, logits: torch.Tensor, biases: Mapping[str, torch.Tensor], config: Any) -> None:
        self._logits = logits.double()
        self._biases = {name: bias.double() for name, bias in biases.items()}
        self._config = config

    def explain(self, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> tuple[str, bool]:
        """Return how our weights [tokens, num_experts] depart from the reference's, and whether a trial gave ours."""
        counts = list(dict.fromkeys(int((x != 0).sum(-1).max()) for x in (theirs, ours)))
        tried = [(routing, self._apply(routing)) for routing in self._routings(counts)]
        right = _that_give(theirs, tried, tolerance) or self._chosen_by_others(theirs, tried, tolerance)
        own = _that_give(ours, tried, tolerance) or self._chosen_by_others(ours, tried, tolerance)
        if right and not own:
            own = self._of_probabilities(ours, right, tolerance)
        rounded = self._rounded(ours, right, tolerance) if right and not own else None
        if rounded:
            return rounded, True
        if not right or not own:
            moved = _moved(ours, theirs, self._logits.shape[1])
            return (moved, True) if moved else (self._described(ours, theirs, right, own), False)
        mine, yours = self._nearest(own, right)
        doubled = _doubled(mine[0])
        if doubled and not any(_doubled(routing) for routing, _ in right):
            yours = next((each for each in right if each[0].scores == "logits"), yours)
            texts = [doubled]
            if " of " in mine[0].scores and mine[0].normalise != yours[0].normalise:
                texts.append(self._change("normalise", mine[0], yours[0]))
            return "; ".join([*texts, f"the reference's weights are {_text(*yours)}"]), True
        if self._distance(mine, yours)[0] > 1:  # other scores that choose may say it in one change
            mine, yours = self._nearest([mine, *self._chosen_by_others(ours, tried, tolerance)], right)
        texts = [self._change(name, mine[0], yours[0]) for name in mine[0].changes(yours[0])]
        if texts and (same := _same_groups(mine, yours, own)) is not None:
            texts = [f"{texts[0]} (or ours {_groups_text(same)}, which chooses the same)", *texts[1:]]
        if abs(mine[1] / yours[1] - 1) > 1e-3:
            texts.append(self._factors(mine[1], yours[1]))
        return "; ".join(texts), True

    def _chosen_by_others(
        self, weights: torch.Tensor, tried: list[tuple[Routing, torch.Tensor]], tolerance: float
    ) -> list[tuple[Routing, float]]:
        """Return routings that give ``weights``, whose experts are chosen by other scores than they are weighted with.
        Without a bias and groups, all scores choose the same."""
        others = (
            replace(routing, chosen_by=kind)
            for (routing, _), kind in product(tried, _SCORES)
            if (routing.bias or routing.groups) and not routing.bias_in_weights and kind != routing.scores
        )
        return _that_give(weights, [(routing, self._apply(routing)) for routing in others], tolerance)

    def _of_probabilities(
        self, ours: torch.Tensor, right: list[tuple[Routing, float]], tolerance: float
    ) -> list[tuple[Routing, float]]:
        """Return the reference's routings, whose scores are functions of scores once more, that give ours."""
        others = (
            replace(routing, scores=f"{outer} of {inner}", normalise=norm)
            for (routing, _), inner, outer in product(right, _PROBABILITIES, _PROBABILITIES)
            for norm in dict.fromkeys((routing.normalise, "no", "sum"))
        )
        return _that_give(ours, [(routing, self._apply(routing)) for routing in others], tolerance)

    def _nearest(
        self, own: list[tuple[Routing, float]], right: list[tuple[Routing, float]]
    ) -> tuple[tuple[Routing, float], tuple[Routing, float]]:
        return min(product(own, right), key=lambda pair: self._distance(*pair))

    def _distance(self, mine: tuple[Routing, float], yours: tuple[Routing, float]) -> tuple[int, bool]:
        return len(mine[0].changes(yours[0])) + (abs(mine[1] / yours[1] - 1) > 1e-3), yours[1] != 1.0

    def _routings(self, counts: Sequence[int]) -> Iterator[Routing]:
        biases = [("", False), *product(self._biases, (False, True))]
        scores, normalise = ("softmax", "sigmoid", "logits", "softplus"), ("no", "sum", "softmax")
        for (bias, inside), kind, groups, norm, count in product(biases, scores, self._groups(), normalise, counts):
            yield Routing(kind, bias, inside, groups, norm, count)

    def _groups(self) -> list[tuple[int, int, str] | None]:
        num_experts = self._logits.shape[1]
        values = vars(self._config)
        named = [n for name, n in values.items() if "group" in name and isinstance(n, int) and 1 < n <= num_experts]
        numbers = range(2, num_experts) if num_experts <= MANY_EXPERTS else sorted(set(named))
        shapes = [(n, top) for n in numbers if num_experts % n == 0 for top in range(1, min(n, MANY_EXPERTS))]
        return [None, *((n, top, how) for n, top in shapes for how in ("best", "two best"))]

    def _rounded(self, ours: torch.Tensor, right: list[tuple[Routing, float]], tolerance: float) -> str | None:
        """Return that the reference's routing gives ours where some of its steps are rounded to 16 bits; None: not of
        nearly all tokens. Of a few a number may lie between two that it is rounded to."""
        for dtype, steps, (routing, factor) in product(DTYPES, _ROUNDED_STEPS, right):
            made = factor * self._apply(routing, steps, dtype)
            errors = (ours - made).norm(dim=-1) / made.norm(dim=-1).clamp(min=1e-30)
            if float((errors <= tolerance).float().mean()) >= NEARLY_ALL:
                name = str(dtype).removeprefix("torch.")
                return f"{ROUNDED.format(dtype=name)}: the router's {' and '.join(steps)}"
        return None

    def _apply(self, routing: Routing, steps: Sequence[str] = (), dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Return the weights [tokens, num_experts]. ``steps``: what is rounded to ``dtype``."""

        def kept(step: str, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype).double() if step in steps else tensor

        logits = kept(LOGITS, self._logits)
        scores = kept(SCORES, _scored(logits, routing.scores))
        choice = kept(SCORES, _scored(logits, routing.chosen_by)) if routing.chosen_by else scores
        if routing.bias:
            choice = choice + self._biases[routing.bias]
        weights = choice if routing.bias_in_weights else scores
        if routing.groups is not None:
            choice = _grouped(choice, *routing.groups)
        chosen = choice.topk(routing.num_chosen, dim=-1).indices
        picked = weights.gather(1, chosen)
        if routing.normalise == "sum":
            picked = picked / (kept(SUMS, picked.sum(-1, keepdim=True)) + 1e-20)
        elif routing.normalise == "softmax":
            picked = picked.softmax(-1)
        return torch.zeros_like(scores).scatter_(1, chosen, kept(WEIGHTS, picked)).float()

    def _factors(self, ours: float, theirs: float) -> str:
        values = {name: getattr(self._config, name, None) for name in _FACTORS}
        name = next((f" ({name})" for name, value in values.items() if value and abs(theirs / value - 1) < 1e-3), "")
        return f"{FACTOR_ALONE}: ours {ours:.6g}, the reference's {theirs:.6g}{name}"

    def _change(self, name: str, ours: Routing, theirs: Routing) -> str:
        mine, yours = getattr(ours, name), getattr(theirs, name)
        match name:
            case "scores":
                return f"experts' scores: ours {_SCORES[mine]}, the reference's {_SCORES[yours]}"
            case "bias":
                return f"correction bias: ours {_bias(mine)}, the reference's {_bias(yours)}"
            case "bias_in_weights":
                return "correction bias: " + (
                    "ours adds it to the weights too, the reference only to choose"
                    if mine
                    else "ours adds it only to choose, the reference to the weights too"
                )
            case "groups":
                return f"groups of experts: ours {_groups_text(mine)}, the reference's {_groups_text(yours)}"
            case "normalise":
                return f"weights of the chosen experts: ours {_NORMALISED[mine]}, the reference's {_NORMALISED[yours]}"
            case "chosen_by":
                mine, yours = (_SCORES[routing.chosen_by or routing.scores] for routing in (ours, theirs))
                return f"what experts are chosen by: ours {mine}{_plus(ours)}, the reference's {yours}{_plus(theirs)}"
            case _:
                return f"experts of a token: ours {mine}, the reference's {yours}"

    def _described(
        self,
        ours: torch.Tensor,
        theirs: torch.Tensor,
        right: list[tuple[Routing, float]],
        own: list[tuple[Routing, float]],
    ) -> str:
        """Return what can be seen without a trial that gives both sides."""
        others = ((ours != 0) != (theirs != 0)).any(-1)
        if bool(others.any()):
            text = f"{int(others.sum())} of {len(others)} tokens go to other experts"
        else:
            text = (
                "the same experts are chosen, with other weights" + self._of_which(ours, theirs) + _sums(ours, theirs)
            )
        known = [f"the reference's are {_text(*right[0])}"] if right else []
        known += [f"ours are {_text(*own[0])}"] if own else []
        return "; ".join([text, *known])

    def _of_which(self, ours: torch.Tensor, theirs: torch.Tensor) -> str:
        """Return of which of a token's chosen experts weights differ, the first being the one with the best logit."""
        chosen = self._logits.masked_fill(theirs == 0, float("-inf")).topk(int((theirs != 0).sum(-1).max()), dim=-1)
        mine, yours = (x.gather(1, chosen.indices) for x in (ours, theirs))
        wrong = ((mine - yours).abs() > 1e-3 * yours.abs().amax()).any(0).tolist()
        if all(wrong) or not any(wrong):
            return ""
        names = [name for name, differs in zip(_RANKS, wrong, strict=False) if differs]
        rest = [name for name, differs in zip(_RANKS, wrong, strict=False) if not differs]
        return f", of each token's {', '.join(names)} one; the {', '.join(rest)} one's agree" if names and rest else ""


def _doubled(routing: Routing) -> str:
    """Return that a softmax or a sigmoid is applied to what another one gave; empty: it is not."""
    outer, _, inner = routing.scores.partition(" of ")
    if routing.scores in _PROBABILITIES and routing.normalise == "softmax":
        outer, inner = "softmax", routing.scores
    if not inner:
        return ""
    return f"ours applies a {outer} to what {_SCORES[inner]} gave already (a {outer} of a {inner}): one too many"


def _same_groups(
    mine: tuple[Routing, float], yours: tuple[Routing, float], own: list[tuple[Routing, float]]
) -> tuple[int, int, str] | None:
    """Return groups as many as the reference's that give ours, too, where ``mine`` has none: the best experts always
    lie in the groups with the best ones, if there are as many of them."""
    if mine[0].changes(yours[0]) != ["groups"] or mine[0].groups is not None or yours[0].groups is None:
        return None
    found = [r.groups for r, factor in own if factor == mine[1] and r.changes(mine[0]) == ["groups"]]
    return next((groups for groups in found if groups and groups[:2] == yours[0].groups[:2]), None)


def _moved(ours: torch.Tensor, theirs: torch.Tensor, num_experts: int) -> str | None:
    """Try whether each expert's weights are another's in the reference."""
    moved: list[tuple[int, int]] = []
    for expert in range(num_experts):
        errors = (ours - theirs[:, expert, None]).abs().amax(0)
        other = int(errors.argmin())
        if bool(theirs[:, expert].any()) and float(errors[other]) > 1e-4:
            return None
        if bool(theirs[:, expert].any()) and other != expert:
            moved.append((expert, other))
    shown = ", ".join(f"the reference's {expert} is {other} in ours" for expert, other in moved[:4])
    return f"experts lie in another order: {shown}" if moved else None


_RANKS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_SCORES = {
    "softmax": "a softmax over all experts",
    "sigmoid": "a sigmoid",
    "logits": "the logits themselves",
    "softplus": "the root of a softplus",
}
_PROBABILITIES = ("softmax", "sigmoid")  # scores that another function may be applied to, which is a mistake
_NORMALISED = {
    "no": "not renormalised",
    "sum": "divided by their sum (renormalised)",
    "softmax": "a softmax over them",
}


def _scored(logits: torch.Tensor, kind: str) -> torch.Tensor:
    outer, _, inner = kind.partition(" of ")
    if inner:
        return _scored(_scored(logits, inner), outer)
    match kind:
        case "softmax":
            return logits.softmax(-1)
        case "sigmoid":
            return logits.sigmoid()
        case "softplus":
            return torch.nn.functional.softplus(logits).sqrt()
        case _:
            return logits


def _grouped(choice: torch.Tensor, number: int, num_top: int, how: str) -> torch.Tensor:
    """Hide the experts outside of the best groups."""
    groups = choice.unflatten(1, (number, -1))
    best = groups.topk(min(1 if how == "best" else 2, groups.shape[-1]), dim=-1).values.sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(num_top, dim=-1).indices, True)
    return groups.masked_fill(~kept[:, :, None], float("-inf")).flatten(1)


def _factor(weights: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float | None:
    """Return f with ``f * weights == expected``; None: there is none."""
    factor = float((weights * expected).sum() / weights.square().sum().clamp(min=1e-30))
    if abs(factor) < 1e-6 or relative_error(factor * weights, expected) > tolerance:
        return None
    return 1.0 if abs(factor - 1) < 1e-4 else factor


def _sums(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    mine, yours = ours.sum(-1), theirs.sum(-1)
    return f"; they sum to {float(mine.mean()):.4g} on the mean, the reference's to {float(yours.mean()):.4g}"


def _that_give(
    weights: torch.Tensor, tried: list[tuple[Routing, torch.Tensor]], tolerance: float
) -> list[tuple[Routing, float]]:
    """Return the routings whose results are these weights but for a factor, and the factors."""
    return [(routing, factor) for routing, w in tried if (factor := _factor(w, weights, tolerance)) is not None]


def _plus(routing: Routing) -> str:
    return " + the correction bias" if routing.bias else ""


def _bias(name: str) -> str:
    return name or "not added"


def _groups_text(groups: tuple[int, int, str] | None) -> str:
    if groups is None:
        return "none"
    return f"the best {groups[1]} of {groups[0]}, by the sum of their {groups[2]}".replace("sum of their best", "best")


def _text(routing: Routing, factor: float) -> str:
    is_of_chosen = (routing.scores, routing.normalise) == ("logits", "softmax")
    parts = ["a softmax over the chosen experts' logits" if is_of_chosen else _SCORES[routing.scores]]
    parts += [f"chosen by {_SCORES[routing.chosen_by]}"] if routing.chosen_by else []
    parts += [f"{routing.bias} added to choose"] if routing.bias else []
    parts += [f"groups {_groups_text(routing.groups)}"] if routing.groups else []
    parts += [] if routing.normalise == "no" or is_of_chosen else [_NORMALISED[routing.normalise]]
    parts += [f"times {factor:.6g}"] if factor != 1 else []
    return f"{', '.join(parts)}, for {routing.num_chosen} experts"
