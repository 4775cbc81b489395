"""MXFP4 (OCP Microscaling Formats, 2023), as gpt-oss stores its experts.

32 neighbours along a weight's inputs share a scale. A value has four bits (sign, two of exponent, one of mantissa);
a scale is a power of two, stored as its exponent plus 127. Experts keep these bits, in the blocks of GGUF's type of the
same name, which have the same values in another order. Those of a model that has its own way of loading them are
dequantized.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import nn

from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.distributed.parallel_state import SplitError
from rtp_llm.srt.kernels.packed import PackedWeight
from rtp_llm.srt.layers.moe import Experts
from rtp_llm.srt.layers.quantization.base import ExpertsLayer, QuantizationConfig, QuantizedModel
from rtp_llm.srt.layers.quantization.methods import PackedExpertsMethod
from rtp_llm.srt.layers.weights import Weights

BLOCKS, SCALES = "_blocks", "_scales"
KIND = "mxfp4"  # of the experts' parameters
VALUES, BYTES_PER_GROUP, BLOCK_BYTES = 32, 16, 17  # of a group; a block is its scale and its bytes
NOT_A_NUMBER = 255  # as a scale
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
_VALUES_OF_BYTES = [(_VALUES[byte & 0xF], _VALUES[byte >> 4]) for byte in range(256)]


class Mxfp4Config(QuantizationConfig):
    dequantizes_rest = True

    def __init__(self, model: QuantizedModel) -> None:
        self.model = model
        self.layers: set[str] = set()  # names of the layers of experts that keep their bits

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        return cls(model)

    def get_name(self) -> str:
        return "mxfp4"

    def get_quant_method(self, layer: nn.Module, prefix: str) -> "Mxfp4ExpertsMethod | None":
        if not isinstance(layer, Experts):
            return None
        self.layers.add(prefix)
        return Mxfp4ExpertsMethod()

    def translate(
        self, weights: Weights, dtype: torch.dtype, device: torch.device | str
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Put ``x_mxfp4`` [experts, outputs, bytes per row] in place of each pair ``x_blocks`` and ``x_scales``; where
        experts are dequantized, ``x`` [experts, inputs, outputs].

        Raises:
            ValueError: shapes or dtypes of a pair are not those that ``dequantize`` expects.
        """
        for name, parts in pairs(weights):
            if len(parts) == 1:
                yield from parts.items()
                continue
            blocks, scales = (parts[name + half].to(device) for half in (BLOCKS, SCALES))
            if self._keeps(name):
                yield f"{name}_{KIND}", _checked(name, to_blocks, blocks, scales)
            else:
                yield name, _checked(name, dequantize, blocks, scales, dtype).transpose(1, 2)

    def _keeps(self, name: str) -> bool:
        for pattern, replacement in self.model.rename:
            name = re.sub(pattern, replacement, name)
        layer = name.rpartition(".")[0]
        return layer in self.layers or f"model.{layer}" in self.layers


class Mxfp4ExpertsMethod(PackedExpertsMethod):
    """Parameters: ``w13_mxfp4`` and ``w2_mxfp4`` [experts, outputs, bytes per row] uint8."""

    kinds = (KIND,)
    fused_suffixes = {KIND: f"_{KIND}"}

    def create_weights(self, layer: ExpertsLayer, name: str, shape: tuple[int, int, int], input_size: int) -> None:
        num_experts, num_outputs, num_inputs = shape
        if num_inputs % VALUES:
            raise SplitError(
                f"{layer.name}.{name}: {num_inputs} of {input_size} inputs on this rank are not in whole groups of "
                f"{VALUES}; use a smaller --tp-size"
            )
        row_bytes = num_inputs // VALUES * BLOCK_BYTES
        layer.add_parameter(f"{name}_{KIND}", num_experts, num_outputs, row_bytes, dtype=torch.uint8, in_order=True)

    def pack(self, layer: ExpertsLayer, name: str) -> list[PackedWeight]:
        experts = layer.get_parameter(f"{name}_{KIND}").data
        num_inputs = experts.shape[-1] // BLOCK_BYTES * VALUES
        return [built_for().pack_blocks(blocks, "MXFP4", num_inputs) for blocks in experts]


def pairs(weights: Weights) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield ``(x, {"x_blocks": ..., "x_scales": ...})`` of each pair as soon as it is complete, and ``(x, {x: ...})``
    of every other tensor; halves without the other come last, one by one."""
    halves: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        if not name.endswith((BLOCKS, SCALES)):
            yield name, {name: tensor}
            continue
        halves[name] = tensor
        weight_name = name.removesuffix(BLOCKS).removesuffix(SCALES)
        pair = (weight_name + BLOCKS, weight_name + SCALES)
        if halves.keys() >= set(pair):
            yield weight_name, {half: halves.pop(half) for half in pair}
    for name, tensor in halves.items():
        yield name, {name: tensor}


def to_blocks(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return GGUF's blocks of the same values: a scale, then 16 bytes of which the lower halves are values 0 to 15.

    Args:
        blocks, scales: as for ``dequantize``.

    Returns:
        [experts, outputs, groups * 17] uint8.

    Raises:
        ValueError: also if a scale is not a number, which GGUF cannot say.
    """
    _check(blocks, scales)
    if bool((scales == NOT_A_NUMBER).any()):
        raise ValueError(f"a scale is {NOT_A_NUMBER}, not a number")
    result = torch.empty(*scales.shape, BLOCK_BYTES, dtype=torch.uint8, device=blocks.device)
    result[..., 0] = scales
    for own, of_expert in zip(result, blocks, strict=True):  # one at a time, as in ``dequantize``
        values = torch.stack((of_expert & 15, of_expert >> 4), dim=-1).flatten(-2)
        own[..., 1:] = values[..., :BYTES_PER_GROUP] | values[..., BYTES_PER_GROUP:] << 4
    return result.flatten(-2)


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of experts' blocks.

    Args:
        blocks: [experts, outputs, groups, 16] uint8: 32 values, of each two the first in the lower half of a byte.
        scales: [experts, outputs, groups] uint8; 255 means not a number.

    Returns:
        [experts, outputs, groups * 32] in ``dtype``.
    """
    _check(blocks, scales)
    num_experts, outputs, groups, _ = blocks.shape
    values_of_bytes = torch.tensor(_VALUES_OF_BYTES, dtype=torch.float32, device=blocks.device)
    result = torch.empty(num_experts, outputs, groups, VALUES, dtype=dtype, device=blocks.device)
    for expert in range(num_experts):  # one at a time: intermediate tensors take several times the result's memory
        factors = scales[expert].view(torch.float8_e8m0fnu).float()
        result[expert] = values_of_bytes[blocks[expert].int()].flatten(-2) * factors[..., None]
    return result.flatten(-2)


def _checked(name: str, convert: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    try:
        return convert(*args)
    except ValueError as error:
        raise ValueError(f"{name}{BLOCKS} and {name}{SCALES}: {error}") from error


def _check(blocks: torch.Tensor, scales: torch.Tensor) -> None:
    if blocks.dim() != 4 or blocks.shape != (*scales.shape, BYTES_PER_GROUP):
        raise ValueError(
            f"blocks must be of shape [experts, outputs, groups, {BYTES_PER_GROUP}] and scales of the first three, not "
            f"{list(blocks.shape)} and {list(scales.shape)}"
        )
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"blocks and scales must be of dtype torch.uint8, not {blocks.dtype} and {scales.dtype}")
