"""Weights of GGUF files, which stay in their blocks (``kernels/blocks.py``); each tensor of a file has its own type.

What a layer's parts are made of is known when they come. Until then its parameter ``weight`` has a shape and no memory;
then it has a tensor for each type, and after loading a packed weight for each run of neighbouring parts of one type.

Weights are computed when they are loaded, and then unquantized, where blocks are of no use: in models and layers of
float32, in ``kv_b_proj``, which latent attention splits, in all that is no linear layer, vocabulary table or expert,
and where ranks cut a row within a block.
"""

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Self, cast

import torch
from torch import nn

from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.kernels.block_tensor import BlockTensor
from rtp_llm.srt.kernels.blocks import BLOCK_TYPES
from rtp_llm.srt.kernels.packed import PackedWeight, PlainDense, PlainExperts, SideBySide
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.linear import LinearBase
from rtp_llm.srt.layers.moe import Experts
from rtp_llm.srt.layers.quantization.base import (
    EmbeddingMethodBase,
    ExpertsLayer,
    ExpertsMethodBase,
    PackedLayer,
    QuantizationConfig,
    QuantizedModel,
    QuantizeMethodBase,
    free,
)
from rtp_llm.srt.layers.quantization.methods import PackedExpertsMethod, PackedLinearMethod
from rtp_llm.srt.layers.quantization.on_load import NOT_MULTIPLIED
from rtp_llm.srt.layers.weights import ShardId, WeightLoader, make_parameter

logger = logging.getLogger(__name__)


class GGUFConfig(QuantizationConfig):
    needs_files = True

    def __init__(self, model: QuantizedModel) -> None:
        self.model = model
        self.quantizes_layers = model.dtype != "float32"
        self._has_warned = False

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        return cls(model)

    def get_name(self) -> str:
        return "gguf"

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | ExpertsMethodBase | None:
        is_language = self.model.is_language(prefix) and prefix.rpartition(".")[2] not in NOT_MULTIPLIED
        if not is_language or getattr(layer, "params_dtype", None) == torch.float32:
            return None
        if isinstance(layer, LinearBase):
            return GGUFLinearMethod(self)
        if isinstance(layer, VocabParallelEmbedding):
            return GGUFEmbeddingMethod(self)
        return GGUFExpertsMethod(self) if isinstance(layer, Experts) else None

    def warn(self, name: str, what: str) -> None:
        """Warn once that weights take the memory of unquantized ones."""
        if not self._has_warned:
            logger.warning("%s, and perhaps others: %s; they take the memory of unquantized weights", name, what)
        self._has_warned = True


class Staged:
    """A layer's weight while its parts are loaded: a tensor of the whole shape for each type that parts have.

    Rows of other types' parts stay unwritten in each, and so take no memory on a CPU.

    Attributes:
        types: shard ids of the parts that came, with their types; None: no blocks.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, scheme: GGUFConfig, name: str) -> None:
        self.shape, self.dtype, self.scheme, self.name = tuple(shape), dtype, scheme, name
        self.types: dict[ShardId, str | None] = {}
        self._targets: dict[str | None, nn.Parameter] = {}

    def placeholder(self) -> torch.Tensor:
        """A tensor of the whole shape without memory."""
        return torch.empty((), dtype=self.dtype).expand(self.shape)

    def loader(self, weight_loader: WeightLoader) -> WeightLoader:
        """Return a loader that lets the layer's own one load each part into the tensor of its type."""

        def load(param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
            block_type = self._type_of(tensor)
            if block_type not in self._targets:
                self._targets[block_type] = self._target(block_type, param)
            weight_loader(self._targets[block_type], tensor, shard_id)
            if not self.types:
                param.data = self.placeholder()  # other memory shows those who look for unset parameters that it is set
            self.types[shard_id] = block_type

        return cast(WeightLoader, load)

    def _type_of(self, tensor: torch.Tensor) -> str | None:
        if not isinstance(tensor, BlockTensor):
            return None
        if self.shape[-1] % BLOCK_TYPES[tensor.block_type].num_values:
            self.scheme.warn(
                self.name,
                f"{self.shape[-1]} inputs on a rank are no whole blocks of {tensor.block_type}, so they are loaded as "
                "values",
            )
            return None
        return tensor.block_type

    def _target(self, block_type: str | None, param: nn.Parameter) -> nn.Parameter:
        data = (
            torch.empty(self.shape, dtype=self.dtype)
            if block_type is None
            else BlockTensor.to_be_written(self.shape, block_type, self.dtype)
        )
        target = nn.Parameter(data, requires_grad=False)
        vars(target).update(vars(param))  # the dimensions that are split, and what else its loader reads
        return target

    def type_of_part(self, part_id: ShardId) -> str | None:
        """Return the type of a part.

        Raises:
            ValueError: it was not loaded.
        """
        for shard_id, block_type in self.types.items():
            if shard_id in (part_id, None) or (isinstance(shard_id, tuple) and part_id in shard_id):
                return block_type
        raise ValueError(f"{self.name}: its part {part_id!r} was not loaded")

    def whole(self) -> torch.Tensor | None:
        """Return the plain tensor, if no part is of blocks."""
        return self._written(None) if set(self._targets) == {None} else None

    def pack(self, block_type: str | None, rows: slice, expert: int | None = None) -> PackedWeight:
        """Pack rows of a tensor, or of an expert's."""
        whole = self._written(block_type)
        part = (whole if expert is None else whole[expert])[rows]
        if not isinstance(part, BlockTensor):
            return built_for().pack_dense(part) or PlainDense(part.clone() if len(self._targets) > 1 else part)
        return built_for().pack_blocks(part.blocks, part.block_type, part.shape[1])

    def values(self, block_type: str | None, expert: int) -> torch.Tensor:
        """[N, K]: an expert's values."""
        part = self._written(block_type)[expert]
        return part.values() if isinstance(part, BlockTensor) else part

    def _written(self, block_type: str | None) -> torch.Tensor:
        data = self._targets[block_type].data
        return data.written() if isinstance(data, BlockTensor) else data


class GGUFLinearMethod(PackedLinearMethod):
    def __init__(self, scheme: GGUFConfig) -> None:
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
        shape = sum(output_partition_sizes), input_size_per_partition
        self.sizes = output_partition_sizes
        self.staged = Staged(shape, params_dtype, self.scheme, layer.name)
        _register(layer, self.staged, weight_loader, input_dim=1)

    def parameter_names(self) -> tuple[str, ...]:
        return ("weight",)

    def pack(self, layer: PackedLayer) -> PackedWeight:
        part_ids: Sequence[ShardId] = layer.part_ids or [None]
        types = [self.staged.type_of_part(part_id) for part_id in part_ids]
        packed, sizes, start = [], [], 0
        for block_type, parts in groupby(zip(types, self.sizes, strict=True), lambda pair: pair[0]):
            size = sum(size for _, size in parts)
            packed.append(self.staged.pack(block_type, slice(start, start + size)))
            sizes.append(size)
            start += size
        del self.staged
        return packed[0] if len(packed) == 1 else SideBySide(packed, sizes)


class GGUFEmbeddingMethod(EmbeddingMethodBase):
    def __init__(self, scheme: GGUFConfig) -> None:
        self.scheme = scheme

    def create_weights(
        self,
        layer: PackedLayer,
        num_embeddings_per_partition: int,
        embedding_dim: int,
        params_dtype: torch.dtype,
        weight_loader: WeightLoader,
    ) -> None:
        self.staged = Staged((num_embeddings_per_partition, embedding_dim), params_dtype, self.scheme, layer.name)
        _register(layer, self.staged, weight_loader, input_dim=None)

    def process_weights_after_loading(self, layer: PackedLayer) -> None:
        block_type, weight = self.staged.type_of_part(None), self.staged.whole()
        if weight is not None and not layer.is_head:  # rows are only looked up
            layer.packed = PlainDense(weight)
        else:
            layer.packed = self.staged.pack(block_type, slice(None))
        del self.staged
        free(layer, "weight")


class GGUFExpertsMethod(PackedExpertsMethod):
    def __init__(self, scheme: GGUFConfig) -> None:
        self.scheme = scheme
        self.staged: dict[str, Staged] = {}

    def create_weights(self, layer: ExpertsLayer, name: str, shape: tuple[int, int, int], input_size: int) -> None:
        params_dtype: Any = layer.params_dtype
        staged = self.staged[name] = Staged(shape, params_dtype, self.scheme, f"{layer.name}.{name}")
        param = layer.add_parameter(f"{name}_weight", *shape, weight_loader=staged.loader(layer.weight_loader))
        param.data = staged.placeholder()

    def process_weights_after_loading(self, layer: ExpertsLayer) -> None:
        for name in ("w13", "w2"):
            weight = self.staged[name].whole()
            if weight is None:
                layer.packed[name] = built_for().group_experts(self.pack(layer, name))
            else:
                layer.packed[name] = built_for().pack_experts(weight) or PlainExperts(weight)
            del self.staged[name]
            free(layer, f"{name}_weight")

    def pack(self, layer: ExpertsLayer, name: str) -> list[PackedWeight]:
        staged, experts = self.staged[name], cast(Experts, layer)
        halves = experts.halves if name == "w13" else ("w2",)
        return [
            self._pack_expert(staged, expert, [staged.type_of_part((expert, half)) for half in halves], experts)
            for expert in range(staged.shape[0])
        ]

    def _pack_expert(self, staged: Staged, expert: int, types: Sequence[str | None], experts: Experts) -> PackedWeight:
        """Pack an expert's projections of one input; ``types``: of each of them."""
        if len(set(types)) == 1:
            return staged.pack(types[0], slice(None), expert)
        num_rows = staged.shape[1] // len(types)
        if experts.is_interleaved:  # rows of both types take turns
            self.scheme.warn(staged.name, f"gates and ups of {' and '.join(map(str, types))} take turns")
            halves = [staged.values(block_type, expert).unflatten(0, (-1, 2)) for block_type in types]
            weight = torch.stack([half[:, i] for i, half in enumerate(halves)], dim=1).flatten(0, 1)
            return built_for().pack_dense(weight) or PlainDense(weight)
        rows = [slice(i * num_rows, (i + 1) * num_rows) for i in range(len(types))]
        parts = [staged.pack(block_type, half, expert) for block_type, half in zip(types, rows, strict=True)]
        return SideBySide(parts, [num_rows] * len(types))


def _register(layer: PackedLayer, staged: Staged, weight_loader: WeightLoader, input_dim: int | None) -> None:
    param = make_parameter(staged.placeholder(), staged.loader(weight_loader), input_dim=input_dim, output_dim=0)
    layer.register_parameter("weight", param)
