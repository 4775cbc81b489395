"""Checkpoints of NVIDIA's ModelOpt in fp8.

``weight`` in float8_e4m3fn and ``weight_scale``: of the tensor (``FP8``), of each output
(``FP8_PER_CHANNEL_PER_TOKEN``) or of blocks of 128 x 128 (``FP8_PB_WO``). Settings are in config.json, or in
``hf_quant_config.json``. ``input_scale`` and the cache's ``k_scale`` and ``v_scale`` are not needed: see
``fp8_weights.py``.
"""

import re
from typing import Self

from rtp_llm.srt.layers.quantization.base import QuantizationError, QuantizedModel
from rtp_llm.srt.layers.quantization.fp8 import Fp8Config
from rtp_llm.srt.layers.quantization.fp8_weights import Fp8Format
from rtp_llm.srt.layers.quantization.settings import REGEX, strings

ALGORITHMS: dict[str, Fp8Format] = {
    "FP8": Fp8Format(),
    "FP8_PER_CHANNEL_PER_TOKEN": Fp8Format(),
    "FP8_PB_WO": Fp8Format((128, 128)),
}


class ModelOptConfig(Fp8Config):
    name = "modelopt"

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


def name_or_expression(name: str) -> str:
    """Return a name as it is, and one with ``*``, for any characters, as a regular expression."""
    if "*" not in name:
        return name
    return REGEX + ".*".join(re.escape(part) for part in name.split("*")) + r"(\..*)?$"
