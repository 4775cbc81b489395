"""Checkpoints with weights in float8_e4m3fn, written by the letter of each format, for tests.

Slow and plain, block by block; it shares nothing with the package.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Write = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""A weight -> its tensors, by the last part of their names, and what they stand for in float32."""


@dataclass(frozen=True)
class Format:
    """How a checkpoint is quantized, and what it says of it: in config.json, or in ``file``."""

    name: str
    settings: Mapping[str, Any]
    write: Write
    file: str = ""
    edit: Callable[[Tensors], None] = field(default=lambda tensors: None)


def in_blocks(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers in float8_e4m3fn, a scale of each block, and numbers times scales."""
    starts = range(0, weight.shape[0], rows), range(0, weight.shape[1], columns)
    values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales, meant = torch.empty(len(starts[0]), len(starts[1])), torch.empty_like(weight)
    for i, row in enumerate(starts[0]):
        for j, column in enumerate(starts[1]):
            block = slice(row, row + rows), slice(column, column + columns)
            scales[i, j] = weight[block].abs().max() / 448
            values[block] = (weight[block] / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
            meant[block] = values[block].float() * scales[i, j]
    return values, scales, meant


def blocks(
    rows: int, columns: int, scale: str = "weight_scale_inv", form: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> Write:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        values, scales, meant = in_blocks(weight, rows, columns)
        return {"weight": values, scale: form(scales)}, meant

    return write


def powers_of_two(rows: int, columns: int, scale: str = "weight_scale_inv") -> Write:
    """Scales as bytes: exponents plus 127."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        values, _, _ = in_blocks(weight, rows, columns)
        exponents = torch.arange(-(-weight.shape[0] // rows) * -(-weight.shape[1] // columns)) % 5 - 9
        exponents = exponents.reshape(-(-weight.shape[0] // rows), -1)
        every = (2.0**exponents).repeat_interleave(rows, 0)[: weight.shape[0]].repeat_interleave(columns, 1)
        stored = {"weight": values, scale: (exponents + 127).to(torch.uint8)}
        return stored, values.float() * every[:, : weight.shape[1]]

    return write


def whole(scale: str, shape: tuple[int, ...], **others: float) -> Write:
    """One scale; ``others``: further scalars, such as scales of activations."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        values, scales, meant = in_blocks(weight, *weight.shape)
        scalars = {name: torch.tensor(value) for name, value in others.items()}
        return {"weight": values, scale: scales.reshape(shape)} | scalars, meant

    return write


def outputs(scale: str, shape: tuple[int, ...]) -> Write:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        values, scales, meant = in_blocks(weight, 1, weight.shape[1])
        return {"weight": values, scale: scales.reshape(shape)}, meant

    return write


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def four_bits(group: int, weight_name: str, whole: str = "", divides: bool = False) -> Write:
    """Numbers of FP4, two in a byte. ``whole``: name of the tensor's own scale; without one, scales are exponents."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        largest = weight.reshape(len(weight), -1, group).abs().amax(dim=2)
        factor = torch.tensor(float(largest.max()) / 448 / 6)
        if whole:
            stored = (largest / 6 / factor).to(torch.float8_e4m3fn)
            # An implementation divides by a divisor, or multiplies by a factor: not the same in the last bit.
            scales = stored.float() / (1 / factor) if divides else stored.float() * factor
        else:
            stored = (largest / 6).log2().ceil().add(127).to(torch.uint8)
            scales = 2.0 ** (stored.float() - 127)
        by_column = scales.repeat_interleave(group, dim=1)
        codes = (weight[..., None] / by_column[..., None] - torch.tensor(FP4)).abs().argmin(dim=-1)
        tensors = {weight_name: (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8), "weight_scale": stored}
        if whole:
            tensors |= {whole: (1 / factor if divides else factor).reshape(1), "input_global_scale": torch.ones(1)}
        return tensors, torch.tensor(FP4)[codes] * by_column

    return write


def store(model_dir: str, directory: Path, stored: Format, is_quantized: Callable[[str], bool]) -> tuple[str, str]:
    """Two checkpoints made of a float one: with the values that are meant, and quantized."""
    tensors = load_file(Path(model_dir, "model.safetensors"))
    plain: Tensors = {}
    packed: Tensors = {}
    for name, tensor in tensors.items():
        if not is_quantized(name):
            plain[name] = packed[name] = tensor
            continue
        parts, plain[name] = stored.write(tensor)
        layer = name.removesuffix(".weight")
        packed |= {f"{layer}.{kind}": part.contiguous() for kind, part in parts.items()}
    stored.edit(packed)
    folders = [directory / f"{stored.name}-plain", directory / stored.name]
    for folder, content in zip(folders, (plain, packed), strict=True):
        shutil.copytree(model_dir, folder)
        save_file(content, folder / "model.safetensors", {"format": "pt"})
    if stored.file:
        (folders[1] / stored.file).write_text(json.dumps(stored.settings))
    else:
        config = json.loads((folders[1] / "config.json").read_text()) | {"quantization_config": dict(stored.settings)}
        (folders[1] / "config.json").write_text(json.dumps(config))
    return str(folders[0]), str(folders[1])
