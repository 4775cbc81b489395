"""Gated activations (Shazeer, 2020): [..., 2 * size] -> [..., size], a function of the first half times the second."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.kernels import reference


class ActAndMul(nn.Module):
    """``fn(first half) * second half``."""

    def __init__(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self.fn(gate) * up


class SiluAndMul(nn.Module):
    """``silu(first half) * second half``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reference.silu_and_mul(x)


class GeluAndMul(ActAndMul):
    """``gelu(first half) * second half``; ``approximate`` as in ``torch.nn.functional.gelu``."""

    def __init__(self, approximate: Literal["tanh", "none"] = "tanh") -> None:
        if approximate not in ("tanh", "none"):
            raise ValueError(f"unknown gelu approximation {approximate!r}; have ['tanh', 'none']")
        super().__init__(partial(F.gelu, approximate=approximate))


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """A sigmoid in place of the normal distribution (Hendrycks and Gimpel, 2016)."""
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    """Primer (So et al., 2021)."""
    return F.relu(x).square()


_ACT_AND_MUL: dict[str, Callable[[], nn.Module]] = {
    "silu": SiluAndMul,
    "swish": SiluAndMul,
    "gelu": partial(GeluAndMul, "none"),
    "gelu_python": partial(GeluAndMul, "none"),
    "gelu_pytorch_tanh": partial(GeluAndMul, "tanh"),
    "gelu_python_tanh": partial(GeluAndMul, "tanh"),
    "gelu_new": partial(GeluAndMul, "tanh"),
    "gelu_fast": partial(GeluAndMul, "tanh"),
    "gelu_accurate": partial(GeluAndMul, "tanh"),
    "quick_gelu": partial(ActAndMul, _quick_gelu),
    "relu": partial(ActAndMul, F.relu),
    "relu2": partial(ActAndMul, _squared_relu),
    "relu6": partial(ActAndMul, F.relu6),
    "leaky_relu": partial(ActAndMul, F.leaky_relu),
    "mish": partial(ActAndMul, F.mish),
    "sigmoid": partial(ActAndMul, torch.sigmoid),
    "tanh": partial(ActAndMul, torch.tanh),
}


def get_act_and_mul_fn(name: str) -> nn.Module:
    """The gated activation for a configuration's ``hidden_act``."""
    if name not in _ACT_AND_MUL:
        raise ValueError(f"unknown gated activation {name!r}; have {sorted(_ACT_AND_MUL)}")
    return _ACT_AND_MUL[name]()
