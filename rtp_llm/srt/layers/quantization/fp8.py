"""Weights in float8_e4m3fn: checkpoints that say ``fp8`` or ``fbgemm_fp8``, and any checkpoint while it is loaded.

transformers' FineGrainedFP8Config (DeepSeek-V3, Qwen3-FP8) writes ``weight`` and ``weight_scale_inv``, of blocks with
``weight_block_size``; vLLM's earlier ``fp8`` (AutoFP8) ``weight_scale`` of each tensor, FBGEMM ``weight_scale`` of each
output. On load, each output's scale makes its largest weight 448, the largest number of the format.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.kernels.packed import PackedWeight
from rtp_llm.srt.layers.quantization.base import (
    ExpertsMethodBase,
    QuantizationConfig,
    QuantizationError,
    QuantizedModel,
    QuantizeMethodBase,
)
from rtp_llm.srt.layers.quantization.fp8_weights import Fp8Format, fp8_method, in_one_spelling, is_not_needed
from rtp_llm.srt.layers.quantization.grouped import name_in_checkpoint
from rtp_llm.srt.layers.quantization.on_load import OnLoadConfig, row_blocks
from rtp_llm.srt.layers.quantization.settings import LayerRules, choice, number, strings
from rtp_llm.srt.layers.weights import Weights

LARGEST = 448.0  # of float8_e4m3fn
NAMES_LEFT = ("modules_to_not_convert", "ignored_layers")  # keys of layers that are not quantized


class Fp8Config(QuantizationConfig):
    """``stored``: how weights are scaled; ``rules``: which layers are left as they are."""

    name = "fp8"

    def __init__(self, model: QuantizedModel, stored: Fp8Format, left: list[str]) -> None:
        self.stored = stored
        self.rules = LayerRules(model, left)

    @classmethod
    def from_model(cls, model: QuantizedModel) -> "Fp8Config | Fp8OnLoadConfig":  # type: ignore[override]
        settings = model.settings
        if not settings:
            return Fp8OnLoadConfig(model)
        choice(settings, "activation_scheme", ("dynamic", "static"), "dynamic")
        _check_one_of(settings, "fmt", ("e4m3", "e4m3fn", "float8_e4m3fn"))
        _check_one_of(settings, "expert_dtype", ("fp8",))
        if settings.get("modules_to_convert"):
            raise QuantizationError(
                "quantization_config: modules_to_convert, tables in 8 bits, is not supported, got "
                f"{settings['modules_to_convert']!r}"
            )
        stored = Fp8Format(block_size(settings, "weight_block_size"))
        return cls(model, stored, [name for key in NAMES_LEFT for name in strings(settings, key)])

    def get_name(self) -> str:
        return self.name

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | ExpertsMethodBase | None:
        method = fp8_method(layer, self.stored)
        return None if method is None or self.rules.leaves(name_in_checkpoint(layer, prefix)) else method

    def translate(self, weights: Weights, dtype: torch.dtype, device: torch.device | str) -> Weights:
        return in_one_spelling(weights)

    def may_leave(self, name: str, tensor: torch.Tensor) -> bool:
        return is_not_needed(name, tensor)


class FbgemmFp8Config(Fp8Config):
    name = "fbgemm_fp8"

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        return cls(model, Fp8Format(), strings(model.settings, NAMES_LEFT[0]))


class Fp8OnLoadConfig(OnLoadConfig):
    def get_name(self) -> str:
        return "fp8"

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        values, scales = quantize_fp8(weight)
        return built_for().pack_fp8(values, scales[:, None], weight.shape[1])


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> values of [N, K] float8_e4m3fn and scales [N] float32; a row with a NaN has the scale NaN."""
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows in row_blocks(weight):
        piece = weight[rows].float()
        scales[rows] = piece.abs().amax(dim=1) / LARGEST
        steps = torch.where(scales[rows] == 0, 1.0, scales[rows])[:, None]
        values[rows] = (piece / steps).nan_to_num(0.0).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return values, scales


def block_size(settings: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    """Return the value of ``key``, rows and columns of a block; None where there is none.

    Raises:
        QuantizationError: it is no pair of positive numbers.
    """
    value = settings.get(key)
    if not value:
        return None
    sizes = value.lower().split("x") if isinstance(value, str) else value
    pair = [number(size) for size in sizes] if isinstance(sizes, (list, tuple)) else []
    if len(pair) != 2 or not all(isinstance(size, int) and size > 0 for size in pair):
        raise QuantizationError(f"quantization_config: {key} must be two positive numbers, not {value!r}")
    return pair[0], pair[1]


def _check_one_of(settings: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> None:
    choice(settings, key, allowed, allowed[0])
