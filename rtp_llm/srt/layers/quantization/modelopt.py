"""Checkpoints of NVIDIA's ModelOpt in fp8 and NVFP4.

``weight`` in float8_e4m3fn and ``weight_scale``: of the tensor (``FP8``), of each output
(``FP8_PER_CHANNEL_PER_TOKEN``) or of blocks of 128 x 128 (``FP8_PB_WO``). Settings are in config.json, or in
``hf_quant_config.json``. ``input_scale`` and the cache's ``k_scale`` and ``v_scale`` are not needed: see
``scaled_weights.py``; for ``NVFP4`` see ``fp4.py``.
"""

import re
from typing import Self

import torch
from torch import nn

from rtp_llm.srt.layers.quantization.base import (
    ExpertsMethodBase,
    QuantizationError,
    QuantizedModel,
    QuantizeMethodBase,
)
from rtp_llm.srt.layers.quantization.fp4 import FACTOR, Fp4Format, fp4_method, with_one_scale
from rtp_llm.srt.layers.quantization.fp8 import Fp8Config
from rtp_llm.srt.layers.quantization.scaled_weights import ScaleFormat
from rtp_llm.srt.layers.quantization.settings import REGEX, strings
from rtp_llm.srt.layers.weights import Weights

ALGORITHMS: dict[str, ScaleFormat | Fp4Format] = {
    "FP8": ScaleFormat(rounds_inputs=True),
    "FP8_PER_CHANNEL_PER_TOKEN": ScaleFormat(rounds_inputs=True),
    "FP8_PB_WO": ScaleFormat((128, 128)),
    "NVFP4": Fp4Format(16, FACTOR),
}


class ModelOptConfig(Fp8Config):
    name = "modelopt"

    def __init__(self, model: QuantizedModel, stored: ScaleFormat | Fp4Format, left: list[str]) -> None:
        super().__init__(model, stored if isinstance(stored, ScaleFormat) else ScaleFormat(), left)
        self.of_four = stored if isinstance(stored, Fp4Format) else None
        self.dequantizes_rest = self.of_four is None

    @classmethod
    def from_model(cls, model: QuantizedModel) -> Self:
        algorithm = str(model.settings.get("quant_algo") or "").upper()
        if algorithm not in ALGORITHMS:
            raise QuantizationError(
                f"quantization_config: quant_algo {model.settings.get('quant_algo')!r} of ModelOpt is not supported; "
                f"have {', '.join(ALGORITHMS)}"
            )
        left = [name for key in ("exclude_modules", "ignore") for name in strings(model.settings, key)]
        return cls(model, ALGORITHMS[algorithm], [name_or_expression(name) for name in left])

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | ExpertsMethodBase | None:
        method = super().get_quant_method(layer, prefix)
        return method if method is None or self.of_four is None else fp4_method(layer, self.of_four)

    def translate(self, weights: Weights, dtype: torch.dtype, device: torch.device | str) -> Weights:
        return (
            super().translate(weights, dtype, device) if self.of_four is None else with_one_scale(weights, self.of_four)
        )


def name_or_expression(name: str) -> str:
    """Return a name as it is, and one with ``*``, for any characters, as a regular expression."""
    if "*" not in name:
        return name
    return REGEX + ".*".join(re.escape(part) for part in name.split("*")) + r"(\..*)?$"
