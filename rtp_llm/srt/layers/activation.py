"""Activations of feed-forward blocks.

Gated ones (Shazeer, 2020) are modules, [..., 2 * size] -> [..., size]: a function of the first half times the second.
Plain ones are functions, element by element.
"""

from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter

Activation = Callable[[torch.Tensor], torch.Tensor]  # a module of this file, or a function


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


class MulAndSilu(nn.Module):
    """``first half * silu(second half)``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = x.chunk(2, dim=-1)
        return up * F.silu(gate)


class SiluAndMulWithClamp(nn.Module):
    """``gate * sigmoid(alpha * gate) * (up + beta)`` of both halves, ``gate`` cut at ``swiglu_limit`` from above and
    ``up`` at it from both sides; the defaults give SiluAndMul of the cut halves.
    """

    def __init__(self, swiglu_limit: float, alpha: float = 1.0, beta: float = 0.0) -> None:
        super().__init__()
        self.swiglu_limit, self.alpha, self.beta = float(swiglu_limit), alpha, beta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        gate = gate.clamp(max=self.swiglu_limit)
        return gate * torch.sigmoid(self.alpha * gate) * (_cut(up, self.swiglu_limit) + self.beta)


class SwigluStepAndMul(nn.Module):
    """``silu(first half) * second half``, the former cut at ``limit`` from above and the latter from both sides."""

    def __init__(self, limit: float = 7.0) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).clamp(max=self.limit) * _cut(up, self.limit)


class GeluAndMulSparse(nn.Module):
    """``gelu(gate above a threshold) * up`` (Gemma 3n, 2025).

    The gate's mean, plus so many deviations that a normal distribution has ``activation_sparsity`` below, is taken from
    the gate, and what is negative then is zero. With several ranks each takes the mean of its part.
    """

    def __init__(self, activation_sparsity: float, approximate: Literal["tanh", "none"] = "none") -> None:
        super().__init__()
        if not 0.0 < activation_sparsity < 1.0:
            raise ValueError(f"activation_sparsity must lie between 0 and 1, not {activation_sparsity}")
        self.approximate = approximate
        self.num_deviations = NormalDist().inv_cdf(activation_sparsity)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        deviation, mean = torch.std_mean(gate, dim=-1, keepdim=True, correction=0)
        gate = F.relu(gate - (mean + deviation * self.num_deviations))
        return F.gelu(gate, approximate=self.approximate) * up


class FatreluAndMul(nn.Module):
    """``first half * second half`` where the first is above ``threshold``, else 0 (ProSparse; Song et al., 2024)."""

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.threshold(gate, self.threshold, 0.0) * up


def _cut(x: torch.Tensor, limit: float) -> torch.Tensor:
    return x.clamp(min=-limit, max=limit)


class XIELU(nn.Module):
    """xIELU (Huang and Schlag, 2024), an activation element by element with two trained numbers.

    With ``p = softplus(alpha_p)`` and ``n = beta + softplus(alpha_n)``: ``p * x ** 2 + beta * x`` for positive x, else
    ``n * (expm1(min(x, eps)) - x) + beta * x``. A checkpoint may have ``beta`` and ``eps`` as well.
    """

    alpha_p: nn.Parameter
    alpha_n: nn.Parameter
    beta: torch.Tensor
    eps: torch.Tensor

    def __init__(
        self,
        alpha_p_init: float = 0.8,
        alpha_n_init: float = 0.8,
        beta: float = 0.5,
        eps: float = -1e-6,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        alphas = torch.tensor([alpha_p_init, alpha_n_init - beta], dtype=torch.float32).expm1().log().to(dtype)
        self.alpha_p, self.alpha_n = (make_parameter(alpha[None], default_weight_loader) for alpha in alphas.unbind())
        for name, value in (("beta", beta), ("eps", eps)):
            constant = torch.tensor(value, dtype=dtype)
            constant.is_optional = True  # type: ignore[attr-defined]
            self.register_buffer(name, constant)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alpha_p, alpha_n = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        negative = (torch.expm1(torch.min(x, self.eps)) - x) * alpha_n
        return torch.where(x > 0, alpha_p * x * x, negative) + self.beta * x


class _Elementwise(nn.Module):
    """An activation function as a module."""

    fn: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return type(self).fn(x)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU with a sigmoid in place of the normal distribution (Hendrycks and Gimpel, 2016)."""
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    """The square of ReLU (Primer; So et al., 2021)."""
    return F.relu(x).square()


_gelu_tanh = partial(F.gelu, approximate="tanh")


class ReLUSquaredActivation(_Elementwise):
    """The square of ReLU."""

    fn = staticmethod(_squared_relu)


class QuickGELU(_Elementwise):
    """``x * sigmoid(1.702 * x)``."""

    fn = staticmethod(_quick_gelu)


class NewGELU(_Elementwise):
    """GELU by a tangent, ``gelu_new`` of configurations."""

    fn = staticmethod(_gelu_tanh)


class FastGELU(NewGELU):
    """The same formula with constants of ten digits, ``gelu_fast`` of configurations."""


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


_KERNELS: dict[object, str] = {F.gelu: "gelu"}


def kernel_of(activation: object) -> str:
    """Return an activation's name among kernels, by which products can end in it; an empty string: it has none."""
    name = getattr(activation, "kernel", None)
    return name if isinstance(name, str) else _KERNELS.get(activation, "")


def get_act_fn(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the elementwise activation for a configuration's ``hidden_act``, for feed-forward without a gate.

    That of ``xielu`` has parameters: make it an attribute of the layer that uses it.
    """
    if name == "xielu":
        return XIELU()
    if name not in _ACT:
        raise ValueError(f"unknown activation {name!r}; have {sorted([*_ACT, 'xielu'])}")
    return _ACT[name]


def get_act_and_mul_fn(name: str) -> nn.Module:
    """Return the gated activation for a configuration's ``hidden_act``."""
    if name == "swigluoai":
        return SwigluOAIAndMul()
    name = "gelu" if name == "geglu" else name
    if name not in _ACT:
        raise ValueError(f"unknown gated activation {name!r}; have {sorted(_ACT)}")
    fn = _ACT[name]
    if fn is F.silu:
        return SiluAndMul()
    if fn in (F.gelu, _gelu_tanh):
        return GeluAndMul("tanh" if fn is _gelu_tanh else "none")
    return ActAndMul(fn)
