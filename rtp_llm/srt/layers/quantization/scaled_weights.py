"""Weights stored in 8 or 4 bits with a scale for each tensor, output, block or group of inputs, whatever the format.

A weight is its number times its scale. Activations are rounded to fp8 where a checkpoint declares it and the device
multiplies fp8 with fp8 (``DeviceProvider.pack_fp8``), with scales that are found, whether the checkpoint has some or
not. Elsewhere they stay as they are: errors are smaller then, and products take no longer.

Scales become one for each output and group of inputs, [N, groups], before they are cut and fused, so that neither the
ranks' parts nor fused layers need to begin where a block does.
"""

import math
import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kernels.packed import PackedWeight
from rtp_llm.srt.layers.linear import LinearBase
from rtp_llm.srt.layers.moe import Experts
from rtp_llm.srt.layers.quantization.base import ExpertsLayer, PackedLayer
from rtp_llm.srt.layers.quantization.methods import PackedExpertsMethod, PackedLinearMethod
from rtp_llm.srt.layers.weights import ShardId, WeightLoader, Weights, check_shape, make_parameter

WEIGHT, SCALE = "weight", "weight_scale"
_NOT_NEEDED = re.compile(  # scales of activations and of a quantized cache, and bounds of the former
    r"(^|[._])(input|activation|output|prob|[qkv]|kv)_(scale|zero_point)$|\.(input_(scale_ub|global_scale)|weight_shape)$"
)
_SPELLINGS = (  # names of scales -> those of parameters
    (re.compile(r"\.(weight_scale_inv|qscale_weight)$"), f".{SCALE}"),
    (re.compile(r"(gate_up_proj|up_proj|down_proj)_(scale_inv|scale)$"), rf"\1_{SCALE}"),  # of all experts
)


@dataclass(frozen=True, slots=True)
class ScaleFormat:
    """How weights are scaled.

    Attributes:
        block: outputs and inputs that share a scale; None: a scale for each tensor or each output, as the shape of the
            checkpoint's scales tells.
        rounds_inputs: the checkpoint is made for activations in fp8.
    """

    block: tuple[int, int] | None = None
    rounds_inputs: bool = False


class ScaleGrid:
    """The scales of one layer: a checkpoint's tensors, spread to [outputs, groups] of all ranks.

    Attributes:
        group_size: inputs that share a scale. Where a rank's part of the inputs ends within a block, it is smaller than
            the block.
        num_groups: on this rank; is_split: ranks have different ones.
    """

    def __init__(self, name: str, stored: ScaleFormat, num_inputs: int, input_size: int) -> None:
        self.name, self.block, self.input_size = name, stored.block, input_size
        columns = min(stored.block[1], input_size) if stored.block else input_size
        self.is_split = columns < input_size and num_inputs < input_size
        self.group_size = math.gcd(columns, num_inputs) if self.is_split else columns
        self.num_groups = -(-num_inputs // self.group_size)

    def spread(self, scales: torch.Tensor, num_outputs: int) -> torch.Tensor:
        """Scales of ``num_outputs`` -> [num_outputs, groups of all ranks] float32.

        Raises:
            ValueError: their shape is none that the format has.
        """
        scales = _float_scales(scales)
        num_groups = -(-self.input_size // self.group_size)
        if scales.numel() == 1:
            return scales.reshape(1, 1).expand(num_outputs, num_groups)
        if self.block is None:
            if scales.shape not in ((num_outputs,), (num_outputs, 1)):
                raise ValueError(
                    f"{self.name}: expected one scale, or one for each of {num_outputs} outputs, got scales of "
                    f"{list(scales.shape)}: with blocks, the configuration must name their size"
                )
            return scales.reshape(num_outputs, 1)
        if scales.dim() == 4:  # ModelOpt keeps the dimensions of blocks
            scales = scales[:, 0, :, 0]
        rows, columns = self.block
        check_shape(scales, (-(-num_outputs // rows), -(-self.input_size // columns)), f"{self.name}: scales")
        of_rows = scales.repeat_interleave(rows, dim=0)[:num_outputs]
        finer = max(1, columns // self.group_size) if self.is_split else 1
        return of_rows.repeat_interleave(finer, dim=1)[:, :num_groups]


class ScaledLinearMethod(PackedLinearMethod):
    """Parameters: ``weight`` [N, bytes per row] of bytes, and ``weight_scale`` [N, groups]."""

    weight_dtype: torch.dtype
    codes_per_byte = 1

    @abstractmethod
    def stored(self, input_size: int) -> ScaleFormat:
        """Return the scales' blocks, for a layer of so many inputs on all ranks."""

    @abstractmethod
    def pack_scaled(self, weight: torch.Tensor, scales: torch.Tensor, group_size: int) -> PackedWeight:
        """Pack the parameters."""

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
        num_outputs = sum(output_partition_sizes)
        grid = self.grid = ScaleGrid(layer.name, self.stored(input_size), input_size_per_partition, input_size)
        row_bytes = _row_bytes(layer.name, input_size_per_partition, self.codes_per_byte)
        weight = torch.empty(num_outputs, row_bytes, dtype=self.weight_dtype)
        loader = checked_dtype(weight_loader, layer.name, self.weight_dtype)
        layer.register_parameter(WEIGHT, make_parameter(weight, loader, input_dim=1, output_dim=0))
        scales = torch.empty(num_outputs, grid.num_groups, dtype=torch.float32)
        input_dim = 1 if grid.is_split else None
        loader = scales_loader(layer, grid, weight_loader)
        layer.register_parameter(SCALE, make_parameter(scales, loader, input_dim=input_dim, output_dim=0))

    def parameter_names(self) -> tuple[str, ...]:
        return (WEIGHT, SCALE)

    def pack(self, layer: PackedLayer) -> PackedWeight:
        weight, scales = (layer.get_parameter(name).data for name in (WEIGHT, SCALE))
        return self.pack_scaled(weight, scales, self.grid.group_size)


class ScaledExpertsMethod(PackedExpertsMethod):
    """As ScaledLinearMethod, for experts."""

    kinds = (WEIGHT, SCALE)
    fused_suffixes = {WEIGHT: "", SCALE: f"_{SCALE}"}

    def __init__(self, linear: ScaledLinearMethod) -> None:
        self.linear = linear
        self.grids: dict[str, ScaleGrid] = {}

    def create_weights(self, layer: ExpertsLayer, name: str, shape: tuple[int, int, int], input_size: int) -> None:
        num_experts, num_outputs, num_inputs = shape
        grid = ScaleGrid(f"{layer.name}.{name}", self.linear.stored(input_size), num_inputs, input_size)
        self.grids[name] = grid
        experts = cast(Experts, layer)
        projections = len(experts.halves) if name == "w13" else 1
        outputs = experts.intermediate_size if name == "w13" else experts.hidden_size  # of one projection, on all ranks

        def load_scales(param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
            if shard_id is None:
                spread = _of_all_experts(grid, tensor, num_experts, projections, outputs)
            else:
                spread = grid.spread(tensor, outputs)
            layer.weight_loader(param, spread, shard_id)

        row_bytes, dtype = _row_bytes(grid.name, num_inputs, self.linear.codes_per_byte), self.linear.weight_dtype
        loader = checked_dtype(layer.weight_loader, layer.name, dtype)
        layer.add_parameter(f"{name}_{WEIGHT}", num_experts, num_outputs, row_bytes, dtype=dtype, weight_loader=loader)
        layer.add_parameter(
            f"{name}_{SCALE}",
            num_experts,
            num_outputs,
            grid.num_groups,
            dtype=torch.float32,
            weight_loader=cast(WeightLoader, load_scales),
            is_split=grid.is_split,
            in_order=True,
        )

    def pack(self, layer: ExpertsLayer, name: str) -> list[PackedWeight]:
        weights, scales = (layer.get_parameter(f"{name}_{kind}").data for kind in self.kinds)
        size = self.grids[name].group_size
        return [self.linear.pack_scaled(weight, own, size) for weight, own in zip(weights, scales, strict=True)]


class Fp8LinearMethod(ScaledLinearMethod):
    weight_dtype = torch.float8_e4m3fn

    def __init__(self, stored: ScaleFormat) -> None:
        self._stored = stored

    def stored(self, input_size: int) -> ScaleFormat:
        return self._stored

    def pack_scaled(self, weight: torch.Tensor, scales: torch.Tensor, group_size: int) -> PackedWeight:
        return built_for().pack_fp8(weight, scales, group_size, self._stored.rounds_inputs)


class TableLinearMethod(ScaledLinearMethod):
    """Codes of 4 bits, two in a byte, the first in the lower half. ``numbers``: [16], what they stand for."""

    weight_dtype = torch.uint8
    codes_per_byte = 2

    def __init__(self, numbers: Sequence[float], group_size: int) -> None:
        self.numbers, self.group_size = numbers, group_size

    def stored(self, input_size: int) -> ScaleFormat:
        return ScaleFormat((1, self.group_size))

    def pack_scaled(self, weight: torch.Tensor, scales: torch.Tensor, group_size: int) -> PackedWeight:
        table = torch.tensor(self.numbers, device=weight.device, dtype=torch.float32)
        return built_for().pack_table(weight, table, scales, group_size)


def fp8_method(layer: nn.Module, stored: ScaleFormat) -> ScaledLinearMethod | ScaledExpertsMethod | None:
    """Return the method for a linear layer or a layer of experts; None for others."""
    return scaled_method(layer, Fp8LinearMethod(stored))


def scaled_method(layer: nn.Module, linear: ScaledLinearMethod) -> ScaledLinearMethod | ScaledExpertsMethod | None:
    """Return the method for a linear layer, or for a layer of such experts; None for others."""
    if isinstance(layer, LinearBase):
        return linear
    return ScaledExpertsMethod(linear) if isinstance(layer, Experts) else None


def scales_loader(layer: PackedLayer, grid: ScaleGrid, weight_loader: WeightLoader) -> WeightLoader:
    """Return a loader that spreads a linear layer's scales before they are cut."""
    num_source_outputs = cast(LinearBase, layer).num_source_outputs

    def load(param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        weight_loader(param, grid.spread(tensor, num_source_outputs(shard_id)), shard_id)

    return cast(WeightLoader, load)


def in_one_spelling(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint, with the names of scales as parameters have them."""
    for name, tensor in weights:
        for pattern, replacement in _SPELLINGS:
            name = pattern.sub(replacement, name)
        yield name, _float_scales(tensor) if name.endswith(f".{SCALE}") or name.endswith(f"_{SCALE}") else tensor


def dequantized_rest(
    weights: Weights, stored: ScaleFormat, kept: Collection[str], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint, with weights of layers that the model does not multiply in fp8 dequantized.

    Args:
        weights: in one spelling.
        kept: last parts of the names of layers that it does: ``q_proj``, ...
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        layer, _, kind = name.rpartition(".")
        is_half = kind == SCALE or (kind == WEIGHT and tensor.dtype == torch.float8_e4m3fn)
        if not is_half or layer.rpartition(".")[2] in kept:
            yield name, tensor
            continue
        halves = waiting.setdefault(layer, {})
        halves[kind] = tensor
        if len(halves) == 2:
            yield f"{layer}.{WEIGHT}", dequantized(layer, stored, waiting.pop(layer)).to(dtype)
    for layer, halves in waiting.items():
        yield from ((f"{layer}.{kind}", tensor) for kind, tensor in halves.items())


def dequantized(name: str, stored: ScaleFormat, halves: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A weight [N, K] and its scales, of any format -> [N, K] float32."""
    weight = halves[WEIGHT]
    if weight.dim() != 2:
        raise ValueError(f"{name}: only weights of two dimensions are dequantized, not of {list(weight.shape)}")
    grid = ScaleGrid(name, stored, weight.shape[1], weight.shape[1])
    return reference.dequantize_fp8(weight, grid.spread(halves[SCALE], weight.shape[0]), grid.group_size)


def last_parts(layer: nn.Module, sources: Iterable[str]) -> list[str]:
    """Return the last parts of the names that a layer, or the layers it fuses, or its experts have in a checkpoint."""
    if isinstance(layer, Experts):
        return list(layer.expert_names)
    return [source.rpartition(".")[2] for source in sources]


def is_not_needed(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor has scales of activations, which are found, or of a cache, which is not rounded by them."""
    if name.endswith("weight_zero_point"):
        return not bool(tensor.float().any())
    return _NOT_NEEDED.search(name) is not None


def checked_dtype(weight_loader: WeightLoader, name: str, dtype: torch.dtype) -> WeightLoader:
    """Return a loader that takes this dtype only: any other would be converted silently."""

    def load(param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        if tensor.dtype != dtype:
            why = "another format"
            if tensor.element_size() > 1:
                why = "not quantized: name the layer among those that are left as they are"
            expected, found = (str(one).removeprefix("torch.") for one in (dtype, tensor.dtype))
            raise ValueError(
                f"{name}: expected a weight in {expected}, as the configuration says; the checkpoint's is in {found}, "
                f"{why}"
            )
        weight_loader(param, tensor, shard_id)

    return cast(WeightLoader, load)


def _row_bytes(name: str, num_inputs: int, codes_per_byte: int) -> int:
    if num_inputs % codes_per_byte:
        raise ValueError(f"{name}: {num_inputs} inputs of {8 // codes_per_byte} bits do not fill bytes")
    return num_inputs // codes_per_byte


def _of_all_experts(
    grid: ScaleGrid, scales: torch.Tensor, num_experts: int, projections: int, outputs: int
) -> torch.Tensor:
    """Scales of all experts' fused projections -> [experts, projections * outputs, groups].

    Blocks may begin anew with each projection, or run through all of them; without blocks there may be a scale for each
    expert, each projection, or each output.
    """
    scales = _float_scales(scales)
    if scales.numel() == 1:
        scales = scales.reshape(1).expand(num_experts)
    if scales.shape[0] != num_experts:
        raise ValueError(f"{grid.name}: expected scales of {num_experts} experts, got {list(scales.shape)}")
    rows = scales.shape[1] if scales.dim() > 1 else 1
    block_rows = grid.block[0] if grid.block else outputs
    through = -(-projections * outputs // block_rows) if grid.block else projections * outputs
    if rows != through and projections > 1 and rows == projections * -(-outputs // block_rows):
        parts = [[grid.spread(part, outputs) for part in one.chunk(projections)] for one in scales]
        return torch.stack([torch.cat(of_expert) for of_expert in parts])
    return torch.stack([grid.spread(one, projections * outputs) for one in scales])


def _float_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float32; bytes are exponents of two plus 127 (ue8m0)."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()
