"""Normalisation of the last dimension.

``norm(x)`` returns the normalised x. ``norm(x, residual)`` first adds: it returns ``(norm(x + residual), x +
residual)``, so that a layer hands its residual on; in a first layer, which has none yet, ``norm(x, None)`` returns
``(norm(x), x)``. Any leading shape: [T, hidden_size], [T, heads, head_dim].
"""

from typing import Any, overload

import torch
from torch import nn

from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter

_NOT_GIVEN: Any = object()


class Norm(nn.Module):
    """Base of all norms, which adds the residual first. A subclass defines ``normalise``."""

    weight: nn.Parameter

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = make_parameter(torch.ones(hidden_size), default_weight_loader)
        self.variance_epsilon = eps

    @overload
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...

    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = _NOT_GIVEN
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is _NOT_GIVEN:
            return self.normalise(x)
        return (self.normalise(x), x) if residual is None else self.add_and_normalise(x, residual)

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def add_and_normalise(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual + x
        return self.normalise(residual), residual


class RMSNorm(Norm):
    """Root-mean-square norm (Zhang and Sennrich, 2019)."""

    kernel = "rms_norm"

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps)
        self._norm, self._add_norm = pick(self.kernel), pick(f"add_{self.kernel}")

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x, self.weight, self.variance_epsilon)

    def add_and_normalise(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._add_norm(x, residual, self.weight, self.variance_epsilon)


class GemmaRMSNorm(RMSNorm):
    """Root-mean-square norm times ``1 + weight``, all in float32 and rounded once (Gemma, 2024)."""

    kernel = "gemma_rms_norm"


class LayerNorm(Norm):
    """Mean zero, variance one, times ``weight`` (Ba et al., 2016), in float32 and rounded once.

    ``bias=False``: nothing is added to the product (Cohere).
    """

    bias: nn.Parameter | None

    def __init__(self, hidden_size: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__(hidden_size, eps)
        data = make_parameter(torch.zeros(hidden_size), default_weight_loader) if bias else None
        self.register_parameter("bias", data)
        self._norm, self._add_norm = pick("layer_norm"), pick("add_layer_norm")

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x, self.weight, self.bias, self.variance_epsilon)

    def add_and_normalise(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._add_norm(x, residual, self.weight, self.bias, self.variance_epsilon)
