"""Weights stored in checkpoints as integers of 4 or 8 bits, in groups along their inputs.

Formats differ in names, order of dimensions and packing. A ``GroupFormat`` converts a format's tensors to one form,
which is then cut, fused and packed (``kernels.packed``) in the same way for all formats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.distributed.parallel_state import SplitError
from rtp_llm.srt.kernels.packed import PackedWeight, Reordered, SideBySide
from rtp_llm.srt.layers.linear import LinearBase
from rtp_llm.srt.layers.moe import Experts
from rtp_llm.srt.layers.quantization.base import ExpertsLayer, PackedLayer
from rtp_llm.srt.layers.quantization.methods import PackedExpertsMethod, PackedLinearMethod
from rtp_llm.srt.layers.weights import ShardId, WeightLoader, check_shape, make_parameter

Conversion = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class GroupFormat:
    """Names of a layer's tensors in a checkpoint, and their conversions to those of ``reference.dequantize_int4``.

    Attributes:
        bits: 4 or 8.
        group_size: inputs that share a scale; None: all of them.
        to_weight: to [N, K * bits / 8] uint8. More columns are padding.
        to_scales: to [N, groups]; to_zeros: to [N, groups] uint8.
        zeros: None: all are ``2 ** (bits - 1)``.
        order: [K] integers: the group of each input; None, or absent from the checkpoint: groups are neighbours.
    """

    bits: int
    group_size: int | None
    weight: str
    to_weight: Conversion
    scales: str
    to_scales: Conversion
    zeros: str | None
    to_zeros: Conversion
    order: str | None = None


class GroupedLinearMethod(PackedLinearMethod):
    def __init__(self, group_format: GroupFormat) -> None:
        self.format = group_format

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
        self.name = layer.name
        self.num_outputs = sum(output_partition_sizes)
        self.output_sizes = output_partition_sizes
        self.num_inputs = input_size_per_partition
        self.is_cut = input_size_per_partition != input_size
        self.group_size = min(self.format.group_size or input_size, input_size)
        self.part_ids = layer.part_ids
        check_sizes(self.name, self.format, self.group_size, self.num_inputs, input_size)
        num_columns = input_size * self.format.bits // 8

        def to_weight(tensor: torch.Tensor) -> torch.Tensor:
            return self.format.to_weight(tensor)[:, :num_columns]

        num_groups = -(-self.num_inputs // self.group_size)
        group_dim = 1 if self.group_size < input_size else None  # every rank has the group of all inputs
        columns = self.num_inputs * self.format.bits // 8
        self._add(layer, self.format.weight, torch.uint8, columns, 1, _converted(weight_loader, to_weight))
        loader = _converted(weight_loader, self.format.to_scales)
        self._add(layer, self.format.scales, torch.float32, num_groups, group_dim, loader)
        if self.format.zeros:
            loader = _converted(weight_loader, self.format.to_zeros)
            self._add(layer, self.format.zeros, torch.uint8, num_groups, group_dim, loader)
        if self.format.order:
            self._add_order(layer, self.format.order)

    def _add(
        self,
        layer: PackedLayer,
        name: str,
        dtype: torch.dtype,
        num_columns: int,
        input_dim: int | None,
        weight_loader: WeightLoader,
    ) -> None:
        data = torch.empty(self.num_outputs, num_columns, dtype=dtype)
        layer.register_parameter(name, make_parameter(data, weight_loader, input_dim=input_dim, output_dim=0))

    def _add_order(self, layer: PackedLayer, name: str) -> None:
        """Register the order [fused layers, K]: each fused layer has its own."""
        groups = torch.arange(self.num_inputs) // self.group_size
        data = groups.int().repeat(max(1, len(self.part_ids)), 1)
        layer.register_parameter(name, make_parameter(data, self._load_order, is_optional=True))

    def _load_order(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        if self.is_cut:
            groups = torch.arange(tensor.numel(), device=tensor.device) // self.group_size
            if not torch.equal(tensor, groups.to(tensor.dtype)):
                raise ValueError(
                    f"{self.name}: groups of inputs that are not neighbours (desc_act, actorder) cannot be shared by "
                    "ranks; use --tp-size 1"
                )
            return
        check_shape(tensor, param.shape[1:], self.name)
        places = slice(None) if shard_id is None else self.part_ids.index(shard_id)
        param.data[places] = tensor.to(param.dtype)

    def parameter_names(self) -> tuple[str, ...]:
        names = (self.format.weight, self.format.scales, self.format.zeros, self.format.order)
        return tuple(name for name in names if name)

    def pack(self, layer: PackedLayer) -> PackedWeight:
        weight, scales = (layer.get_parameter(name).data for name in (self.format.weight, self.format.scales))
        zeros = layer.get_parameter(self.format.zeros).data if self.format.zeros else None
        orders = layer.get_parameter(self.format.order).data.unbind() if self.format.order else ()
        if all(torch.equal(order, orders[0]) for order in orders):
            return self._pack_part(weight, scales, zeros, orders[0] if orders else None)
        parts = zip(
            weight.split(self.output_sizes),
            scales.split(self.output_sizes),
            [None] * len(orders) if zeros is None else zeros.split(self.output_sizes),
            orders,
            strict=True,
        )
        return SideBySide([self._pack_part(*part) for part in parts], self.output_sizes)

    def _pack_part(
        self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, groups: torch.Tensor | None
    ) -> PackedWeight:
        order = None if groups is None else input_order(groups, self.group_size, self.name)
        if order is not None:
            weight = reordered(weight, order, self.format.bits)
        packed = pack_groups(weight, scales, zeros, self.group_size, self.format)
        return packed if order is None else Reordered(packed, order)


def grouped_method(layer: nn.Module, group_format: GroupFormat) -> "GroupedLinearMethod | GroupedExpertsMethod | None":
    """Return the method for a linear layer or a layer of experts; None for others."""
    if isinstance(layer, LinearBase):
        return GroupedLinearMethod(group_format)
    return GroupedExpertsMethod(group_format) if isinstance(layer, Experts) else None


def name_in_checkpoint(layer: nn.Module, prefix: str) -> str:
    """Return the name that rules about layers apply to; for experts, that of the first one's gate."""
    return f"{prefix}.0.{layer.expert_names[0]}" if isinstance(layer, Experts) else prefix


class GroupedExpertsMethod(PackedExpertsMethod):
    def __init__(self, group_format: GroupFormat) -> None:
        self.format = group_format
        names = (group_format.weight, group_format.scales, group_format.zeros, group_format.order)
        self.kinds = tuple(name for name in names if name)
        self.group_sizes: dict[str, int] = {}

    def create_weights(self, layer: ExpertsLayer, name: str, shape: tuple[int, int, int], input_size: int) -> None:
        num_experts, num_outputs, num_inputs = shape
        self.name = layer.name
        group_size = self.group_sizes[name] = min(self.format.group_size or input_size, input_size)
        check_sizes(f"{self.name}.{name}", self.format, group_size, num_inputs, input_size)
        num_columns = input_size * self.format.bits // 8
        num_groups, is_split = -(-num_inputs // group_size), group_size < input_size
        add, load = layer.add_parameter, layer.weight_loader

        def add_groups(kind: str, dtype: torch.dtype, convert: Conversion) -> None:
            loader = _converted(load, convert)
            add(
                f"{name}_{kind}",
                num_experts,
                num_outputs,
                num_groups,
                dtype=dtype,
                weight_loader=loader,
                is_split=is_split,
            )

        loader = _converted(load, lambda tensor: self.format.to_weight(tensor)[:, :num_columns])
        columns = num_inputs * self.format.bits // 8
        add(f"{name}_{self.format.weight}", num_experts, num_outputs, columns, dtype=torch.uint8, weight_loader=loader)
        add_groups(self.format.scales, torch.float32, self.format.to_scales)
        if self.format.zeros:
            add_groups(self.format.zeros, torch.uint8, self.format.to_zeros)
        if self.format.order:
            order, check = f"{name}_{self.format.order}", self._check_order(group_size)
            add(order, 0, dtype=torch.int32, weight_loader=check, is_optional=True)

    def _check_order(self, group_size: int) -> WeightLoader:
        def check(param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
            if input_order(tensor, group_size, self.name) is not None:
                raise ValueError(
                    f"{self.name}: groups that are not of neighbours (desc_act) are not supported in experts"
                )

        return cast(WeightLoader, check)

    def pack(self, layer: ExpertsLayer, name: str) -> list[PackedWeight]:
        weights, scales = (layer.get_parameter(f"{name}_{kind}").data for kind in self.kinds[:2])
        zeros: Sequence[torch.Tensor | None] = [None] * len(weights)
        if self.format.zeros:
            zeros = layer.get_parameter(f"{name}_{self.format.zeros}").data.unbind()
        size = self.group_sizes[name]
        return [pack_groups(*expert, size, self.format) for expert in zip(weights, scales, zeros, strict=True)]


def check_sizes(name: str, group_format: GroupFormat, group_size: int, num_inputs: int, input_size: int) -> None:
    """Raise ValueError if a rank's part of a weight's inputs would not fill whole bytes and groups."""
    if num_inputs * group_format.bits % 8:
        raise SplitError(f"{name}: {num_inputs} inputs of {group_format.bits} bits do not fill bytes")
    if num_inputs < input_size and group_size < input_size and num_inputs % group_size:
        raise SplitError(
            f"{name}: {input_size} inputs in groups of {group_size} cannot be shared by {input_size // num_inputs} "
            f"ranks, since {num_inputs} are not whole groups; use a smaller --tp-size"
        )


def pack_groups(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    group_format: GroupFormat,
) -> PackedWeight:
    """Pack a weight whose groups are neighbouring inputs. With 8 bits and a scale per output, products use integers."""
    if zeros is not None and bool((zeros == 1 << (group_format.bits - 1)).all()):
        zeros = None
    if group_format.bits == 4:
        return built_for().pack_int4(weight, scales, zeros, group_size)
    if zeros is None and group_format.group_size is None:
        return built_for().pack_int8((weight ^ 128).view(torch.int8), scales[:, 0].contiguous())
    return built_for().pack_uint8(weight, scales, zeros, group_size)


def _converted(weight_loader: WeightLoader, convert: Conversion) -> WeightLoader:
    def load(param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        weight_loader(param, convert(tensor), shard_id)

    return cast(WeightLoader, load)


def input_order(groups: torch.Tensor, group_size: int, name: str) -> torch.Tensor | None:
    """[K], the group of each input -> the inputs, group by group; None if they are in that order already.

    Raises:
        ValueError: groups do not have ``group_size`` inputs each.
    """
    neighbours = torch.arange(len(groups), device=groups.device) // group_size
    if torch.equal(groups, neighbours.to(groups.dtype)):
        return None
    in_order, order = groups.sort(stable=True)
    if not torch.equal(in_order, neighbours.to(groups.dtype)):
        raise ValueError(f"{name}: its inputs are not in groups of {group_size} each")
    return order


def reordered(weight: torch.Tensor, order: torch.Tensor, bits: int) -> torch.Tensor:
    """Return [N, K * bits / 8] uint8, whose i-th column is column ``order[i]`` of ``weight``."""
    if bits == 8:
        return weight[:, order]
    columns = unpack_nibbles(weight)[:, order]
    return columns[:, 0::2] | columns[:, 1::2] << 4


def bytes_of(words: torch.Tensor) -> torch.Tensor:
    """[rows, words] int32 -> [rows, words, 4] uint8, the lowest byte first."""
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(f"packed integers are of two dimensions and dtype torch.int32, not {_described(words)}")
    return words.contiguous().view(torch.uint8).unflatten(1, (-1, 4))


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[..., n] uint8 -> [..., 2 n]: of each byte the low half first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, words] int32 -> [rows, words * 32 / bits] uint8: of each word the lowest bits first."""
    packed = bytes_of(words).flatten(1)
    return unpack_nibbles(packed) if bits == 4 else packed


def _described(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} and {tensor.dtype}"
