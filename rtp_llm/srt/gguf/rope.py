"""How a GGUF stretches rotary positions: by keys, or by a tensor of factors of the frequencies."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from rtp_llm.srt.gguf.file import GGUFFile
from rtp_llm.srt.gguf.header import GGUFError

FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

# What Llama 3.1 to 3.3 have; the converter keeps only the factors that follow from it.
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_LENGTH = 8192
_YARN = {
    "yarn_attn_factor": "attention_factor",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    """Return ``rope_scaling`` of config.json; None: frequencies are as they are.

    Raises:
        GGUFError: a kind that is unknown, or a value that is missing or no number.
    """
    prefix = f"{file.architecture}.rope.scaling."
    kind = file.metadata.get(f"{prefix}type", "none")
    if LONG_FACTORS in file.tensors:
        return _longrope(file, prefix)
    if FACTORS in file.tensors:
        return _by_factors(file)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _number(file, f"{prefix}factor")}
    if kind == "yarn":
        return _yarn(file, prefix)
    raise GGUFError(f"`{prefix}type` is {kind!r:.40}, which is not supported; have none, linear, yarn, longrope")


def _yarn(file: GGUFFile, prefix: str) -> dict[str, Any]:
    if file.metadata.get(f"{prefix}yarn_ext_factor", 1.0) != 1.0:
        raise GGUFError(f"`{prefix}yarn_ext_factor` is {file.metadata[f'{prefix}yarn_ext_factor']}, supported is 1")
    scaling = {
        "rope_type": "yarn",
        "factor": _number(file, f"{prefix}factor"),
        "original_max_position_embeddings": int(_number(file, f"{prefix}original_context_length")),
    }
    for key, name in _YARN.items():
        if prefix + key in file.metadata:
            scaling.setdefault(name, _number(file, prefix + key))
    return scaling


def _longrope(file: GGUFFile, prefix: str) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": _factors(file, LONG_FACTORS),
        "short_factor": _factors(file, SHORT_FACTORS),
        "original_max_position_embeddings": int(_number(file, f"{prefix}original_context_length")),
    }
    if f"{prefix}attn_factor" in file.metadata:
        scaling["attention_factor"] = _number(file, f"{prefix}attn_factor")
    return scaling


def _by_factors(file: GGUFFile) -> dict[str, Any]:
    """Return Llama 3's scaling if its factors are the tensor's, else the factors themselves."""
    factors = _factors(file, FACTORS)
    base = _number(file, f"{file.architecture}.rope.freq_base")
    largest = max(factors)
    expected = llama3_factors(base, len(factors), largest)
    if all(math.isclose(one, other, rel_tol=1e-5) for one, other in zip(factors, expected, strict=True)):
        return _LLAMA3 | {"factor": largest, "original_max_position_embeddings": _LLAMA3_LENGTH}
    length = int(_number(file, f"{file.architecture}.context_length"))
    same = {"long_factor": factors, "short_factor": factors, "attention_factor": 1.0}
    return {"rope_type": "longrope", "original_max_position_embeddings": length} | same


def llama3_factors(base: float, num_pairs: int, factor: float) -> list[float]:
    """Return by which Llama 3's scaling divides each frequency of heads of ``2 * num_pairs`` components."""
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    factors = []
    for pair in range(num_pairs):
        turns = _LLAMA3_LENGTH / (2 * math.pi * base ** (pair / num_pairs))  # within the original length
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)  # type: ignore[operator]
        factors.append(1 / ((1 - keep) / factor + keep))
    return factors


def _factors(file: GGUFFile, name: str) -> list[float]:
    tensor = file.tensors.get(name)
    if tensor is None or tensor.type != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        raise GGUFError(f"tensor {name!r} is missing, or no row of F32")
    factors: list[float] = np.frombuffer(tensor.content, "<f4", tensor.shape[0], tensor.first).tolist()
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise GGUFError(f"tensor {name!r} has factors that are not positive numbers")
    return factors


def _number(file: GGUFFile, key: str) -> float:
    return number_of(file.metadata, key)


def number_of(metadata: Mapping[str, Any], key: str) -> float:
    """Return a positive number of the metadata.

    Raises:
        GGUFError: it is missing, or no such number.
    """
    value = metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value < math.inf):
        raise GGUFError(f"`{key}` must be a positive number, not {value!r:.40}")
    return value
