"""One spelling for ``quantization_config``, which programs have written in several ways over the years.

AutoAWQ called ``bits`` ``w_bit`` and kept its settings in ``quant_config.json``; AutoGPTQ kept them in
``quantize_config.json`` and named no ``quant_method``; compressed-tensors was ``sparseml`` first, and transformers once
put its settings one level deeper, as ModelOpt does in ``hf_quant_config.json``. Each scheme interprets the values
(``settings.py`` reads them).
"""

import logging
from collections.abc import Mapping
from typing import Any

from rtp_llm.srt.layers.quantization.base import QuantizationError
from rtp_llm.srt.layers.quantization.settings import number

logger = logging.getLogger(__name__)

COMPRESSED = "compressed-tensors"
_SYNONYMS = {
    "w_bit": "bits",
    "wbits": "bits",
    "q_group_size": "group_size",
    "groupsize": "group_size",
    "method": "quant_method",
}
_METHODS = {
    "compressed_tensors": COMPRESSED,
    "compressedtensors": COMPRESSED,
    "sparseml": COMPRESSED,
    "modelopt_fp8": "modelopt",
    "modelopt_fp4": "modelopt",
}
_KEYS_OF_METHODS = {
    "modelopt": {"quant_algo"},
    COMPRESSED: {"config_groups", "sparsity_config"},
    "awq": {"w_bit", "q_group_size", "zero_point"},
    "gptq": {"desc_act", "sym", "damp_percent", "true_sequential", "static_groups", "checkpoint_format"},
    "bitsandbytes": {"load_in_4bit", "load_in_8bit"},
    "fp8": {"weight_block_size", "activation_scheme"},
}


def canonical(settings: Mapping[str, Any], default_method: str | None = None) -> dict[str, Any]:
    """Return ``settings`` with the keys and the ``quant_method`` that schemes know; empty if nothing is quantized.

    Args:
        default_method: used where the settings name no method and their keys do not imply one.

    Raises:
        QuantizationError: two spellings of a key contradict each other.
    """
    if not isinstance(settings, Mapping):
        raise QuantizationError(f"quantization_config must be an object, not {settings!r}")
    result = _flat(settings)
    inferred = next((method for method, keys in _KEYS_OF_METHODS.items() if keys & result.keys()), default_method)
    for key, name in _SYNONYMS.items():
        if key in result:
            _rename(result, key, name)
    method = result.get("quant_method")
    if isinstance(method, str) and method:
        method = method.lower()
        result["quant_method"] = _METHODS.get(method, method)
    elif result and inferred:
        logger.info("the checkpoint's quantization settings name no quant_method; taken to be %s", inferred)
        result["quant_method"] = inferred
    return {} if _is_dense(result) else result


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(settings)
    for key in ("quantization_config", "quantization"):  # of transformers once, of ModelOpt
        inner = result.pop(key, None)
        result |= inner if isinstance(inner, Mapping) else {}
    return result


def _rename(settings: dict[str, Any], key: str, name: str) -> None:
    value = settings.pop(key)
    if settings.get(name) is None:
        settings[name] = value
    elif value is not None and number(value) != number(settings[name]):
        raise QuantizationError(
            f"quantization_config: {key} is {value!r}, but {name}, which means the same, is {settings[name]!r}"
        )


def _is_dense(settings: Mapping[str, Any]) -> bool:
    """Whether a compressed-tensors checkpoint is only sparse, with its zeros stored like any number."""
    if settings.get("quant_method") != COMPRESSED or settings.get("config_groups"):
        return False
    return bool(settings.get("sparsity_config")) and is_stored_dense(settings["sparsity_config"])


def is_stored_dense(sparsity: Any) -> bool:
    """Whether a ``sparsity_config`` means dense storage, however many weights are zero."""
    return isinstance(sparsity, Mapping) and str(sparsity.get("format") or "dense").lower() == "dense"
