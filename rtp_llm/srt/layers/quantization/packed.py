"""Layers that keep their weight packed: what quantization schemes share."""

from abc import abstractmethod
from typing import cast

import torch
from torch import nn

from rtp_llm.srt.kernels.packed import PackedWeight
from rtp_llm.srt.layers.quantization.base import LinearMethodBase


class PackedLinearMethod(LinearMethodBase):
    """Multiplies with ``layer.packed``, which ``pack`` makes of what was loaded; that is freed then.

    An object is of one layer: ``create_weights`` sets ``num_outputs``, of this rank.
    """

    num_outputs: int

    @abstractmethod
    def pack(self, layer: nn.Module) -> PackedWeight:
        """The layer's weight, from its parameters."""

    @abstractmethod
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters that ``pack`` reads, and nobody after it."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.packed = self.pack(layer)
        free(layer, *self.parameter_names())

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return packed_of(layer).apply(x, bias)

    def dequantized_weight(self, layer: nn.Module) -> torch.Tensor:
        return packed_of(layer).rows(torch.arange(self.num_outputs)).to(cast(torch.dtype, layer.params_dtype))


def packed_of(layer: nn.Module) -> PackedWeight:
    return cast(PackedWeight, layer.packed)


def free(layer: nn.Module, *names: str) -> None:
    """Removes parameters, and their memory wherever else they are referred to."""
    for name in names:
        param = layer.get_parameter(name)
        delattr(layer, name)
        param.data = param.data.new_empty(0)
