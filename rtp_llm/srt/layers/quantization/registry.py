"""Quantization schemes by name, each imported when it is first needed."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rtp_llm.srt.layers.quantization.base import QuantizationConfig, QuantizationError, QuantizedModel

ON_LOAD = ("int8", "int4")  # for any checkpoint that is not quantized
SCHEMES: dict[str, str] = {
    "int8": "int8.Int8Config",
    "int4": "int4.Int4Config",
    "gptq": "gptq.GPTQConfig",
    "awq": "awq.AWQConfig",
    "compressed-tensors": "compressed_tensors.CompressedTensorsConfig",
    "mxfp4": "mxfp4.Mxfp4Config",
    "gguf": "gguf.GGUFConfig",
}


def scheme_name(asked: str | None, settings: Mapping[str, Any]) -> str | None:
    """Return the scheme for loading a model, from the user's choice and the checkpoint's ``quantization_config``.

    Raises:
        QuantizationError: the scheme is unknown, or the two do not fit together.
    """
    stored = settings.get("quant_method")
    if settings and not stored and asked in SCHEMES and asked not in ON_LOAD:
        return asked
    if settings and not stored:
        raise QuantizationError(
            f"quantization_config names no quant_method, and its keys ({', '.join(map(str, settings))}) tell none; "
            f"have {', '.join(SCHEMES)}"
        )
    if settings and stored not in SCHEMES:
        raise QuantizationError(
            f"the checkpoint is quantized by {stored!r}, which is not supported; have {', '.join(SCHEMES)}"
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
    """Return the scheme ``name``, one of SCHEMES, for a model.

    Raises:
        QuantizationError: the scheme does not support something in the model's settings.
    """
    module, _, config = SCHEMES[name].partition(".")
    scheme: type[QuantizationConfig] = getattr(import_module(f"{__package__}.{module}"), config)
    return scheme.from_model(model)
