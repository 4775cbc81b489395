"""Causes in numbers that are rounded to 16 bits on their way, where the reference has float32: a norm's mean of squares
or its root, which the norm's output tells."""

from collections.abc import Iterator
from typing import Any

import torch

from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.trace import GATE, INPUT, Place

DTYPES = (torch.bfloat16, torch.float16)
EXACT = 1e-5  # relative distance to a number of 16 bits: those of bfloat16 are 2 ** -8 apart, those of float16 2 ** -11
MIN_NUMBERS = 5  # from which numbers are not rounded by chance
SLIGHT = 2.0**-7  # relative: what a few roundings to bfloat16 change
ROUNDED = "rounded: an intermediate sum in {dtype} where the reference has float32"
LIKE_ROUNDING = (
    "each of its numbers is within 2 ** -7 of the reference's, as if an intermediate result were rounded: look for a "
    "sum, a mean or a softmax in bfloat16 or float16 where the reference has float32"
)


def explain_rounded_norm(evidence: Evidence, place: Place) -> str | None:
    """Return that a norm's mean of squares, or another number that it has for each token, is one of 16 bits, which is
    one of float32 in the reference; None: it is not, or nothing is a norm here."""
    given_here = evidence.theirs.tensors.get(Place(place.module, INPUT))
    weight = evidence.their_parameters.get(f"{place.module}.weight")
    if given_here is None or weight is None or weight.dim() != 1 or given_here.shape[1] % len(weight):
        return None
    eps, ours, theirs = _eps_of(evidence.their_modules.get(place.module)), *evidence.pair(place)
    bias = evidence.their_parameters.get(f"{place.module}.bias", torch.zeros(()))
    for given, size in _normed(evidence, place, given_here, len(weight)):
        mine, yours, x = (tensor.double().unflatten(1, (-1, size)) for tensor in (ours, theirs, given))
        shift, scale = (p.double().view(-1, size) if p.numel() > 1 else p.double() for p in (bias, weight))
        for name, numbers in numbers_of_norm(mine, yours, x, shift, scale, eps):
            dtype = rounded_to(numbers)
            if dtype:
                return f"{ROUNDED.format(dtype=dtype)}: the {name} of each token"
    return None


def _normed(evidence: Evidence, place: Place, x: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield what may be normed, [tokens, features], with how many of them together: the input, times a gate or not."""
    gate = evidence.theirs.tensors.get(Place(place.module, GATE))
    heads = [v for k, v in vars(evidence.config).items() if "group" in k or "heads" in k]
    numbers = (
        [1, *(n for n in heads if isinstance(n, int) and n > 1 and x.shape[1] % n == 0)] if gate is not None else []
    )
    for each in dict.fromkeys([size, *(x.shape[1] // number for number in numbers)]):
        yield x, each
        if gate is not None:
            yield from ((x * get_act_fn(name)(gate), each) for name in ("silu", "sigmoid"))


def numbers_of_norm(
    ours: torch.Tensor, theirs: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, eps: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what our norm has computed of each token or head by its output, all [tokens, parts, size]. The reference's
    output need not be known but for what one number of each token multiplies."""
    for subtracts in (False, True):
        mean = x.mean(-1, keepdim=True) if subtracts else torch.zeros_like(x[..., :1])
        root = (x - mean).square().mean(-1).add(eps).rsqrt()
        base = (theirs - bias) / root[..., None]  # of a norm: x or x - mean, times weights
        turns = torch.stack([base, weight.expand_as(base)] if subtracts else [base], dim=-1)
        try:
            found = torch.linalg.lstsq(turns, (ours - bias)[..., None]).solution[..., 0]
        except torch.linalg.LinAlgError:
            continue
        made = (turns * found[..., None, :]).sum(-1) + bias
        if float((made - ours).norm() / ours.norm()) > EXACT or bool((found[..., 0] <= 0).any()):
            continue
        own = found[..., 0]
        if float((own / root - 1).abs().max()) > SLIGHT:
            continue
        spread = "variance" if subtracts else "mean of squares"
        yield spread, own**-2 - eps
        yield f"{spread} with its epsilon", own**-2
        yield f"root of the {spread}", 1 / own
        yield f"reciprocal root of the {spread}", own
        if subtracts:
            yield "mean", mean[..., 0] - found[..., 1] / own


def rounded_to(numbers: torch.Tensor) -> str | None:
    """Return the type of 16 bits that numbers, float64, are rounded to; None: none, or they are too few to tell."""
    numbers = numbers.flatten()
    if len(numbers.unique()) < MIN_NUMBERS or not bool(numbers.isfinite().all()):
        return None
    for dtype in DTYPES:
        if bool(((numbers - numbers.to(dtype).double()).abs() <= EXACT * numbers.abs()).all()):
            return str(dtype).removeprefix("torch.")
    return None


def describe_rounding(evidence: Evidence, place: Place) -> str | None:
    """Return that ours is so near to the reference's everywhere that it may be rounded; None: it is not."""
    ours, theirs = evidence.pair(place)
    is_near = (ours - theirs).abs() <= SLIGHT * theirs.abs() + 1e-6 * theirs.abs().max()
    return LIKE_ROUNDING if bool(is_near.all()) else None


def _eps_of(norm: Any) -> float:
    values = [getattr(norm, name, None) for name in ("variance_epsilon", "eps", "epsilon")]
    return next((float(value) for value in values if isinstance(value, float)), 1e-6)
