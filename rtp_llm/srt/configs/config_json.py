"""Convert older spellings of config.json to the one that transformers reads today."""

import logging
from collections.abc import Mapping
from typing import Any

from rtp_llm.srt.configs.architectures import LIKE_LLAMA
from rtp_llm.srt.configs.generation_config import usable_token_ids
from rtp_llm.srt.configs.older_encoders import as_of_today

logger = logging.getLogger(__name__)

DTYPE_ALIASES = {"float": "float32", "fp32": "float32", "bf16": "bfloat16", "half": "float16", "fp16": "float16"}

_DTYPE_KEYS = ("dtype", "torch_dtype")
_ID_KEYS = ("bos_token_id", "eos_token_id")


def modernized(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a config.json's content in today's spelling of dtypes, architectures and model types, without invalid ids.

    Ids left out are logged. ``where``: the file, for messages. Equal to ``config`` where nothing needs a change.

    Raises:
        OlderConfigError: an encoder asks for what is not computed.
    """
    result = _with_spellings(config, config.get("vocab_size"), where)
    names = result.get("architectures")
    if isinstance(names, str):
        result["architectures"] = [names] if names else []
    result = as_of_today(result)
    if result.get("model_type") in LIKE_LLAMA:
        result = _as_llama(result, where)
    return result


def _with_spellings(config: Mapping[str, Any], vocab_size: Any, where: str) -> dict[str, Any]:
    """Apply the spellings to a configuration and to those in it, under ``text_config`` and the like."""
    result = dict(config)
    for key in _DTYPE_KEYS:
        if isinstance(result.get(key), str):
            result[key] = _dtype(result[key])
            if result[key] is None:
                del result[key]
    size = config.get("vocab_size", vocab_size)
    size = size if isinstance(size, int) and size > 0 else None
    for key in _ID_KEYS:
        if result.get(key) is not None:
            result[key] = _ids(result[key], key, size, where)
    if "pad_token_id" in result and not _is_int(result["pad_token_id"]):
        result["pad_token_id"] = None  # not used in inference
    for key, value in result.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, Mapping):
            result[key] = _with_spellings(value, None, f"`{key}` of {where}")
    return result


def _dtype(spelling: str) -> str | None:
    """Return torch's name of a dtype such as ``torch.bfloat16`` or ``BF16``; None: the weights decide."""
    name = spelling.strip().removeprefix("torch.").lower()
    return None if name in ("", "auto", "none", "null") else DTYPE_ALIASES.get(name, name)


def _ids(value: Any, key: str, vocab_size: int | None, where: str) -> int | list[int] | None:
    usable = usable_token_ids(value, vocab_size, f"`{key}` in {where}")
    if key == "bos_token_id" and isinstance(usable, list):
        return usable[0] if usable else None
    return usable


def _is_int(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _as_llama(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    logger.info("%s: model type %s is read as llama, which computes the same", where, config["model_type"])
    result = {key: value for key, value in config.items() if key != "auto_map"} | {"model_type": "llama"}
    if config["model_type"] == "internlm":
        result.setdefault("attention_bias", config.get("bias", True))
        base = config["rotary"].get("base") if isinstance(config.get("rotary"), Mapping) else None
        if base is not None:
            result.setdefault("rope_theta", base)
    return result
