"""The norm of pixels in front of a tower, which vLLM may leave to the device. Here the processor has normed them."""

import torch
from torch import nn

__all__ = ["IdentityInputNorm", "build_mm_input_norm"]


class IdentityInputNorm(nn.Module):
    """Pixels in the tower's dtype."""

    input_dtype = None  # whichever the processor gives

    def forward(self, pixel_values: torch.Tensor, visual_dtype: torch.dtype) -> torch.Tensor:
        return pixel_values.to(visual_dtype)


def build_mm_input_norm() -> IdentityInputNorm:
    return IdentityInputNorm()
