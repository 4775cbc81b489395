"""Weights as they are."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.srt.layers.quantization.base import EmbeddingMethodBase, LinearMethodBase
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

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, cast(torch.Tensor, layer.weight), bias)

    def dequantized_weight(self, layer: nn.Module) -> torch.Tensor:
        return cast(torch.Tensor, layer.weight)


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

    def embedding(self, layer: nn.Module, row_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(row_ids, cast(torch.Tensor, layer.weight))

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, cast(torch.Tensor, layer.weight), bias)
