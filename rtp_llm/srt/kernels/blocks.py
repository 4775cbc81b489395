"""Weights in blocks, as GGUF files store them: a fixed number of neighbours along a weight's inputs, with their scales.

A weight [N, K] is [N, bytes per row] uint8: a row's blocks follow one another, and a block does not depend on others.
The layouts are those of ggml (``ggml-common.h``), whose numbers are little-endian; values are computed in float32, in
the order of the ``gguf`` package's ``quants.py``, so that both give the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rtp_llm.srt.kernels.packed import ROWS_AT_ONCE, PackedWeight

VALUES_AT_ONCE = 1 << 17  # that are dequantized: intermediate tensors stay in the processor's cache
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice those of the format


@dataclass(frozen=True, slots=True)
class BlockType:
    """A block's number of values and of bytes, and what makes values [n, num_values] of blocks [n, num_bytes]."""

    num_values: int
    num_bytes: int
    to_values: Callable[[torch.Tensor], torch.Tensor]

    def row_bytes(self, num_inputs: int) -> int:
        """Bytes of a row; ``num_inputs`` must be a multiple of ``num_values``."""
        return num_inputs // self.num_values * self.num_bytes


def dequantize_blocks(blocks: torch.Tensor, block_type: str) -> torch.Tensor:
    """[..., bytes per row] uint8 -> values [..., K] float32.

    Args:
        block_type: a name of BLOCK_TYPES.

    Raises:
        ValueError: the type is unknown, or a row does not consist of whole blocks.
    """
    layout = _layout(blocks, block_type)
    num_inputs = blocks.shape[-1] // layout.num_bytes * layout.num_values
    out = torch.empty(*blocks.shape[:-1], num_inputs, dtype=torch.float32, device=blocks.device)
    dequantize_into(out, blocks, block_type)
    return out


def dequantize_into(out: torch.Tensor, blocks: torch.Tensor, block_type: str) -> None:
    """Write values, [..., K], of blocks, [..., bytes per row], to a tensor of any floating dtype, a few rows at a time.

    Raises:
        ValueError: as ``dequantize_blocks``, or the shapes do not fit.
    """
    layout = _layout(blocks, block_type)
    num_inputs = blocks.shape[-1] // layout.num_bytes * layout.num_values
    if out.shape != (*blocks.shape[:-1], num_inputs):
        raise ValueError(
            f"blocks {list(blocks.shape)} of {block_type} have values {[*blocks.shape[:-1], num_inputs]}, "
            f"not {list(out.shape)}"
        )
    if blocks.dim() > 2:
        for part, of_part in zip(out, blocks, strict=True):
            dequantize_into(part, of_part, block_type)
        return
    rows, targets = (blocks, out) if blocks.dim() == 2 else (blocks[None], out[None])
    size = max(1, VALUES_AT_ONCE // max(1, num_inputs))
    for start in range(0, len(rows), size):
        piece = rows[start : start + size].reshape(-1, layout.num_bytes)
        target = targets[start : start + size]
        target.copy_(layout.to_values(piece).view(target.shape))


def _layout(blocks: torch.Tensor, block_type: str) -> BlockType:
    layout = BLOCK_TYPES.get(block_type)
    if layout is None:
        raise ValueError(f"unknown type of blocks {block_type!r}; have {', '.join(BLOCK_TYPES)}")
    if blocks.dtype != torch.uint8 or blocks.dim() == 0 or blocks.shape[-1] % layout.num_bytes:
        raise ValueError(
            f"rows of {block_type} are uint8 in whole blocks of {layout.num_bytes} bytes, not {blocks.dtype} "
            f"{list(blocks.shape)}"
        )
    return layout


@dataclass(frozen=True, slots=True, eq=False)
class PlainBlocks(PackedWeight):
    """blocks: [N, bytes per row] uint8. Products are in float32."""

    blocks: torch.Tensor
    block_type: str

    def __post_init__(self) -> None:
        _layout(self.blocks, self.block_type)

    def apply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        inputs = x.float()
        outputs = [
            F.linear(inputs, dequantize_blocks(piece, self.block_type)) for piece in self.blocks.split(ROWS_AT_ONCE)
        ]
        product = torch.cat(outputs, dim=-1)
        return (product if bias is None else product + bias.float()).to(out_dtype or x.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return dequantize_blocks(self.blocks[ids], self.block_type)

    @property
    def num_rows(self) -> int:
        return len(self.blocks)

    def tensors(self) -> Sequence[torch.Tensor]:
        return (self.blocks,)


# Parts of blocks


def _split(blocks: torch.Tensor, *sizes: int) -> tuple[torch.Tensor, ...]:
    return blocks.split(list(sizes), dim=1)


def _half(field: torch.Tensor) -> torch.Tensor:
    """[n, 2] uint8, a float16 -> [n, 1] float32."""
    return field.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _fields(field: torch.Tensor, run: int, bits: int) -> torch.Tensor:
    """[n, bytes] -> [n, bytes * 8 / bits]: of each run of bytes, first the lowest bits of all, then the next ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=field.device)
    parts = field.reshape(len(field), -1, 1, run) >> shifts[:, None]
    return (parts & ((1 << bits) - 1)).flatten(1)


def _by_scale(scales: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[n, groups], [n, groups * size] -> their products [n, groups * size]."""
    return (scales[..., None] * values.view(*scales.shape, -1)).flatten(1)


def _looked_up(table: Sequence[int], indices: torch.Tensor) -> torch.Tensor:
    values = torch.tensor(table, dtype=torch.float32, device=indices.device)
    return values[indices.int()]


# Blocks of 32


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    scale, values = _split(blocks, 2, 16)
    return _half(scale) * (_fields(values, 16, 4).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    scale, least, values = _split(blocks, 2, 2, 16)
    return _half(scale) * _fields(values, 16, 4).float() + _half(least)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    scale, high, low = _split(blocks, 2, 4, 16)
    values = _fields(low, 16, 4) | _fields(high, 1, 1) << 4
    return _half(scale) * (values.float() - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    scale, least, high, low = _split(blocks, 2, 2, 4, 16)
    values = _fields(low, 16, 4) | _fields(high, 1, 1) << 4
    return _half(scale) * values.float() + _half(least)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    scale, values = _split(blocks, 2, 32)
    return values.view(torch.int8).float() * _half(scale)


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    scale, values = _split(blocks, 2, 16)
    return _half(scale) * _looked_up(IQ4_VALUES, _fields(values, 16, 4))


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    exponent, values = _split(blocks, 1, 16)
    exponent = exponent.int()
    small = torch.full_like(exponent, 1 << 21) << exponent.clamp(max=1)  # 2 ** -128 and 2 ** -127 are subnormal
    scale = torch.where(exponent < 2, small, (exponent - 1) << 23).view(torch.float32)  # 2 ** (exponent - 128)
    return scale * _looked_up(MXFP4_VALUES, _fields(values, 16, 4))


# Blocks of 256


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, values, scale, least = _split(blocks, 16, 64, 2, 2)
    products = _by_scale(_half(scale) * (scales & 15).float(), _fields(values, 32, 2).float())
    return products - (_half(least) * (scales >> 4).float()).repeat_interleave(16, dim=1)


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    high, low, scales, scale = _split(blocks, 32, 64, 12, 2)
    steps = _fields(scales[:, :8], 8, 4) | _fields(scales[:, 8:], 4, 2) << 4
    values = _fields(low, 32, 2) | _fields(high, 32, 1) << 2
    return _by_scale(_half(scale) * (steps.float() - 32), values.float() - 4)


def _scales_and_least(field: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, 12] -> [n, 8] each, of 6 bits: the first four are whole, the other four are put together."""
    scales, least, low = _split(field, 4, 4, 4)
    return (
        torch.cat((scales & 63, low & 15 | scales >> 6 << 4), dim=1).float(),
        torch.cat((least & 63, low >> 4 | least >> 6 << 4), dim=1).float(),
    )


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, least, steps, values = _split(blocks, 2, 2, 12, 128)
    return _scaled_and_shifted(scale, least, steps, _fields(values, 32, 4))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, least, steps, high, low = _split(blocks, 2, 2, 12, 32, 128)
    return _scaled_and_shifted(scale, least, steps, _fields(low, 32, 4) | _fields(high, 32, 1) << 4)


def _scaled_and_shifted(
    scale: torch.Tensor, least: torch.Tensor, steps: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    scales, least_steps = _scales_and_least(steps)
    products = _by_scale(_half(scale) * scales, values.float())
    return products - (_half(least) * least_steps).repeat_interleave(32, dim=1)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low, high, scales, scale = _split(blocks, 128, 64, 16, 2)
    values = _fields(low, 64, 4) | _fields(high, 32, 2) << 4
    return _by_scale(_half(scale) * scales.view(torch.int8).float(), values.float() - 32)


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    scale, high, low, values = _split(blocks, 2, 2, 4, 128)
    steps = _fields(low, 1, 4) | _fields(high, 1, 2) << 4
    return _by_scale(_half(scale) * (steps.float() - 32), _looked_up(IQ4_VALUES, _fields(values, 16, 4)))


BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q8_0": BlockType(32, 34, _q8_0),
    "IQ4_NL": BlockType(32, 18, _iq4_nl),
    "MXFP4": BlockType(32, 17, _mxfp4),
    "Q2_K": BlockType(256, 84, _q2_k),
    "Q3_K": BlockType(256, 110, _q3_k),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
    "IQ4_XS": BlockType(256, 136, _iq4_xs),
}
