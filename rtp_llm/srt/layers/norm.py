"""Normalisation of the last dimension.

``norm(x)`` returns the normalised x. ``norm(x, residual)`` first adds: it returns ``(norm(x + residual), x +
residual)``, so that a layer hands its residual on; in a first layer, which has none yet, ``norm(x, None)`` returns
``(norm(x), x)``. Any leading shape: [T, hidden_size], [T, heads, head_dim].
"""

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.distributed.unsummed import NormOfSum, Unsummed, plain
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter

_NOT_GIVEN: Any = object()


class Norm(nn.Module):
    """Base of all norms, which adds the residual first. A subclass defines ``normalise``.

    Args:
        has_weight: False: nothing is multiplied; the checkpoint has no weight.
        dtype: of the weight; None: torch's default. In another dtype than the default, everything is computed in
            float32 and rounded once.
    """

    weight: torch.Tensor

    def __init__(self, hidden_size: int, eps: float, has_weight: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.has_weight = has_weight
        self.is_wide = dtype not in (None, torch.get_default_dtype())
        if has_weight:
            self.weight = make_parameter(torch.ones(hidden_size, dtype=dtype), default_weight_loader)
        else:
            self.register_buffer("weight", torch.ones(hidden_size), persistent=False)
        self.variance_epsilon = eps

    @overload
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...

    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = _NOT_GIVEN
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if isinstance(x, Unsummed):
            if residual is not _NOT_GIVEN and residual is not None:
                of_sum = self.norm_of_sum()
                both = None if of_sum is None else x.add_norm(residual, of_sum)
                if both is not None:
                    return both
            x = x.summed()
        residual = plain(residual)
        if residual is _NOT_GIVEN:
            return self.normalise(x)
        return (self.normalise(x), x) if residual is None else self.add_and_normalise(x, residual)

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def add_and_normalise(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual + x
        return self.normalise(residual), residual

    def norm_of_sum(self) -> NormOfSum | None:
        """Return it for a device that sums ``x`` over the ranks first; None: it computes nothing of the kind."""
        return None


class RMSNorm(Norm):
    """Root-mean-square norm (Zhang and Sennrich, 2019).

    Args:
        var_hidden_size: the mean square is of the first so many components only; None: of all.
        has_weight, dtype: as in Norm.
    """

    kernel = "rms_norm"

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        var_hidden_size: int | None = None,
        has_weight: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, has_weight, dtype)
        if var_hidden_size is not None and not 0 < var_hidden_size <= hidden_size:
            raise ValueError(f"var_hidden_size must be from 1 to hidden_size, {hidden_size}, not {var_hidden_size}")
        self.var_hidden_size = None if var_hidden_size == hidden_size else var_hidden_size
        self._norm, self._add_norm = pick(self.kernel), pick(f"add_{self.kernel}")

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_wide or self.var_hidden_size is not None:
            return self._normalise_plainly(x)
        return self._norm(x, self.weight, self.variance_epsilon)

    def add_and_normalise(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_wide or self.var_hidden_size is not None:
            return super().add_and_normalise(x, residual)
        return self._add_norm(x, residual, self.weight, self.variance_epsilon)

    def norm_of_sum(self) -> NormOfSum | None:
        if self.is_wide or self.var_hidden_size is not None:
            return None
        return NormOfSum(self.kernel, self.weight, self.variance_epsilon)

    def _normalise_plainly(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        mean_square = x32[..., : self.var_hidden_size].square().mean(dim=-1, keepdim=True)
        return (x32 * torch.rsqrt(mean_square + self.variance_epsilon) * self._factor()).to(x.dtype)

    def _factor(self) -> torch.Tensor:
        return self.weight.float()


class GemmaRMSNorm(RMSNorm):
    """Root-mean-square norm times ``1 + weight``, all in float32 and rounded once (Gemma, 2024)."""

    kernel = "gemma_rms_norm"

    def _factor(self) -> torch.Tensor:
        return 1.0 + self.weight.float()


class LayerNorm(Norm):
    """Mean zero, variance one, times ``weight`` (Ba et al., 2016), in float32 and rounded once.

    ``bias=False``: nothing is added to the product (Cohere). ``elementwise_affine=False``: there is neither weight nor
    bias (OLMo). ``dtype``: as in Norm.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        bias: bool = True,
        elementwise_affine: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, elementwise_affine, dtype)
        has_bias = bias and elementwise_affine
        data = make_parameter(torch.zeros(hidden_size, dtype=dtype), default_weight_loader) if has_bias else None
        self.register_parameter("bias", data)
        self._norm, self._add_norm = pick("layer_norm"), pick("add_layer_norm")

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_wide:
            bias = None if self.bias is None else self.bias.float()
            return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), bias, self.variance_epsilon).to(x)
        return self._norm(x, self.weight, self.bias, self.variance_epsilon)

    def add_and_normalise(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_wide:
            return super().add_and_normalise(x, residual)
        return self._add_norm(x, residual, self.weight, self.bias, self.variance_epsilon)
