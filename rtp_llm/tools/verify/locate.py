"""Where two traces part: the first place that differs though everything before it agrees."""

import re
from typing import NamedTuple

import torch

from rtp_llm.tools.verify.trace import KEYS, QUERIES, VALUES, Place, Trace

# Relative difference, of a token at worst, that is more than rounding: of a module's tensors, and of logits.
MODULE_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 8e-2}
LOGITS_TOLERANCE = {"float32": 2e-4, "float16": 3e-2, "bfloat16": 1e-1}


class Difference(NamedTuple):
    place: Place
    error: float


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The worst token's distance, relative to its size (a tenth of the usual size at least), of [tokens, features]."""
    sizes = theirs.norm(dim=-1)
    errors = (ours - theirs).norm(dim=-1) / sizes.clamp(min=0.1 * float(sizes.mean()) + 1e-30)
    return float(errors.nan_to_num(torch.inf).max())


def logits_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the worst position's distance, relative to the spread of its logits. Both are [positions, vocab_size]."""
    spread = (theirs - theirs.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((ours - theirs).norm(dim=-1) / spread.clamp(min=1e-30)).nan_to_num(torch.inf).max())


def compare(ours: Trace, theirs: Trace) -> list[Difference]:
    """The places that both have in the same shape, in the order in which ours come."""
    return [
        Difference(place, relative_error(tensor, theirs.tensors[place]))
        for place, tensor in ours.tensors.items()
        if place in theirs.tensors and tensor.shape == theirs.tensors[place].shape
    ]


def first_difference(differences: list[Difference], tolerance: float) -> int | None:
    """Index of the place to blame.

    What differs before everything agrees once more is another way of writing the same: a scale, say, that one side
    applies inside of a module and the other after it. Everything agrees where a layer's input or output does; of an
    attention block, where queries, keys and values do.
    """
    suspects: list[int] = []
    layer = ""
    agreeing: set[Place] = set()
    for index, (place, error) in enumerate(differences):
        if error > tolerance:
            suspects.append(index)
        elif error <= tolerance / 10:
            agreeing.add(place)
            if layer_of(place.module) and (layer_of(place.module) != layer or layer_of(place.module) == place.module):
                suspects = []
            elif agreeing >= {Place(place.module, part) for part in (QUERIES, KEYS, VALUES)}:
                suspects = [i for i in suspects if not differences[i].place.module.startswith(place.module)]
        layer = layer_of(place.module)
    return suspects[0] if suspects else None


def layer_of(module: str) -> str:
    """The decoder layer that a module is or lies in, ``model.layers.3``; empty: none."""
    found = re.match(r"(.*?\.\d+)(\.|$)", module)
    return found[1] if found else ""
