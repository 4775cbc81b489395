"""Ours as a product of two of the reference's earlier tensors, or of parts of a fused projection: a gate that is
another one, goes through another function, or is missing."""

from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement

import torch
import torch.nn.functional as F

from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.locate import layer_of
from rtp_llm.tools.verify.trace import INPUT, Place

NEARBY = 16  # earlier places whose tensors are tried as factors
MAX_BLOCKS = 6  # parts of a fused projection
MAX_FACTORS = 32
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "softplus": F.softplus,
    "1 +": lambda x: 1 + x,
}
Factors = list[tuple[str, torch.Tensor]]


def explain_product(evidence: Evidence, place: Place) -> str | None:
    """Return of which factors ours is, and of which the reference's; None: either is no product, or they are the
    same."""
    ours, theirs = evidence.pair(place)
    factors = list(_factors(evidence, place))
    yours = _product_of(evidence, theirs, factors)
    if yours is None:
        return None
    mine = _product_of(evidence, ours, factors) or _single(evidence, ours, factors)
    return None if mine is None or mine == yours else f"it is {mine}; the reference's is {yours}"


def _factors(evidence: Evidence, place: Place) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield earlier tensors of this width, the nearest first, and the parts of wider ones, each once."""
    ours = evidence.ours.tensors[place]
    num, width = ours.shape
    places = list(evidence.theirs.tensors)
    here = places.index(place)
    seen: list[torch.Tensor] = []
    for p in sorted(places[max(0, here - NEARBY) : here], key=lambda p: (p.part == INPUT, here - places.index(p))):
        tensor = evidence.theirs.tensors[p][-num:]
        if len(tensor) < num or tensor.shape[1] % width or tensor.shape[1] > MAX_BLOCKS * width:
            continue
        for text, block in _blocks(tensor, width, _numbers_of_heads(evidence, place)):
            is_known = any(evidence.same(block, other) for other in seen)
            if is_known or len(seen) == MAX_FACTORS or not bool(block.isfinite().all()):
                continue
            seen.append(block)
            yield f"{text}{p}", block


def _blocks(tensor: torch.Tensor, width: int, heads: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parts of this width that rows have, side by side or in each head, with what they are in words."""
    num = tensor.shape[1] // width
    if num == 1:
        yield "", tensor
        return
    for number, block in enumerate(tensor.split(width, dim=1)):
        yield f"columns {number * width} to {(number + 1) * width - 1} of ", block
    for count in heads:
        if width % count == 0:
            parts = tensor.unflatten(1, (count, num, -1))
            for number in range(num):
                yield f"part {number + 1} of {num} of each head of ", parts[:, :, number].flatten(1)


def _numbers_of_heads(evidence: Evidence, place: Place) -> set[int]:
    """Return the numbers of heads, more than one, that the configuration and the layer's attention have."""
    numbers = [value for key, value in vars(evidence.config).items() if "heads" in key]
    calls = [call for name, call in evidence.theirs.calls.items() if layer_of(name) == layer_of(place.module)]
    numbers += [number for call in calls for number in (call.num_heads, call.num_kv_heads)]
    return {number for number in numbers if isinstance(number, int) and number > 1}


def _product_of(evidence: Evidence, target: torch.Tensor, factors: Factors) -> str | None:
    for (one, x), (other, y) in combinations_with_replacement(factors, 2):
        if one != other and evidence.same(target, x * y):
            return _times(one, other)
        for (text, through), (rest, plain) in (((one, x), (other, y)), ((other, y), (one, x))):
            for name, function in FUNCTIONS.items():
                if evidence.same(target, function(through) * plain):
                    return f"{name} of ({text}) times {rest}"
    return None


def _times(one: str, other: str) -> str:
    """Return a product of two tensors; of two parts of one tensor, with its name once."""
    split = [text.partition(" of output of ") for text in (one, other)]
    if split[0][2] and split[0][2] == split[1][2]:
        return f"{split[0][0]} times {split[1][0]} of output of {split[0][2]}"
    return f"{one} times {other}"


def _single(evidence: Evidence, target: torch.Tensor, factors: Factors) -> str | None:
    for text, x in factors:
        if evidence.same(target, x):
            return f"{text}, not multiplied"
        for name, function in FUNCTIONS.items():
            if evidence.same(target, function(x)):
                return f"{name} of ({text}), not multiplied"
    return None
