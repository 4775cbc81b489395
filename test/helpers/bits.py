"""Weights as bitsandbytes stores them in checkpoints, written by the letter of the format, for tests."""

import json
from collections.abc import Mapping

import torch
from floats import Tensors, Write

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(sign * size / 12 for sign in (1, -1) for size in (0, 0.0625, 8, 12, 4, 6, 2, 3))


def four_bits(
    quant_type: str,
    blocksize: int = 64,
    nested: bool = False,
    storage: torch.dtype = torch.uint8,
    edit: Mapping[str, object] | None = None,
) -> Write:
    """``nested``: scales are bytes with scales of their own. ``edit``: entries of the JSON text that differ."""
    numbers = torch.tensor(NF4 if quant_type == "nf4" else FP4)

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        flat = weight.flatten()
        absmax = torch.stack([block.abs().max() for block in flat.split(blocksize)])
        tensors: Tensors = {"weight.quant_map": numbers.clone()}
        text: dict[str, object] = {"quant_type": quant_type, "blocksize": blocksize, "shape": list(weight.shape)}
        if nested:
            offset, levels = 0.75, torch.linspace(-1, 1, 256)
            outer = torch.stack([block.abs().max() for block in (absmax - offset).split(8)])
            nearest = [(levels * outer[i // 8] + offset - scale).abs().argmin() for i, scale in enumerate(absmax)]
            tensors |= {
                "weight.absmax": torch.stack(nearest).to(torch.uint8),
                "weight.nested_absmax": outer,
                "weight.nested_quant_map": levels.clone(),
            }
            absmax = torch.stack([levels[at] * outer[i // 8] for i, at in enumerate(nearest)]) + offset
            text |= {"nested_blocksize": 8, "nested_dtype": "float32", "nested_offset": offset}
        else:
            tensors["weight.absmax"] = absmax
        scales = absmax[torch.arange(flat.numel()) // blocksize]
        codes = (flat[:, None] / scales[:, None] - numbers).abs().argmin(dim=1)
        packed = (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)
        tensors["weight"] = packed.view(storage)[:, None]
        content = json.dumps(text | dict(edit or {})).encode()
        tensors[f"weight.quant_state.bitsandbytes__{quant_type}"] = torch.tensor(list(content), dtype=torch.uint8)
        return tensors, (numbers[codes] * scales).reshape(weight.shape)

    return write


def eight_bits(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    largest = weight.abs().amax(dim=1)
    values = (weight * 127 / largest[:, None]).round().to(torch.int8)
    stored = {"weight": values, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, values.float() * (largest / 127)[:, None]
