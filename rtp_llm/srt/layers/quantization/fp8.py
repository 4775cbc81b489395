"""Weights in float8_e4m3fn: checkpoints that say ``fp8`` or ``fbgemm_fp8``, and any checkpoint while it is loaded.

transformers' FineGrainedFP8Config (DeepSeek-V3, Qwen3-FP8) writes ``weight`` and ``weight_scale_inv``, of blocks with
``weight_block_size``; vLLM's earlier ``fp8`` (AutoFP8) ``weight_scale`` of each tensor, FBGEMM ``weight_scale`` of each
output. On load, each output's scale makes its largest weight 448, the largest number of the format.
"""

from typing import Self

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
from rtp_llm.srt.layers.quantization.grouped import name_in_checkpoint
from rtp_llm.srt.layers.quantization.on_load import OnLoadConfig, row_blocks
from rtp_llm.srt.layers.quantization.scaled_weights import (
    ScaleFormat,
    dequantized_rest,
    fp8_method,
    in_one_spelling,
    is_not_needed,
    last_parts,
)
from rtp_llm.srt.layers.quantization.settings import LayerRules, block_size, choice, strings
from rtp_llm.srt.layers.weights import Weights

LARGEST = 448.0  # of float8_e4m3fn
NAMES_LEFT = ("modules_to_not_convert", "ignored_layers")  # keys of layers that are not quantized


class Fp8Config(QuantizationConfig):
    """``stored``: how weights are scaled; ``rules``: which layers are left as they are."""

    name = "fp8"
    dequantizes_rest = True

    def __init__(self, model: QuantizedModel, stored: ScaleFormat, left: list[str]) -> None:
        self.model = model
        self.stored = stored
        self.rules = LayerRules(model, left)
        self.kept: set[str] = set()  # last parts of the names of layers that multiply fp8

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        settings = model.settings
        choice(settings, "activation_scheme", ("dynamic", "static"), "dynamic")
        choice(settings, "fmt", ("e4m3", "e4m3fn", "float8_e4m3fn"), "e4m3")
        choice(settings, "expert_dtype", ("fp8",), "fp8")
        if settings.get("modules_to_convert"):
            raise QuantizationError(
                "quantization_config: modules_to_convert, tables in 8 bits, is not supported, got "
                f"{settings['modules_to_convert']!r}"
            )
        stored = ScaleFormat(block_size(settings, "weight_block_size"), rounds_inputs=True)
        return cls(model, stored, [name for key in NAMES_LEFT for name in strings(settings, key)])

    def get_name(self) -> str:
        return self.name

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | ExpertsMethodBase | None:
        method = fp8_method(layer, self.stored)
        if method is None or self.rules.leaves(name_in_checkpoint(layer, prefix)):
            return None
        self.kept.update(last_parts(layer, self.model.sources(prefix)))
        return method

    def translate(self, weights: Weights, dtype: torch.dtype, device: torch.device | str) -> Weights:
        return dequantized_rest(in_one_spelling(weights), self.stored, self.kept, dtype)

    def may_leave(self, name: str, tensor: torch.Tensor) -> bool:
        return is_not_needed(name, tensor)


class FbgemmFp8Config(Fp8Config):
    name = "fbgemm_fp8"

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        return cls(model, ScaleFormat(rounds_inputs=True), strings(model.settings, NAMES_LEFT[0]))


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
