"""Base of schemes that quantize the weights of any checkpoint while loading.

They quantize the linear layers of the language model, its experts, and its head, which has 8 bits in every scheme: an
error there goes straight into the logits. Where embedding and head are tied, there is one table, of 8 bits, and a
look-up gives a dequantized row; an untied embedding is not quantized. Neither are routers, which are small, nor the
encoders of media.
"""

from abc import abstractmethod
from typing import Self

import torch
from torch import nn

from rtp_llm.srt.device.choice import built_for, pick
from rtp_llm.srt.kernels.packed import PackedWeight
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.linear import LinearBase
from rtp_llm.srt.layers.moe import Experts
from rtp_llm.srt.layers.quantization.base import (
    ExpertsLayer,
    ExpertsMethodBase,
    PackedLayer,
    QuantizationConfig,
    QuantizedModel,
    QuantizeMethodBase,
    free,
)
from rtp_llm.srt.layers.quantization.methods import PackedExpertsMethod, PackedLinearMethod
from rtp_llm.srt.layers.quantization.unquantized import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from rtp_llm.srt.layers.weights import WeightLoader

ELEMENTS_AT_ONCE = 1 << 18  # of a weight that is quantized: intermediate values stay in the processor's cache
NOT_MULTIPLIED = ("kv_b_proj",)  # latent attention splits this weight, so it is needed unquantized


class OnLoadConfig(QuantizationConfig):
    def __init__(self, model: QuantizedModel) -> None:
        self.model = model

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        return cls(model)

    @abstractmethod
    def pack(self, weight: torch.Tensor) -> PackedWeight:
        """Pack a weight [N, K] of any floating dtype."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | ExpertsMethodBase | None:
        if not self.model.is_language(prefix) or prefix.rpartition(".")[2] in NOT_MULTIPLIED:
            return None
        if isinstance(layer, LinearBase):
            return OnLoadLinearMethod(self)
        if isinstance(layer, VocabParallelEmbedding):
            return OnLoadEmbeddingMethod()
        return OnLoadExpertsMethod(self) if isinstance(layer, Experts) else None


class OnLoadLinearMethod(PackedLinearMethod):
    def __init__(self, scheme: OnLoadConfig) -> None:
        self.scheme = scheme

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
        UnquantizedLinearMethod().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            weight_loader,
        )

    def parameter_names(self) -> tuple[str, ...]:
        return ("weight",)

    def pack(self, layer: PackedLayer) -> PackedWeight:
        return self.scheme.pack(layer.get_parameter("weight").data)


class OnLoadExpertsMethod(PackedExpertsMethod):
    def __init__(self, scheme: OnLoadConfig) -> None:
        self.scheme = scheme

    def create_weights(self, layer: ExpertsLayer, name: str, shape: tuple[int, int, int], input_size: int) -> None:
        layer.add_parameter(f"{name}_weight", *shape)

    def pack(self, layer: ExpertsLayer, name: str) -> list[PackedWeight]:
        return [self.scheme.pack(weight) for weight in layer.get_parameter(f"{name}_weight").data]


class OnLoadEmbeddingMethod(UnquantizedEmbeddingMethod):
    """Packs a head in 8 bits, with a scale for each token of the vocabulary."""

    def process_weights_after_loading(self, layer: PackedLayer) -> None:
        if layer.is_head:
            layer.packed = built_for().pack_int8(*quantize_int8(layer.get_parameter("weight").data))
            free(layer, "weight")


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> values of [N, K] int8 and scales [N] float32, symmetric: see ``reference.quantize_rows``."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    quantize_rows = pick("quantize_rows", weight.dtype)
    for rows in row_blocks(weight):
        values[rows], of_rows = quantize_rows(weight[rows])
        scales[rows] = of_rows[:, 0]
    return values, scales


def row_blocks(weight: torch.Tensor) -> list[slice]:
    """Slices of consecutive rows of [N, K], each small enough for the processor's cache."""
    size = max(1, ELEMENTS_AT_ONCE // max(1, weight.shape[1]))
    return [slice(start, start + size) for start in range(0, len(weight), size)]
