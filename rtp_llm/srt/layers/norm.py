"""Normalisation of the last dimension.

``norm(x)`` returns the normalised x. ``norm(x, residual)`` first adds: it returns ``(norm(x + residual), x +
residual)``, so that a layer hands its residual on. Any leading shape: [T, hidden_size], [T, heads, head_dim].
"""

from typing import overload

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.kernels import reference
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter


class Norm(nn.Module):
    """What all norms share: adding the residual first. A norm says how it normalises."""

    weight: nn.Parameter

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = make_parameter(torch.ones(hidden_size), default_weight_loader)
        self.variance_epsilon = eps

    @overload
    def forward(self, x: torch.Tensor, residual: None = None) -> torch.Tensor: ...

    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return self.normalise(x)
        residual = residual + x
        return self.normalise(residual), residual

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class RMSNorm(Norm):
    """Root-mean-square norm (Zhang and Sennrich, 2019)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps)

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        return reference.rms_norm(x, self.weight, self.variance_epsilon)


class GemmaRMSNorm(Norm):
    """Root-mean-square norm times ``1 + weight``, all in float32 and rounded once (Gemma, 2024)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps)

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        return reference.rms_norm(x.float(), 1.0 + self.weight.float(), self.variance_epsilon).to(x.dtype)


class LayerNorm(Norm):
    """Mean zero, variance one, times ``weight`` (Ba et al., 2016), in float32 and rounded once.

    ``bias=False``: nothing is added to the product (Cohere).
    """

    bias: nn.Parameter | None

    def __init__(self, hidden_size: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__(hidden_size, eps)
        data = make_parameter(torch.zeros(hidden_size), default_weight_loader) if bias else None
        self.register_parameter("bias", data)

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), bias, self.variance_epsilon).to(x.dtype)
