"""The port for quantization schemes: which layers a scheme quantizes, what they store, how they multiply.

A scheme is one file: a ``QuantizationConfig`` read from the checkpoint, and a method per kind of layer. A layer has a
method and knows nothing else of the scheme.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import torch
from torch import nn

from rtp_llm.srt.kernels.packed import Packed, PackedExperts, PackedWeight
from rtp_llm.srt.layers.activation import Activation, kernel_of
from rtp_llm.srt.layers.weights import ShardId, WeightLoader, Weights


class NotLoaded(PackedWeight):
    """Placeholder for a weight that is not loaded yet."""

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


class FreesParameters(nn.Module):
    """A layer whose parameters may be gone once its weight is made of them: a read says so."""

    name: str
    freed: tuple[str, ...] = ()  # names of its parameters that are gone

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "weight" and name not in self.freed:
                raise
        advice = "Call the layer; dtype and device are those of what it returns."
        if hasattr(type(self), "dequantized_weight"):
            advice += " dequantized_weight() makes a copy of the weight, from finish_load on."
        raise AttributeError(
            f"{self.name} ({type(self).__name__}) has no {name!r} while the model runs: the weight is packed for "
            f"kernels, or quantized, and the parameters that it was loaded into are freed. {advice}"
        )


class PackedLayer(FreesParameters):
    """A layer with one weight object, which its quantization method makes of the parameters that the loader filled.

    Attributes:
        packed: the weight.
        part_ids: the shard ids of the checkpoint's tensors that it fuses, in order; empty where it fuses none.
        is_head: it computes logits.
    """

    params_dtype: torch.dtype
    packed: PackedWeight = NotLoaded()
    part_ids: Sequence[ShardId] = ()
    is_head = False

    def stored(self) -> Iterable[Packed]:
        return (self.packed,)


class ExpertsLayer(FreesParameters):
    """A layer of experts, otherwise as PackedLayer.

    Attributes:
        packed: ``w13`` (gate and up) and ``w2`` (down).
    """

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
        in_order: bool = False,
    ) -> nn.Parameter:
        """Register a parameter of ``w13`` or ``w2``.

        ``is_split``: the inputs of ``w2`` are split over ranks. ``in_order``: tensors of all experts have outputs
        before inputs, also where the weights themselves are stored transposed.
        """

    @abstractmethod
    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's part of a checkpoint tensor into ``param``."""


def dequantized(layer: PackedLayer) -> torch.Tensor:
    """Return this rank's weight [rows, inputs] in the layer's dtype, however it is kept; call it after processing."""
    packed = layer.packed
    ids = torch.arange(packed.num_rows, device=packed.tensors()[0].device)
    return packed.rows(ids).to(layer.params_dtype)


def tensors_of(model: nn.Module, recurse: bool = True) -> list[torch.Tensor]:
    """All tensors of a model: parameters, buffers, and those of packed weights; some perhaps twice."""
    modules = model.modules() if recurse else [model]
    weights = [weight for m in modules if isinstance(m, (PackedLayer, ExpertsLayer)) for weight in m.stored()]
    packed = [tensor for weight in weights for tensor in weight.tensors()]
    return [*model.parameters(recurse), *model.buffers(recurse), *packed]


def stored_bytes(model: nn.Module, recurse: bool = True) -> int:
    """Bytes of ``tensors_of``, each tensor counted once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(model, recurse)}.values())


class QuantizeMethodBase:
    """A layer's quantization: creates its parameters before loading, may transform them after, computes with them.

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

    def ends_in(self, layer: PackedLayer, activation: Activation) -> bool:
        """Whether ``apply_activated`` takes this activation."""
        return layer.packed.ends_in(kernel_of(activation))

    def apply_activated(
        self, layer: PackedLayer, x: torch.Tensor, bias: torch.Tensor | None, activation: Activation
    ) -> torch.Tensor:
        """``activation(apply(...))`` in one pass, for an activation for which ``ends_in`` is true."""
        return layer.packed.apply_activated(x, bias, kernel_of(activation))

    def dequantized_weight(self, layer: PackedLayer) -> torch.Tensor:
        """Return this rank's weight [output_size, input_size] in the layer's dtype; call it after processing."""
        return dequantized(layer)


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
        return layer.packed.rows_in(row_ids, layer.params_dtype)

    def logits(self, layer: PackedLayer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``apply`` with a result in float32."""
        return layer.packed.apply(x, bias, torch.float32)


class ExpertsMethodBase(ABC):
    """The method of a layer of experts, with the weights ``w13`` (gate and up) and ``w2`` (down); see ``FusedMoE``.

    Attributes:
        kinds: suffixes of an expert's projection in names of the checkpoint; for each, the layer has parameters
            ``w13_KIND`` and ``w2_KIND`` of all experts.
        fused_suffixes: kinds that may be stored for all experts together, under a name that ends like this.
    """

    kinds: tuple[str, ...] = ("weight",)
    fused_suffixes: Mapping[str, str] = {"weight": ""}

    @abstractmethod
    def create_weights(self, layer: ExpertsLayer, name: str, shape: tuple[int, int, int], input_size: int) -> None:
        """Register the parameters of ``w13`` or ``w2`` on ``layer``, by its ``add_parameter``.

        Args:
            shape: experts, and this rank's outputs and inputs; input_size: inputs of all ranks.
        """

    @abstractmethod
    def process_weights_after_loading(self, layer: ExpertsLayer) -> None:
        """Make ``layer.packed``; otherwise as in QuantizeMethodBase."""


class QuantizationError(ValueError):
    """A checkpoint's quantization, or the requested one, cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """The facts of a model that a scheme reads.

    Attributes:
        settings: the checkpoint's ``quantization_config``; empty where the weights are quantized while they load.
        packed_modules_mapping, rename: of the model class; see ``models.loader``.
        has_encoders: the model also has encoders of media, and its language model is ``language_model``.
        dtype: of the model, such as ``bfloat16``.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    packed_modules_mapping: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rename: Sequence[tuple[str, str]] = ()
    has_encoders: bool = False
    dtype: str = "bfloat16"

    def sources(self, prefix: str) -> list[str]:
        """Names of the layer, or of the layers that it fuses, in the checkpoint, with ``rename`` applied."""
        for packed, sources in self.packed_modules_mapping.items():
            if f".{packed}." in f".{prefix}.":
                return [f".{prefix}.".replace(f".{packed}.", f".{source}.")[1:-1] for source in sources]
        return [prefix]

    def is_language(self, prefix: str) -> bool:
        """Whether the layer belongs to the language model: encoders of media are not quantized."""
        parts = prefix.split(".")
        return not self.has_encoders or "language_model" in parts or parts[0] == "lm_head"


class QuantizationConfig(ABC):
    """A scheme, for one model: which method each layer gets, and how the checkpoint's tensors become its parameters'.

    Attributes:
        quantizes_layers: False: ``translate`` dequantizes the tensors, or they are computed when they are copied, and
            the model is built unquantized.
        dequantizes_rest: ``translate`` dequantizes what no layer takes quantized, so that any model can be loaded.
        needs_files: only the weight files say what the weights are: a model with dummy weights is built unquantized.
    """

    quantizes_layers: bool = True
    dequantizes_rest: bool = False
    needs_files: bool = False

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        """Return the scheme for a model.

        Raises:
            QuantizationError: the scheme does not support something in ``model.settings``.
        """
        raise NotImplementedError

    @abstractmethod
    def get_name(self) -> str:
        """Return the scheme's name, as in ``--quantization``."""

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | ExpertsMethodBase | None:
        """Return the method for ``layer``, whose checkpoint path is ``prefix``; None leaves it unquantized."""

    def translate(self, weights: Weights, dtype: torch.dtype, device: torch.device | str) -> Weights:
        """Convert a checkpoint's tensors to the names and forms that parameters load. By default, return them as is.

        Names are the checkpoint's, before ``rename``; tensors are views of its files, read one by one. Several tensors
        may become one, and one several.

        Args:
            dtype, device: of the model, for computed tensors.
        """
        return weights

    def may_leave(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a checkpoint's tensor without a place in the model can be ignored without loss."""
        return False


def process_weights(module: nn.Module) -> None:
    """Let a layer's quantization method, if it has one, process the loaded parameters, at most once."""
    method: Any = getattr(module, "quant_method", None)
    process = getattr(method, "process_weights_after_loading", None)
    if process and not getattr(module, "weights_are_processed", False):
        process(module)
        module.weights_are_processed = True  # type: ignore[assignment]


def free(layer: FreesParameters, *names: str) -> None:
    """Remove parameters, and free their memory even if other references to them exist."""
    for name in names:
        param = layer.get_parameter(name)
        hide(layer, name)
        param.data = param.data.new_empty(0)


def hide(layer: FreesParameters, name: str) -> None:
    """Remove a parameter, which the layer's weight may still read."""
    delattr(layer, name)
    layer.freed = (*layer.freed, name)


_hides = ContextVar("hides parameters", default=False)


@contextmanager
def hidden_parameters() -> Iterator[None]:
    """Have models that are loaded within the context lack all parameters that are freed where weights are packed,
    though some of theirs are not: so a model file that reads one fails whatever its dtype and sizes are."""
    token = _hides.set(True)
    try:
        yield
    finally:
        _hides.reset(token)


def hides_parameters() -> bool:
    return _hides.get()
