"""Layers that keep their weight packed: what quantization schemes share."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from rtp_llm.srt.kernels.packed import PackedWeight
from rtp_llm.srt.layers.quantization.base import ExpertsMethodBase, LinearMethodBase, free


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
        set_packed(layer, self.pack(layer))
        free(layer, *self.parameter_names())

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return packed_of(layer).apply(x, bias)

    def dequantized_weight(self, layer: nn.Module) -> torch.Tensor:
        return packed_of(layer).rows(torch.arange(self.num_outputs)).to(cast(torch.dtype, layer.params_dtype))


@dataclass(frozen=True, slots=True, eq=False)
class PackedExperts:
    """A weight for each expert."""

    w13: Sequence[PackedWeight]
    w2: Sequence[PackedWeight]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in (*self.w13, *self.w2))

    def tensors(self) -> Sequence[torch.Tensor]:
        return tuple(tensor for weight in (*self.w13, *self.w2) for tensor in weight.tensors())


class PackedExpertsMethod(ExpertsMethodBase):
    """Multiplies with the ``PackedExperts`` that ``pack`` makes of what was loaded; that is freed then."""

    @abstractmethod
    def pack(self, layer: nn.Module, name: str) -> list[PackedWeight]:
        """``w13`` or ``w2`` of each expert, from the layer's parameters."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        packed = {}
        for name in ("w13", "w2"):
            packed[name] = self.pack(layer, name)
            free(layer, *(f"{name}_{kind}" for kind in self.kinds))
        set_packed(layer, PackedExperts(**packed))

    def multiply(
        self,
        layer: nn.Module,
        name: str,
        rows: torch.Tensor,
        rows_per_expert: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        weights: Sequence[PackedWeight] = getattr(layer.packed, name)
        pieces = rows.split(rows_per_expert.tolist())
        outputs = [
            weight.apply(piece, None if bias is None else bias[expert])
            for expert, (weight, piece) in enumerate(zip(weights, pieces, strict=True))
            if len(piece) or expert == 0
        ]
        return torch.cat(outputs)


def set_packed(layer: nn.Module, packed: PackedWeight | PackedExperts) -> None:
    layer.packed = cast(Any, packed)  # of no type that torch knows: neither a parameter nor a module


def packed_of(layer: nn.Module) -> PackedWeight:
    return cast(PackedWeight, layer.packed)
