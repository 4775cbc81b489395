"""Checkpoints of bitsandbytes, as transformers saves them: NF4 and FP4 (Dettmers et al., 2023), and LLM.int8 (2022).

4 bits: ``weight`` holds [N, K] row after row, two codes in a byte, the first in its upper half; ``quant_map`` [16] the
numbers of the codes, and ``absmax`` a scale for each ``blocksize`` codes, which with double quantization are bytes:
``nested_quant_map[byte] * nested_absmax + nested_offset``. ``quant_state.bitsandbytes__nf4`` is JSON with the rest.
8 bits: ``weight`` [N, K] int8 and ``SCB`` [N], 127 times the scales. Activations stay as they are.

A layer that the model does not quantize, such as a router, and experts are dequantized while they are loaded.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kernels.packed import PackedWeight
from rtp_llm.srt.layers.linear import LinearBase
from rtp_llm.srt.layers.quantization.base import QuantizationConfig, QuantizationError, QuantizedModel
from rtp_llm.srt.layers.quantization.methods import PackedLinearMethod
from rtp_llm.srt.layers.quantization.scaled_weights import (
    SCALE,
    WEIGHT,
    ScaledLinearMethod,
    ScaleFormat,
    TableLinearMethod,
)
from rtp_llm.srt.layers.quantization.settings import LayerRules, choice, flag, strings
from rtp_llm.srt.layers.weights import Weights

BLOCK = 64  # bitsandbytes' smallest usual block; scales are kept for each group of so many inputs, or fewer
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * number / 12 for sign in (1, -1) for number in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip
_PART = re.compile(
    r"(?P<weight>.*\.weight)\.(?P<kind>absmax|quant_map|nested_absmax|nested_quant_map|quant_state)"
    r"(\.bitsandbytes__(nf4|fp4))?"
)
_NESTED = ("nested_absmax", "nested_quant_map")
Parts = dict[str, torch.Tensor]


class BitsAndBytesConfig(QuantizationConfig):
    """``quant_type``: of 4 bits, one of TABLES; None: 8 bits."""

    dequantizes_rest = True

    def __init__(self, model: QuantizedModel, quant_type: str | None) -> None:
        self.model = model
        self.quant_type = quant_type
        self.rules = LayerRules(model, strings(model.settings, "llm_int8_skip_modules"))
        self.layers: set[str] = set()  # names in the checkpoint, renamed, of the layers that multiply packed weights

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        settings = model.settings
        four, eight = (
            flag(settings, key, flag(settings, f"_{key}", False)) for key in ("load_in_4bit", "load_in_8bit")
        )
        if four == eight:
            raise QuantizationError(
                "quantization_config of bitsandbytes must have either load_in_4bit or load_in_8bit, not "
                f"{'both' if four else 'neither'}"
            )
        return cls(model, choice(settings, "bnb_4bit_quant_type", tuple(TABLES), "fp4") if four else None)

    def get_name(self) -> str:
        return "bitsandbytes"

    def get_quant_method(self, layer: nn.Module, prefix: str) -> PackedLinearMethod | None:
        if not isinstance(layer, LinearBase) or self.rules.leaves(prefix):
            return None
        self.layers.update(self.model.sources(prefix))
        return Int8Method() if self.quant_type is None else FourBitMethod(TABLES[self.quant_type], BLOCK)

    def translate(
        self, weights: Weights, dtype: torch.dtype, device: torch.device | str
    ) -> Iterator[tuple[str, torch.Tensor]]:
        waiting: dict[str, Parts] = {}
        for name, tensor in weights:
            weight, kind = self._part(name, tensor)
            if kind is None:
                yield name, tensor
                continue
            parts = waiting.setdefault(weight, {})
            parts[kind] = tensor
            if self._is_whole(weight, parts):
                yield from self._joined(weight, waiting.pop(weight), dtype, device)
        for weight, parts in waiting.items():  # what lacks something: its own names say what
            yield from ((weight if kind == WEIGHT else f"{weight}.{kind}", tensor) for kind, tensor in parts.items())

    def _part(self, name: str, tensor: torch.Tensor) -> tuple[str, str | None]:
        """Return the weight that a tensor belongs to, and what it is of it; None: nothing of a quantized weight."""
        if self.quant_type is None:
            if name.endswith(".weight_format"):
                _check_format(name, tensor)
            if name.endswith(".SCB"):
                return f"{name.removesuffix('.SCB')}.weight", "SCB"
            return name, WEIGHT if name.endswith(".weight") and tensor.dtype == torch.int8 else None
        if part := _PART.fullmatch(name):
            return part["weight"], part["kind"]
        is_flat = name.endswith(".weight") and tensor.dim() == 2 and 1 in tensor.shape
        return name, WEIGHT if is_flat else None

    def _is_whole(self, weight: str, parts: Parts) -> bool:
        if self.quant_type is None:
            return parts.keys() >= {WEIGHT, "SCB"}
        if not parts.keys() >= {WEIGHT, "absmax", "quant_map", "quant_state"}:
            return False
        return "nested_offset" not in QuantState.of(weight, parts).settings or parts.keys() >= set(_NESTED)

    def _joined(
        self, weight: str, parts: Parts, dtype: torch.dtype, device: torch.device | str
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a layer's parameters; of a layer that is not quantized, the dequantized weight."""
        parts = {kind: part.to(device) for kind, part in parts.items()}
        if self.quant_type is None:
            codes, scales = parts[WEIGHT], parts["SCB"].float().reshape(-1, 1) / 127
        else:
            codes, scales = four_bits(weight, parts, self.quant_type)
        if self._is_packed(weight.removesuffix(".weight")):
            yield weight, codes
            yield f"{weight.removesuffix(WEIGHT)}{SCALE}", scales
        elif self.quant_type is None:
            yield weight, (codes.float() * scales).to(dtype)
        else:
            table = torch.tensor(TABLES[self.quant_type], device=codes.device, dtype=torch.float32)
            group_size = 2 * codes.shape[1] // scales.shape[1]
            yield weight, reference.dequantize_table(codes, table, scales, group_size).to(dtype)

    def _is_packed(self, name: str) -> bool:
        for pattern, replacement in self.model.rename:
            name = re.sub(pattern, replacement, name)
        return name in self.layers or f"model.{name}" in self.layers

    def may_leave(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether it says that a weight's rows follow one another."""
        return name.endswith(".weight_format")


class FourBitMethod(TableLinearMethod):
    """Rows that are no multiple of a block have groups in which no block ends."""

    def stored(self, input_size: int) -> ScaleFormat:
        return ScaleFormat((1, math.gcd(self.group_size, input_size)))


class Int8Method(ScaledLinearMethod):
    """Bytes with a sign, and a scale for each output."""

    weight_dtype = torch.int8

    def stored(self, input_size: int) -> ScaleFormat:
        return ScaleFormat()

    def pack_scaled(self, weight: torch.Tensor, scales: torch.Tensor, group_size: int) -> PackedWeight:
        return built_for().pack_uint8(weight.view(torch.uint8) ^ 128, scales, None, group_size)


@dataclass(frozen=True, slots=True)
class QuantState:
    """The JSON text beside a weight of 4 bits."""

    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, parts: Parts) -> Self:
        """Read the text, and check that the tensors have the sizes that it gives.

        Raises:
            ValueError: they do not, or it is no such text; the message names the weight.
        """
        try:
            settings = json.loads(parts["quant_state"].to(torch.uint8).cpu().numpy().tobytes())
            rows, columns = (int(size) for size in settings["shape"])
            state = cls(str(settings["quant_type"]), int(settings["blocksize"]), (rows, columns), settings)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{name}.quant_state is no description of a weight of 4 bits: {error!r}") from error
        num_bytes, num_scales = parts[WEIGHT].nbytes, parts["absmax"].numel()
        if rows < 1 or columns < 1 or 2 * num_bytes != rows * columns or columns % 2:
            raise ValueError(
                f"{name}: {num_bytes} bytes are not {[rows, columns]} codes of 4 bits, in an even number for each row"
            )
        if state.blocksize < 1 or state.blocksize % BLOCK or num_scales != -(-rows * columns // state.blocksize):
            raise ValueError(
                f"{name}: {num_scales} scales are not those of {[rows, columns]} in blocks of {state.blocksize}, which "
                f"must be a multiple of {BLOCK}"
            )
        return state


def four_bits(name: str, parts: Parts, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [N, K / 2] uint8, the first of two in the lower half, and scales [N, K / group] float32.

    A group is of ``gcd(BLOCK, K)`` inputs: if rows are no multiple of a block, blocks end in other places of each row.
    """
    state = QuantState.of(name, parts)
    table = parts["quant_map"].float().flatten()
    expected = torch.tensor(TABLES[quant_type], device=table.device, dtype=torch.float32)
    if (
        state.quant_type != quant_type
        or table.shape != expected.shape
        or not torch.allclose(table, expected, atol=1e-6)
    ):
        raise ValueError(f"{name}: it is of type {state.quant_type!r}, not {quant_type!r} as the configuration says")
    num_rows, num_inputs = state.shape
    packed = parts[WEIGHT].contiguous().view(torch.uint8).reshape(num_rows, num_inputs // 2)
    group = math.gcd(BLOCK, num_inputs)
    starts = torch.arange(0, num_rows * num_inputs, group, device=packed.device)
    scales = _scales(name, parts, state)[starts // state.blocksize]
    return packed << 4 | packed >> 4, scales.reshape(num_rows, -1)


def _scales(name: str, parts: Parts, state: QuantState) -> torch.Tensor:
    """Return the scale of each block, in float32."""
    absmax = parts["absmax"].flatten()
    if "nested_offset" not in state.settings:
        return absmax.float()
    size, outer = int(state.settings["nested_blocksize"]), parts["nested_absmax"].flatten().float()
    numbers = parts["nested_quant_map"].flatten().float()
    if size < 1 or absmax.dtype != torch.uint8 or len(numbers) != 256 or len(outer) != -(-len(absmax) // size):
        raise ValueError(f"{name}: {len(absmax)} scales in blocks of {size} do not fit {len(outer)} scales of theirs")
    return numbers[absmax.int()] * outer.repeat_interleave(size)[: len(absmax)] + float(state.settings["nested_offset"])


def _check_format(name: str, tensor: torch.Tensor) -> None:
    if int(tensor) != 0:
        raise ValueError(
            f"{name}: only weights whose rows follow one another (0) are supported, not layout {int(tensor)}"
        )
