"""Activations of feed-forward blocks.

Gated ones (Shazeer, 2020) are modules, [..., 2 * size] -> [..., size]: a function of the first half times the second.
Plain ones are functions, element by element.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.device.choice import pick


class ActAndMul(nn.Module):
    """``fn(first half) * second half``."""

    def __init__(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self.fn(gate) * up


class SiluAndMul(nn.Module):
    """``silu(first half) * second half``.

    Attributes:
        kernel: its name in ``kernels``; the product before it may compute it, too.
    """

    kernel = "silu_and_mul"

    def __init__(self) -> None:
        super().__init__()
        self._kernel = pick(self.kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernel(x)


class GeluAndMul(nn.Module):
    """``gelu(first half) * second half``; ``approximate`` as in ``torch.nn.functional.gelu``.

    Attributes:
        kernel: as in SiluAndMul.
    """

    def __init__(self, approximate: Literal["tanh", "none"] = "tanh") -> None:
        super().__init__()
        if approximate not in ("tanh", "none"):
            raise ValueError(f"unknown gelu approximation {approximate!r}; have ['tanh', 'none']")
        self.kernel = "gelu_tanh_and_mul" if approximate == "tanh" else "gelu_and_mul"
        self._kernel = pick(self.kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernel(x)


class SwigluOAIAndMul(nn.Module):
    """The gate of GPT-OSS (2025): ``(up + 1) * gate * sigmoid(alpha * gate)``, where ``gate`` is cut at ``limit`` from
    above and ``up`` at ``limit`` from both sides.

    Unlike in all others, gate and up take turns, as in the checkpoint: gate at even places, up at odd ones.
    """

    def __init__(self, alpha: float = 1.702, limit: float = 7.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.limit = limit
        self._kernel = pick("swiglu_oai_and_mul")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernel(x, self.alpha, self.limit)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU with a sigmoid in place of the normal distribution (Hendrycks and Gimpel, 2016)."""
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    """The square of ReLU (Primer; So et al., 2021)."""
    return F.relu(x).square()


_gelu_tanh = partial(F.gelu, approximate="tanh")

_ACT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _squared_relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def get_act_fn(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the elementwise activation for a configuration's ``hidden_act``, for feed-forward without a gate."""
    if name not in _ACT:
        raise ValueError(f"unknown activation {name!r}; have {sorted(_ACT)}")
    return _ACT[name]


def get_act_and_mul_fn(name: str) -> nn.Module:
    """Return the gated activation for a configuration's ``hidden_act``."""
    if name not in _ACT:
        raise ValueError(f"unknown gated activation {name!r}; have {sorted(_ACT)}")
    fn = _ACT[name]
    if fn is F.silu:
        return SiluAndMul()
    if fn in (F.gelu, _gelu_tanh):
        return GeluAndMul("tanh" if fn is _gelu_tanh else "none")
    return ActAndMul(fn)
