"""Weights in 4-bit floats (e2m1) with scales of small groups: NVFP4 and MXFP4, as linear layers store them.

Two numbers share a byte, the first in its lower half. NVFP4: each 16 inputs have a scale in float8_e4m3fn, and a tensor
one in float32, by which compressed-tensors divides and ModelOpt multiplies. MXFP4: each 32 inputs have a power of two,
stored as its exponent plus 127.

In memory a weight has its 4 bits, and each group one scale in float32. Activations stay as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from rtp_llm.srt.layers.quantization.scaled_weights import (
    SCALE,
    ScaledExpertsMethod,
    ScaledLinearMethod,
    TableLinearMethod,
    scaled_method,
)
from rtp_llm.srt.layers.weights import Weights

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = (*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES))
PACKED, DIVISOR, FACTOR = "weight_packed", "weight_global_scale", "weight_scale_2"


@dataclass(frozen=True, slots=True)
class Fp4Format:
    """``group_size``: inputs that share a scale; ``whole``: name of a tensor's own scale, DIVISOR or FACTOR, if any."""

    group_size: int
    whole: str | None = None


def fp4_method(layer: nn.Module, stored: Fp4Format) -> ScaledLinearMethod | ScaledExpertsMethod | None:
    """Return the method for a linear layer or a layer of experts; None for others."""
    return scaled_method(layer, TableLinearMethod(NUMBERS, stored.group_size))


def with_one_scale(weights: Weights, stored: Fp4Format) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint, under the names of parameters, with the two scales of a tensor made one."""
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        layer, _, kind = name.rpartition(".")
        if kind == PACKED:
            yield f"{layer}.weight", tensor
        elif kind == SCALE and stored.whole is None:
            yield name, tensor.view(torch.float8_e8m0fnu).float() if tensor.dtype == torch.uint8 else tensor.float()
        elif kind in (SCALE, stored.whole):
            halves = waiting.setdefault(layer, {})
            halves[kind] = tensor.float()
            if len(halves) == 2:
                whole = halves[str(stored.whole)]
                yield f"{layer}.{SCALE}", halves[SCALE] / whole if stored.whole == DIVISOR else halves[SCALE] * whole
                del waiting[layer]
        else:
            yield name, tensor
    for layer, halves in waiting.items():
        yield from ((f"{layer}.{kind}", tensor) for kind, tensor in halves.items())
