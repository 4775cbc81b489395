"""MXFP4 (OCP Microscaling Formats, 2023), as gpt-oss stores its experts, dequantized while it is loaded.

32 neighbours along a weight's inputs share a scale. A value has four bits (sign, two of exponent, one of mantissa);
a scale is a power of two, stored as its exponent plus 127.
"""

from collections.abc import Iterator
from typing import Self

import torch
from torch import nn

from rtp_llm.srt.layers.quantization.base import QuantizationConfig, QuantizedModel
from rtp_llm.srt.layers.weights import Weights

BLOCKS, SCALES = "_blocks", "_scales"
BYTES_PER_GROUP = 16
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
_VALUES_OF_BYTES = [(_VALUES[byte & 0xF], _VALUES[byte >> 4]) for byte in range(256)]


class Mxfp4Config(QuantizationConfig):
    quantizes_layers = False

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        return cls()

    def get_name(self) -> str:
        return "mxfp4"

    def get_quant_method(self, layer: nn.Module, prefix: str) -> None:
        return None

    def translate(self, weights: Weights, dtype: torch.dtype, device: torch.device | str) -> Weights:
        return dequantize_experts(weights, dtype, device)


def dequantize_experts(
    weights: Weights, dtype: torch.dtype, device: torch.device | str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Checkpoint tensors, with ``x`` [experts, inputs, outputs] in place of each pair ``x_blocks`` and ``x_scales``.

    ``x`` is made on ``device`` when the second of the pair comes, and not kept. All other tensors pass unchanged; a
    tensor without its other half comes last, under its own name.

    Raises:
        ValueError: a pair's shapes or dtypes are not those that ``dequantize`` expects.
    """
    halves: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        if not name.endswith((BLOCKS, SCALES)):
            yield name, tensor
            continue
        halves[name] = tensor
        weight_name = name.removesuffix(BLOCKS).removesuffix(SCALES)
        pair = (weight_name + BLOCKS, weight_name + SCALES)
        if halves.keys() >= set(pair):
            blocks, scales = (halves.pop(half).to(device) for half in pair)
            try:
                weight = dequantize(blocks, scales, dtype)
            except ValueError as error:
                raise ValueError(f"{pair[0]} and {pair[1]}: {error}") from error
            yield weight_name, weight.transpose(1, 2)
    yield from halves.items()


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of experts' blocks.

    Args:
        blocks: [experts, outputs, groups, 16] uint8: 32 values, of each two the first in the lower half of a byte.
        scales: [experts, outputs, groups] uint8; 255 means not a number.

    Returns:
        [experts, outputs, groups * 32] in ``dtype``.
    """
    if blocks.dim() != 4 or blocks.shape != (*scales.shape, BYTES_PER_GROUP):
        raise ValueError(
            f"blocks must be of shape [experts, outputs, groups, {BYTES_PER_GROUP}] and scales of the first three, not "
            f"{list(blocks.shape)} and {list(scales.shape)}"
        )
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"blocks and scales must be of dtype torch.uint8, not {blocks.dtype} and {scales.dtype}")
    num_experts, outputs, groups, _ = blocks.shape
    values_of_bytes = torch.tensor(_VALUES_OF_BYTES, dtype=torch.float32, device=blocks.device)
    result = torch.empty(num_experts, outputs, groups, 2 * BYTES_PER_GROUP, dtype=dtype, device=blocks.device)
    for expert in range(num_experts):  # one at a time: intermediate tensors take several times the result's memory
        factors = scales[expert].view(torch.float8_e8m0fnu).float()
        result[expert] = values_of_bytes[blocks[expert].int()].flatten(-2) * factors[..., None]
    return result.flatten(-2)
