"""Causes in norms that also multiply by a gate: the order of both, the gate's function, what is normed together."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.trace import GATE, INPUT, Place

FUNCTIONS = ("silu", "sigmoid", "", "gelu", "tanh", "relu")
EPSILONS = (1e-6, 1e-5, 1e-8, 1e-12, 1e-3, 1e-2)


class GatedNorm(NamedTuple):
    """``function``: of the gate; empty: none. ``size``: neighbours that are normed together. ``offset``: added to the
    weight."""

    gates_first: bool
    function: str
    size: int
    eps: float
    offset: float = 0.0
    is_gated: bool = True

    def run(self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[tokens, features] each; ``weight``: of all features or of neighbours."""
        factor = get_act_fn(self.function)(gate) if self.function else gate
        factor = factor if self.is_gated else torch.ones_like(gate)
        given = x * factor if self.gates_first else x
        parts = given.unflatten(1, (-1, self.size))
        normed = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)).flatten(1)
        normed = normed * (weight + self.offset).repeat(normed.shape[1] // len(weight))
        return normed if self.gates_first else normed * factor


def explain_gated_norm(evidence: Evidence, place: Place) -> str | None:
    """Return the cause in the output of a norm with a gate; None: it is none, or nothing is found."""
    theirs = evidence.theirs.tensors
    x, gate = theirs.get(Place(place.module, INPUT)), theirs.get(Place(place.module, GATE))
    weight = evidence.their_parameters.get(f"{place.module}.weight")
    if x is None or gate is None or weight is None or weight.dim() != 1 or x.shape[1] % len(weight):
        return None
    forms = list(_forms(evidence, place, x.shape[1], len(weight)))
    right, own = (
        _form_of(evidence, x, gate, weight, forms, side.tensors[place]) for side in (evidence.theirs, evidence.ours)
    )
    if right is None or own is None or own == right:
        return None
    changes = [
        _change(name, mine, yours) for name, mine, yours in zip(own._fields, own, right, strict=True) if mine != yours
    ]
    return "; ".join(changes)


def _forms(evidence: Evidence, place: Place, width: int, weight_size: int) -> Iterator[GatedNorm]:
    """Yield forms, those with the reference's own epsilon first."""
    module: Any = evidence.their_modules[place.module]
    values = [getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon")]
    own = [float(value) for value in values if isinstance(value, float)]
    groups = [v for k, v in vars(evidence.config).items() if "group" in k or "heads" in k]
    numbers = [1, *(n for n in groups if isinstance(n, int) and n > 1 and width % n == 0)]
    sizes = dict.fromkeys([weight_size, *(width // number for number in numbers)])
    for eps in dict.fromkeys([*own, *EPSILONS]):
        for size in sizes:
            for gates_first in (True, False):
                for function in FUNCTIONS:
                    yield GatedNorm(gates_first, function, size, eps)
                yield GatedNorm(gates_first, "", size, eps, 0.0, False)
            yield GatedNorm(False, "silu", size, eps, 1.0)
            yield GatedNorm(True, "silu", size, eps, 1.0)


def _form_of(
    evidence: Evidence,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    forms: list[GatedNorm],
    target: torch.Tensor,
) -> GatedNorm | None:
    found = (form for form in forms if evidence.same(form.run(x, gate, weight), target))
    return next(found, None)


def _change(name: str, ours: Any, theirs: Any) -> str:
    match name:
        case "gates_first":
            orders = {True: "multiplies by the gate, then norms", False: "norms, then multiplies by the gate"}
            return f"the order of gate and norm: ours {orders[ours]}, the reference {orders[theirs]}"
        case "function":
            return f"the gate goes through {ours or 'nothing'} in ours, through {theirs or 'nothing'} in the reference"
        case "size":
            return f"ours norms {ours} components together, the reference {theirs}"
        case "eps":
            return f"its epsilon is {ours:g}, the reference's {theirs:g}"
        case "offset":
            return (
                f"ours multiplies by {'1 + ' if ours else ''}weight, the reference by {'1 + ' if theirs else ''}weight"
            )
        case _:
            return "it is not multiplied by the gate" if theirs else "it is multiplied by a gate, in the reference not"
