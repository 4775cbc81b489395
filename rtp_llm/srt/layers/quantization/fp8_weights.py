"""Weights stored in float8_e4m3fn, with a scale for each tensor, output, block or group of inputs, whatever the format.

A weight is its number times its scale. Activations are not rounded to 8 bits, whether the checkpoint has scales for
them or asks for scales to be found: products with activations as they are have smaller errors, and take no longer
where weights are read from memory.

Scales become one for each output and group of inputs, [N, groups], before they are cut and fused, so that neither the
ranks' parts nor fused layers need to begin where a block does.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.kernels.packed import PackedWeight
from rtp_llm.srt.layers.linear import LinearBase
from rtp_llm.srt.layers.moe import Experts
from rtp_llm.srt.layers.quantization.base import ExpertsLayer, PackedLayer
from rtp_llm.srt.layers.quantization.methods import PackedExpertsMethod, PackedLinearMethod
from rtp_llm.srt.layers.weights import ShardId, WeightLoader, Weights, check_shape, make_parameter

WEIGHT, SCALE = "weight", "weight_scale"
_NOT_NEEDED = re.compile(  # scales of activations and of a quantized cache, and bounds of the former
    r"(^|[._])(input|activation|output|prob|[qkv]|kv)_(scale|zero_point)$|\.(input_scale_ub|weight_shape)$"
)
_SPELLINGS = (  # names of scales -> those of parameters
    (re.compile(r"\.(weight_scale_inv|qscale_weight)$"), f".{SCALE}"),
    (re.compile(r"(gate_up_proj|up_proj|down_proj)_(scale_inv|scale)$"), rf"\1_{SCALE}"),  # of all experts
)


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """How weights are scaled.

    Attributes:
        block: outputs and inputs that share a scale; None: a scale for each tensor or each output, as the shape of the
            checkpoint's scales tells.
    """

    block: tuple[int, int] | None = None


class ScaleGrid:
    """The scales of one layer: a checkpoint's tensors, spread to [outputs, groups] of all ranks.

    Attributes:
        group_size: inputs that share a scale. Where a rank's part of the inputs ends within a block, it is smaller than
            the block.
        num_groups: on this rank; is_split: ranks have different ones.
    """

    def __init__(self, name: str, stored: Fp8Format, num_inputs: int, input_size: int) -> None:
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


class Fp8LinearMethod(PackedLinearMethod):
    def __init__(self, stored: Fp8Format) -> None:
        self.stored = stored

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
        grid = self.grid = ScaleGrid(layer.name, self.stored, input_size_per_partition, input_size)
        weight = torch.empty(num_outputs, input_size_per_partition, dtype=torch.float8_e4m3fn)
        loader = checked_dtype(weight_loader, layer.name)
        layer.register_parameter(WEIGHT, make_parameter(weight, loader, input_dim=1, output_dim=0))
        scales = torch.empty(num_outputs, grid.num_groups, dtype=torch.float32)
        input_dim = 1 if grid.is_split else None
        loader = scales_loader(layer, grid, weight_loader)
        layer.register_parameter(SCALE, make_parameter(scales, loader, input_dim=input_dim, output_dim=0))

    def parameter_names(self) -> tuple[str, ...]:
        return (WEIGHT, SCALE)

    def pack(self, layer: PackedLayer) -> PackedWeight:
        weight, scales = (layer.get_parameter(name).data for name in (WEIGHT, SCALE))
        return built_for().pack_fp8(weight, scales, self.grid.group_size)


class Fp8ExpertsMethod(PackedExpertsMethod):
    kinds = (WEIGHT, SCALE)
    fused_suffixes = {WEIGHT: "", SCALE: f"_{SCALE}"}

    def __init__(self, stored: Fp8Format) -> None:
        self.stored = stored
        self.grids: dict[str, ScaleGrid] = {}

    def create_weights(self, layer: ExpertsLayer, name: str, shape: tuple[int, int, int], input_size: int) -> None:
        num_experts, num_outputs, num_inputs = shape
        grid = self.grids[name] = ScaleGrid(f"{layer.name}.{name}", self.stored, num_inputs, input_size)
        experts = cast(Experts, layer)
        projections = len(experts.halves) if name == "w13" else 1
        outputs = experts.intermediate_size if name == "w13" else experts.hidden_size  # of one projection, on all ranks

        def load_scales(param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
            if shard_id is None:
                spread = _of_all_experts(grid, tensor, num_experts, projections, outputs)
            else:
                spread = grid.spread(tensor, outputs)
            layer.weight_loader(param, spread, shard_id)

        loader = checked_dtype(layer.weight_loader, layer.name)
        layer.add_parameter(f"{name}_{WEIGHT}", *shape, dtype=torch.float8_e4m3fn, weight_loader=loader)
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
        return [built_for().pack_fp8(weight, own, size) for weight, own in zip(weights, scales, strict=True)]


def fp8_method(layer: nn.Module, stored: Fp8Format) -> Fp8LinearMethod | Fp8ExpertsMethod | None:
    """Return the method for a linear layer or a layer of experts; None for others."""
    if isinstance(layer, LinearBase):
        return Fp8LinearMethod(stored)
    return Fp8ExpertsMethod(stored) if isinstance(layer, Experts) else None


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


def is_not_needed(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor has scales of activations or of a cache, neither of which is rounded to 8 bits by them."""
    if name.endswith("weight_zero_point"):
        return not bool(tensor.float().any())
    return _NOT_NEEDED.search(name) is not None


def checked_dtype(weight_loader: WeightLoader, name: str) -> WeightLoader:
    """Return a loader that takes float8_e4m3fn only: any other dtype would be rounded silently."""

    def load(param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        if tensor.dtype != torch.float8_e4m3fn:
            why = "another format"
            if tensor.element_size() > 1:
                why = "not quantized: name the layer among those that are left as they are"
            raise ValueError(
                f"{name}: expected a weight in float8_e4m3fn, as the configuration says; the checkpoint's is in "
                f"{str(tensor.dtype).removeprefix('torch.')}, {why}"
            )
        weight_loader(param, tensor, shard_id)

    return cast(WeightLoader, load)


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
