"""Convolutions of vision towers, the same on every rank."""

from typing import Any

import torch
from torch import nn


class Conv2dLayer(nn.Conv2d):
    """A convolution of images, [N, in_channels, height, width]; other arguments as in ``torch.nn.Conv2d``.

    ``params_dtype``: of its parameters; None: torch's default.
    """

    def __init__(self, *args: Any, params_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "dtype": params_dtype})


class Conv3dLayer(nn.Conv3d):
    """A convolution of videos, [N, in_channels, frames, height, width]; otherwise as Conv2dLayer."""

    def __init__(self, *args: Any, params_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "dtype": params_dtype})
