"""Search for the first place at which two traces differ, after places that agree."""

import re
from typing import NamedTuple

import torch

from rtp_llm.tools.verify.recurrent_calls import CONVOLVED, SCAN_INPUTS, SCANNED, TO_CONVOLVE
from rtp_llm.tools.verify.trace import ATTENDED, EMBEDDINGS, INPUT, KEYS, OUTPUT, QUERIES, VALUES, Place, Trace

# What needs not agree where this does: it is written in another way.
_MADE_OF = {CONVOLVED: (TO_CONVOLVE,), SCANNED: (TO_CONVOLVE, CONVOLVED, *SCAN_INPUTS)}
# Tolerances of the worst token's relative difference: of a module's tensors, and of logits.
MODULE_TOLERANCE = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 1e-1}
LOGITS_TOLERANCE = {"float32": 2e-4, "float16": 3e-2, "bfloat16": 1e-1}


class Difference(NamedTuple):
    place: Place
    error: float


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the worst token's distance relative to its size (at least a tenth of the usual), of [tokens, features]."""
    sizes = theirs.norm(dim=-1)
    errors = (ours - theirs).norm(dim=-1) / sizes.clamp(min=0.1 * float(sizes.mean()) + 1e-30)
    return float(errors.nan_to_num(torch.inf).max())


def logits_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the worst position's distance, relative to the spread of its logits. Both are [positions, vocab_size]."""
    spread = (theirs - theirs.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((ours - theirs).norm(dim=-1) / spread.clamp(min=1e-30)).nan_to_num(torch.inf).max())


def compare(ours: Trace, theirs: Trace) -> list[Difference]:
    """Return the differences at places of both traces with equal shapes, in our order."""
    return [
        Difference(place, relative_error(tensor, theirs.tensors[place]))
        for place, tensor in ours.tensors.items()
        if place in theirs.tensors and tensor.shape == theirs.tensors[place].shape
    ]


def pass_over_embedding(
    differences: list[Difference], ours: Trace, theirs: Trace, tolerance: float
) -> list[Difference]:
    """Leave out the text embedding if it differs, but what the first layer is given of it does not: a scale that one
    side applies inside of the embedding and the other outside, whatever a tower puts between."""
    embedding = Place(ours.parts.embedding, OUTPUT)
    given = Place(ours.parts.language_model, EMBEDDINGS)
    if not all(place in trace.tensors for place in (embedding, given) for trace in (ours, theirs)):
        return differences
    differs, given_differs = (
        (ours.tensors[place] - theirs.tensors[place]).norm(dim=-1) > tolerance * theirs.tensors[place].norm(dim=-1)
        for place in (embedding, given)
    )
    if len(differs) != len(given_differs) or not bool((differs & ~given_differs).any()):
        return differences
    return [difference for difference in differences if difference.place != embedding]


def first_difference(differences: list[Difference], tolerance: float) -> int | None:
    """Return the index of the first wrong place; None: there is none.

    Differences before a later complete agreement are only another layout: for example a scale that one side applies
    inside a module and the other after it. Agreement is complete if a layer's input or output agrees, or a block's
    output, in an attention block if queries, keys and values do, or what it attends to. In a layer with a state what a
    convolution or a scan is given needs not agree where its result does.
    """
    suspects: list[int] = []
    layer = ""
    agreeing: set[Place] = set()
    for index, (place, error) in enumerate(differences):
        if error > tolerance:
            suspects.append(index)
        elif error <= tolerance / 10:
            agreeing.add(place)
            if place.part == OUTPUT:  # of a block: what differs inside of it is another way of writing it
                suspects = [i for i in suspects if not _is_within(differences[i].place, place.module)]
            if place.part == EMBEDDINGS or (
                layer_of(place.module) and (layer_of(place.module) != layer or layer_of(place.module) == place.module)
            ):
                suspects = []
            elif place.part == ATTENDED or agreeing >= {Place(place.module, part) for part in (QUERIES, KEYS, VALUES)}:
                suspects = [i for i in suspects if not differences[i].place.module.startswith(place.module)]
            elif place.part in _MADE_OF:
                made_of = {Place(place.module, part) for part in _MADE_OF[place.part]}
                suspects = [i for i in suspects if differences[i].place not in made_of]
        layer = layer_of(place.module)
    return suspects[0] if suspects else None


def _is_within(place: Place, block: str) -> bool:
    """Return whether a place is of what a block computes; its input is not."""
    return place.module.startswith(f"{block}.") or (place.module == block and place.part != INPUT)


def layer_of(module: str) -> str:
    """Return the decoder layer of a module, ``model.layers.3``; empty: none."""
    found = re.match(r"(.*?\.\d+)(\.|$)", module)
    return found[1] if found else ""
