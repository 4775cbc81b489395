"""Weights as they are; packed where the device has products that are faster so."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kernels.packed import GroupedWeight, PackedWeight
from rtp_llm.srt.layers.quantization.base import EmbeddingMethodBase, ExpertsMethodBase, LinearMethodBase, free
from rtp_llm.srt.layers.weights import WeightLoader, make_parameter


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: WeightLoader,
    ) -> None:
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        layer.register_parameter("weight", make_parameter(data, weight_loader, input_dim=1, output_dim=0))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        _pack(layer)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _multiply(layer, x, bias)

    def dequantized_weight(self, layer: nn.Module) -> torch.Tensor:
        packed = _packed(layer)
        return cast(torch.Tensor, layer.weight) if packed is None else packed.rows(torch.arange(packed.num_rows))


class UnquantizedEmbeddingMethod(EmbeddingMethodBase):
    def create_weights(
        self,
        layer: nn.Module,
        num_embeddings_per_partition: int,
        embedding_dim: int,
        params_dtype: torch.dtype,
        weight_loader: WeightLoader,
    ) -> None:
        data = torch.empty(num_embeddings_per_partition, embedding_dim, dtype=params_dtype)
        layer.register_parameter("weight", make_parameter(data, weight_loader, output_dim=0))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if layer.is_head:
            _pack(layer)

    def embedding(self, layer: nn.Module, row_ids: torch.Tensor) -> torch.Tensor:
        packed = _packed(layer)
        return F.embedding(row_ids, cast(torch.Tensor, layer.weight)) if packed is None else packed.rows(row_ids)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return _multiply(layer, x, bias)

    def logits(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        packed = _packed(layer)
        return super().logits(layer, x, bias) if packed is None else packed.apply(x, bias, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class GroupedExperts:
    """The weights of all experts, packed for products that take all of them in one call."""

    w13: GroupedWeight
    w2: GroupedWeight

    @property
    def nbytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes

    def tensors(self) -> list[torch.Tensor]:
        return [*self.w13.tensors(), *self.w2.tensors()]


class UnquantizedExpertsMethod(ExpertsMethodBase):
    def create_weights(self, layer: nn.Module, name: str, shape: tuple[int, int, int], input_size: int) -> None:
        cast(Any, layer).add_parameter(f"{name}_weight", *shape)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        packed = {}
        for name in ("w13", "w2"):
            groups = built_for().pack_groups(layer.get_parameter(f"{name}_weight").data)
            if groups is None:
                return
            packed[name] = groups
            free(layer, f"{name}_weight")
        layer.packed = cast(Any, GroupedExperts(**packed))

    def multiply(
        self,
        layer: nn.Module,
        name: str,
        rows: torch.Tensor,
        rows_per_expert: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        packed = getattr(layer, "packed", None)
        if packed is not None:
            return getattr(packed, name).apply(rows, rows_per_expert, bias)
        return reference.grouped_linear(rows, layer.get_parameter(f"{name}_weight"), rows_per_expert, bias)


def _pack(layer: nn.Module) -> None:
    """The packed weight takes the place of ``layer.weight``, if there is a packed form of it here."""
    packed = built_for().pack_dense(layer.get_parameter("weight").data)
    if packed is not None:
        layer.packed = packed  # type: ignore[assignment]
        free(layer, "weight")


def _packed(layer: nn.Module) -> PackedWeight | None:
    return cast(PackedWeight | None, getattr(layer, "packed", None))


def _multiply(layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    packed = _packed(layer)
    return F.linear(x, cast(torch.Tensor, layer.weight), bias) if packed is None else packed.apply(x, bias)
