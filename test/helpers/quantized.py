"""Checkpoints of the usual formats, written from known integers by the letter of each format, for tests.

Everything here is slow and plain, and shares nothing with the package: words are put together number by number.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Integers:
    """A weight [N, K] is ``(values - zeros) * scales``, with the zero and the scale of each input's group."""

    values: np.ndarray  # [N, K] int64, 0 .. 2 ** bits - 1
    scales: torch.Tensor  # [N, groups] float32
    zeros: np.ndarray  # [N, groups] int64
    group_of: np.ndarray  # [K]
    bits: int

    def dequantized(self) -> torch.Tensor:
        values = torch.from_numpy(self.values - self.zeros[:, self.group_of]).float()
        return values * self.scales[:, self.group_of]


def integers_of(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool, shuffled: np.random.Generator | None = None
) -> Integers:
    """About ``weight``. ``group_size`` -1: all inputs; ``shuffled``: groups are of inputs drawn at random."""
    num_inputs = weight.shape[1]
    size = num_inputs if group_size == -1 else group_size
    group_of = np.arange(num_inputs) // size
    if shuffled is not None:
        group_of = shuffled.permutation(group_of)
    num_groups = group_of.max() + 1
    scales = torch.empty(len(weight), num_groups)
    zeros = np.empty((len(weight), num_groups), dtype=np.int64)
    top = 2**bits - 1
    for group in range(num_groups):
        columns = weight[:, group_of == group]
        low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
        if symmetric:
            scales[:, group] = columns.abs().amax(1) * 2 / top
            zeros[:, group] = 2 ** (bits - 1)
        else:
            scales[:, group] = (high - low) / top
            zeros[:, group] = (-low / scales[:, group]).round().numpy()
    scales = scales.half().float()
    exact = weight / scales[:, group_of] + torch.from_numpy(zeros[:, group_of])
    return Integers(exact.round().clamp(0, top).long().numpy(), scales, zeros, group_of, bits)


def words_along(values: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """int32: neighbours along ``axis`` in a word, the ``order[i]``-th of them in its ``i``-th lowest bits."""
    per_word = 32 // bits
    columns = np.moveaxis(values, axis, -1)
    missing = -columns.shape[-1] % per_word
    columns = np.pad(columns, [(0, 0)] * (columns.ndim - 1) + [(0, missing)])
    words = np.zeros((*columns.shape[:-1], columns.shape[-1] // per_word), dtype=np.uint32)
    for word in range(words.shape[-1]):
        for place in range(per_word):
            value = columns[..., word * per_word + (order[place] if order else place)].astype(np.uint32)
            words[..., word] |= value << np.uint32(bits * place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32))


def gptq(integers: Integers, is_v2: bool = False) -> Tensors:
    stored = integers.zeros if is_v2 else (integers.zeros - 1) % 2**integers.bits
    return {
        "qweight": words_along(integers.values.T, integers.bits, axis=0),
        "qzeros": words_along(stored.T, integers.bits, axis=1),
        "scales": integers.scales.t().half().contiguous(),
        "g_idx": torch.from_numpy(integers.group_of).int(),
    }


def awq(integers: Integers) -> Tensors:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words_along(integers.values.T, 4, axis=1, order=order),
        "qzeros": words_along(integers.zeros.T, 4, axis=1, order=order),
        "scales": integers.scales.t().half().contiguous(),
    }


def pack_quantized(integers: Integers, symmetric: bool, is_ordered: bool = False) -> Tensors:
    tensors = {
        "weight_packed": words_along(integers.values, integers.bits, axis=1),
        "weight_scale": integers.scales,
        "weight_shape": torch.tensor(integers.values.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words_along(integers.zeros, integers.bits, axis=0)
    if is_ordered:
        tensors["weight_g_idx"] = torch.from_numpy(integers.group_of).int()
    return tensors


def int_quantized(integers: Integers) -> Tensors:
    return {
        "weight": torch.from_numpy(integers.values - 128).to(torch.int8),
        "weight_scale": integers.scales,
    }


@dataclass(frozen=True)
class Format:
    """How a checkpoint is quantized, and what its config.json says of it."""

    name: str
    settings: Mapping[str, Any]
    write: Callable[[Integers], Tensors]
    bits: int = 4
    group_size: int = 16
    symmetric: bool = True
    shuffled: bool = False
    quantizes_rows: bool = False  # activations are of 8 bits, too
    edit: Callable[[Tensors], None] = field(default=lambda tensors: None)


def quantize(model_dir: str, directory: Path, stored: Format, is_quantized: Callable[[str], bool]) -> tuple[str, str]:
    """Two checkpoints made of a float one: quantized, and with the values that its integers stand for."""
    tensors = load_file(Path(model_dir, "model.safetensors"))
    rng = np.random.default_rng(7)
    plain: Tensors = {}
    packed: Tensors = {}
    for name, tensor in tensors.items():
        if not is_quantized(name):
            plain[name] = packed[name] = tensor
            continue
        shuffled = rng if stored.shuffled else None
        integers = integers_of(tensor, stored.bits, stored.group_size, stored.symmetric, shuffled)
        plain[name] = integers.dequantized()
        layer = name.removesuffix(".weight")
        packed |= {f"{layer}.{kind}": value.contiguous() for kind, value in stored.write(integers).items()}
    stored.edit(packed)
    plain_dir, packed_dir = (_twin(model_dir, directory / name) for name in ("plain", "packed"))
    save_file(plain, plain_dir / "model.safetensors", {"format": "pt"})
    save_file(packed, packed_dir / "model.safetensors", {"format": "pt"})
    config = json.loads((packed_dir / "config.json").read_text())
    config["quantization_config"] = dict(stored.settings)
    (packed_dir / "config.json").write_text(json.dumps(config))
    return str(plain_dir), str(packed_dir)


def _twin(model_dir: str, directory: Path) -> Path:
    shutil.copytree(model_dir, directory)
    (directory / "model.safetensors").unlink()
    return directory
