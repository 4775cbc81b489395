"""The port that quantization schemes fill: which layers a scheme takes, what they store, how they multiply.

A scheme is one file: a ``QuantizationConfig`` read from the checkpoint, and a method per kind of layer. Layers hold a
method and know nothing else of the scheme.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import torch
from torch import nn

from rtp_llm.srt.kernels.packed import Packed, PackedExperts, PackedWeight
from rtp_llm.srt.layers.weights import ShardId, WeightLoader, Weights


class NotLoaded(PackedWeight):
    """In place of a weight that is not there yet."""

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        self._refuse()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        self._refuse()

    @property
    def num_rows(self) -> int:
        self._refuse()

    def tensors(self) -> Sequence[torch.Tensor]:
        return ()

    def _refuse(self) -> NoReturn:
        raise RuntimeError("a layer's weight is used before process_weights_after_loading has made it")


class PackedLayer(nn.Module):
    """A layer whose weight is one object, made by its quantization method of parameters that the loader fills.

    Attributes:
        packed: the weight.
        part_ids: the ids of the checkpoint's tensors that it is made of, side by side; none where it is of one.
        is_head: logits are made with it.
    """

    name: str
    params_dtype: torch.dtype
    packed: PackedWeight = NotLoaded()
    part_ids: Sequence[ShardId] = ()
    is_head = False

    def stored(self) -> Iterable[Packed]:
        return (self.packed,)


class ExpertsLayer(nn.Module):
    """As PackedLayer, of experts.

    Attributes:
        packed: ``w13`` (gate and up) and ``w2`` (down).
    """

    name: str

    def __init__(self) -> None:
        super().__init__()
        self.packed: dict[str, PackedExperts] = {}

    def stored(self) -> Iterable[Packed]:
        return self.packed.values()

    @abstractmethod
    def add_parameter(
        self,
        name: str,
        *shape: int,
        dtype: torch.dtype | None = None,
        weight_loader: WeightLoader | None = None,
        is_split: bool = True,
        is_optional: bool = False,
    ) -> nn.Parameter:
        """Register one that belongs to ``w13`` or ``w2``. ``is_split``: ranks share the inputs of ``w2``."""

    @abstractmethod
    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's part of a checkpoint tensor into ``param``."""


def tensors_of(model: nn.Module, recurse: bool = True) -> list[torch.Tensor]:
    """All that a model keeps: parameters, buffers, and what weights are packed in; some of it perhaps twice."""
    modules = model.modules() if recurse else [model]
    weights = [weight for m in modules if isinstance(m, (PackedLayer, ExpertsLayer)) for weight in m.stored()]
    packed = [tensor for weight in weights for tensor in weight.tensors()]
    return [*model.parameters(recurse), *model.buffers(recurse), *packed]


def stored_bytes(model: nn.Module, recurse: bool = True) -> int:
    """Memory of ``tensors_of``, each counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(model, recurse)}.values())


class QuantizeMethodBase:
    """Owns a layer's parameters: creates them before loading, may transform them after, computes with them.

    Order: ``create_weights`` in the layer's constructor; the loader fills the parameters; it then calls
    ``process_weights_after_loading`` once for every module that has a ``quant_method``, as soon as it has all of the
    module's parameters; then ``apply``.
    """

    def apply(self, layer: PackedLayer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ weight.T + bias`` with this rank's weight: [..., input_size] -> [..., output_size]."""
        return layer.packed.apply(x, bias)

    def process_weights_after_loading(self, layer: PackedLayer) -> None:
        """Pack, transpose or replace the loaded parameters. By default, do nothing."""


class LinearMethodBase(QuantizeMethodBase, ABC):
    @abstractmethod
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
        """Register the parameters of this rank's part (see ``layers.weights.make_parameter``) on ``layer``.

        Args:
            output_partition_sizes: this rank's rows of each tensor that the layer fuses.
            input_size, output_size: of the whole layer, over all ranks.
        """

    def ends_in(self, layer: PackedLayer, activation: nn.Module) -> bool:
        """Whether there is ``apply_gated`` for this activation."""
        return layer.packed.ends_in(getattr(activation, "kernel", ""))

    def apply_gated(
        self, layer: PackedLayer, x: torch.Tensor, bias: torch.Tensor | None, activation: nn.Module
    ) -> torch.Tensor:
        """``activation(apply(...))`` in one pass, of a gated activation that ``ends_in`` is true of."""
        return layer.packed.apply_gated(x, bias, str(activation.kernel))

    def dequantized_weight(self, layer: PackedLayer) -> torch.Tensor:
        """This rank's weight [output_size, input_size] in the layer's dtype, once it has been processed."""
        packed = layer.packed
        ids = torch.arange(packed.num_rows, device=packed.tensors()[0].device)
        return packed.rows(ids).to(layer.params_dtype)


class EmbeddingMethodBase(QuantizeMethodBase, ABC):
    """The method of a vocabulary table, which looks rows up and, as a head, multiplies with them (``apply``)."""

    @abstractmethod
    def create_weights(
        self,
        layer: PackedLayer,
        num_embeddings_per_partition: int,
        embedding_dim: int,
        params_dtype: torch.dtype,
        weight_loader: WeightLoader,
    ) -> None:
        """Register this rank's rows on ``layer``."""

    def embedding(self, layer: PackedLayer, row_ids: torch.Tensor) -> torch.Tensor:
        """[T] indices of this rank's rows -> [T, embedding_dim]."""
        return layer.packed.rows(row_ids).to(layer.params_dtype)

    def logits(self, layer: PackedLayer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``apply`` with a result in float32."""
        return layer.packed.apply(x, bias, torch.float32)


class ExpertsMethodBase(ABC):
    """The method of a layer of experts, with the weights ``w13`` (gate and up) and ``w2`` (down); see ``FusedMoE``.

    Attributes:
        kinds: what follows an expert's projection in names of the checkpoint; its parameters are ``w13_KIND`` and
            ``w2_KIND``, one expert after the other.
    """

    kinds: tuple[str, ...] = ("weight",)

    @abstractmethod
    def create_weights(self, layer: ExpertsLayer, name: str, shape: tuple[int, int, int], input_size: int) -> None:
        """Register the parameters of ``w13`` or ``w2`` on ``layer``, by its ``add_parameter``.

        Args:
            shape: experts, and this rank's outputs and inputs; input_size: inputs of all ranks.
        """

    @abstractmethod
    def process_weights_after_loading(self, layer: ExpertsLayer) -> None:
        """As in QuantizeMethodBase: makes ``layer.packed``."""


class QuantizationError(ValueError):
    """A checkpoint's quantization, or the one that was asked for, cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """What a scheme is told of the model that it is for.

    Attributes:
        settings: the checkpoint's ``quantization_config``; empty where the weights are quantized while they load.
        packed_modules_mapping, rename: of the model class; see ``models.loader``.
        has_encoders: the language model is a part of a whole (``language_model``) that sees or hears, too.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    packed_modules_mapping: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rename: Sequence[tuple[str, str]] = ()
    has_encoders: bool = False

    def sources(self, prefix: str) -> list[str]:
        """What the checkpoint calls the layer, or the layers that it fuses, with ``rename`` applied."""
        for packed, sources in self.packed_modules_mapping.items():
            if f".{packed}." in f".{prefix}.":
                return [f".{prefix}.".replace(f".{packed}.", f".{source}.")[1:-1] for source in sources]
        return [prefix]

    def is_language(self, prefix: str) -> bool:
        """Whether the layer is of the language model: encoders of media stay as they are."""
        parts = prefix.split(".")
        return not self.has_encoders or "language_model" in parts or parts[0] == "lm_head"


class QuantizationConfig(ABC):
    """A scheme, for one model: which method each layer gets, and how the checkpoint's tensors become its parameters'.

    Attributes:
        quantizes_layers: False: tensors are dequantized by ``translate``, and the model is built as if they never were
            quantized.
    """

    quantizes_layers = True

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        """The scheme for a model.

        Raises:
            QuantizationError: ``model.settings`` ask for what the scheme cannot do.
        """
        raise NotImplementedError

    @abstractmethod
    def get_name(self) -> str:
        """The scheme's name, as in ``--quantization``."""

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | ExpertsMethodBase | None:
        """The method for ``layer``, whose checkpoint path is ``prefix``; None leaves it unquantized."""

    def translate(self, weights: Weights, dtype: torch.dtype, device: torch.device | str) -> Weights:
        """A checkpoint's tensors, in the names and forms that parameters are loaded from. As they are by default.

        Names are the checkpoint's, before ``rename``; tensors are views of its files, taken one by one. Several may
        become one, one several.

        Args:
            dtype, device: of the model, for what is computed.
        """
        return weights

    def may_leave(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a checkpoint's tensor that has no place in the model says nothing that is missed."""
        return False


def process_weights(module: nn.Module) -> None:
    """Has a layer's quantization method, if it has one, process what was loaded; once."""
    method: Any = getattr(module, "quant_method", None)
    process = getattr(method, "process_weights_after_loading", None)
    if process and not getattr(module, "weights_are_processed", False):
        process(module)
        module.weights_are_processed = True  # type: ignore[assignment]


def free(layer: nn.Module, *names: str) -> None:
    """Remove parameters, and their memory wherever else they are referred to."""
    for name in names:
        param = layer.get_parameter(name)
        delattr(layer, name)
        param.data = param.data.new_empty(0)
