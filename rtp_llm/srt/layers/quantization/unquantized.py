"""Unquantized weights, packed where the device has faster products for a packed form."""

import torch

from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.kernels.packed import PlainDense, PlainExperts
from rtp_llm.srt.layers.quantization.base import (
    EmbeddingMethodBase,
    ExpertsLayer,
    ExpertsMethodBase,
    LinearMethodBase,
    PackedLayer,
    free,
    hide,
    hides_parameters,
)
from rtp_llm.srt.layers.weights import WeightLoader, make_parameter


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer: PackedLayer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: WeightLoader,
    ) -> None:
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        weight = make_parameter(data, weight_loader, input_dim=1, output_dim=0)
        layer.register_parameter("weight", weight)
        layer.packed = PlainDense(weight)

    def process_weights_after_loading(self, layer: PackedLayer) -> None:
        _pack(layer)


class UnquantizedEmbeddingMethod(EmbeddingMethodBase):
    def create_weights(
        self,
        layer: PackedLayer,
        num_embeddings_per_partition: int,
        embedding_dim: int,
        params_dtype: torch.dtype,
        weight_loader: WeightLoader,
    ) -> None:
        data = torch.empty(num_embeddings_per_partition, embedding_dim, dtype=params_dtype)
        weight = make_parameter(data, weight_loader, output_dim=0)
        layer.register_parameter("weight", weight)
        layer.packed = PlainDense(weight)

    def process_weights_after_loading(self, layer: PackedLayer) -> None:
        if layer.is_head:
            _pack(layer)


class UnquantizedExpertsMethod(ExpertsMethodBase):
    def create_weights(self, layer: ExpertsLayer, name: str, shape: tuple[int, int, int], input_size: int) -> None:
        layer.packed[name] = PlainExperts(layer.add_parameter(f"{name}_weight", *shape))

    def process_weights_after_loading(self, layer: ExpertsLayer) -> None:
        for name in ("w13", "w2"):
            packed = built_for().pack_experts(layer.get_parameter(f"{name}_weight").data)
            if packed is not None:
                layer.packed[name] = packed
                free(layer, f"{name}_weight")
            elif hides_parameters():
                hide(layer, f"{name}_weight")


def _pack(layer: PackedLayer) -> None:
    """Replace ``layer.weight`` by a packed weight, if the device has a packed form for it."""
    packed = built_for().pack_dense(layer.get_parameter("weight").data)
    if packed is not None:
        layer.packed = packed
        free(layer, "weight")
    elif hides_parameters():
        hide(layer, "weight")
