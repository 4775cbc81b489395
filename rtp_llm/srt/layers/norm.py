"""Normalisation."""

from typing import overload

import torch
from torch import nn

from rtp_llm.srt.kernels import reference
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter


class RMSNorm(nn.Module):
    """Root-mean-square norm of the last dimension (Zhang and Sennrich, 2019).

    ``norm(x)`` returns the normalised x. ``norm(x, residual)`` first adds: it returns ``(norm(x + residual), x +
    residual)``, so that a layer hands its residual on. Any leading shape: [T, hidden_size], [T, heads, head_dim].
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
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
            return reference.rms_norm(x, self.weight, self.variance_epsilon)
        residual = residual + x
        return reference.rms_norm(residual, self.weight, self.variance_epsilon), residual
