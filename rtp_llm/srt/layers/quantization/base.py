"""The port that quantization schemes fill: which layers a scheme takes, what they store, how they multiply.

A scheme is one file: a ``QuantizationConfig`` read from the checkpoint, and a method per kind of layer. Layers hold a
method and know nothing else of the scheme.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from rtp_llm.srt.layers.weights import WeightLoader


class QuantizeMethodBase(ABC):
    """Owns a layer's parameters: creates them before loading, may transform them after, computes with them.

    Order: ``create_weights`` in the layer's constructor; the loader fills the parameters; it then calls
    ``process_weights_after_loading`` once for every module that has a ``quant_method``; then ``apply``.
    """

    @abstractmethod
    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ weight.T + bias`` with this rank's weight: [..., input_size] -> [..., output_size]."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:  # noqa: B027
        """Packs, transposes or replaces what was loaded. Nothing by default."""


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
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
        """Registers the parameters of this rank's part (see ``layers.weights.make_parameter``) on ``layer``.

        Args:
            output_partition_sizes: this rank's rows of each tensor that the layer fuses.
            input_size, output_size: of the whole layer, over all ranks.
        """


class EmbeddingMethodBase(QuantizeMethodBase):
    """Of a vocabulary table, which looks rows up and, as a head, multiplies with them (``apply``)."""

    @abstractmethod
    def create_weights(
        self,
        layer: nn.Module,
        num_embeddings_per_partition: int,
        embedding_dim: int,
        params_dtype: torch.dtype,
        weight_loader: WeightLoader,
    ) -> None:
        """Registers this rank's rows on ``layer``."""

    @abstractmethod
    def embedding(self, layer: nn.Module, row_ids: torch.Tensor) -> torch.Tensor:
        """[T] indices of this rank's rows -> [T, embedding_dim]."""


class QuantizationConfig(ABC):
    @abstractmethod
    def get_name(self) -> str:
        """The scheme's name, as in ``--quantization``."""

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for ``layer``, whose checkpoint path is ``prefix``; None leaves it unquantized."""
