"""Quantization schemes by name, each imported when it is first needed."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rtp_llm.srt.layers.quantization.base import QuantizationConfig, QuantizationError, QuantizedModel

ON_LOAD: dict[str, str] = {  # for any checkpoint that is not quantized
    "int8": "int8.Int8Config",
    "fp8": "fp8.Fp8OnLoadConfig",
    "int4": "int4.Int4Config",
}
STORED: dict[str, str] = {  # of checkpoints that say so
    "gptq": "gptq.GPTQConfig",
    "awq": "awq.AWQConfig",
    "compressed-tensors": "compressed_tensors.CompressedTensorsConfig",
    "modelopt": "modelopt.ModelOptConfig",
    "fp8": "fp8.Fp8Config",
    "fbgemm_fp8": "fp8.FbgemmFp8Config",
    "bitsandbytes": "bitsandbytes.BitsAndBytesConfig",
    "mxfp4": "mxfp4.Mxfp4Config",
    "gguf": "gguf.GGUFConfig",
}
SCHEMES = ON_LOAD | STORED


def scheme_name(asked: str | None, settings: Mapping[str, Any]) -> str | None:
    """Return the scheme for loading a model, from the user's choice and the checkpoint's ``quantization_config``.

    Raises:
        QuantizationError: the scheme is unknown, or the two do not fit together.
    """
    stored = settings.get("quant_method")
    if settings and not stored and asked in STORED:
        return asked
    if settings and not stored:
        raise QuantizationError(
            f"quantization_config names no quant_method, and its keys ({', '.join(map(str, settings))}) tell none; "
            f"have {', '.join(STORED)}"
        )
    if settings and stored not in STORED:
        raise QuantizationError(
            f"the checkpoint is quantized by {stored!r}, which is not supported; have {', '.join(STORED)}"
        )
    if asked is None or asked == stored:
        return stored
    if asked not in SCHEMES:
        raise QuantizationError(f"unknown quantization {asked!r}; have {', '.join(SCHEMES)}")
    if stored:
        raise QuantizationError(f"quantization {asked!r} was asked for, but the checkpoint is quantized by {stored!r}")
    if asked not in ON_LOAD:
        raise QuantizationError(
            f"quantization {asked!r} is of checkpoints that say so in `quantization_config`, and this one does not; "
            f"for any checkpoint there are {', '.join(ON_LOAD)}"
        )
    return asked


def quantization_config(name: str, model: QuantizedModel) -> QuantizationConfig:
    """Return the scheme ``name`` for a model: one of STORED for a quantized checkpoint, else one of ON_LOAD.

    Raises:
        QuantizationError: the scheme does not support something in the model's settings.
    """
    schemes = ON_LOAD if not model.settings and name in ON_LOAD else STORED
    module, _, config = schemes[name].partition(".")
    scheme: type[QuantizationConfig] = getattr(import_module(f"{__package__}.{module}"), config)
    return scheme.from_model(model)
