"""A checkpoint's sampling defaults and token ids, in generation_config.json: their valid part.

Clients have not seen this file, so a value that would be invalid in a request is logged once, with file and key, and
left out. ``SamplingParams`` decides what is valid.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams

logger = logging.getLogger(__name__)

GENERATION_CONFIG_FILE = "generation_config.json"
_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_LARGEST = 2**63 - 1  # integers travel between processes in 64 bits


def read_generation_config(directory: str) -> dict[str, Any]:
    """Read generation_config.json; return {} if there is no such file or, with a warning, if it is broken."""
    path = Path(directory) / GENERATION_CONFIG_FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s cannot be read and is left out: %s", path, error)
        return {}
    if not isinstance(value, dict):
        logger.warning("%s holds no JSON object but %s, and is left out", path, _show(value))
        return {}
    return value


def generation_defaults(generation: Mapping[str, Any], directory: str) -> dict[str, float | int]:
    """Return sampling parameters of generation_config.json. ``do_sample: false`` means greedy, despite other keys."""
    where = f"{directory}/{GENERATION_CONFIG_FILE}"
    defaults: dict[str, float | int] = {}
    for key in _SAMPLING_KEYS:
        value = generation.get(key)
        if value is None:
            continue
        try:
            defaults[key] = _usable(key, value)
        except InvalidRequest as error:
            logger.warning("`%s` in %s is left out: %s", key, where, error)
    greedy = generation.get("do_sample")
    if greedy is False:
        defaults["temperature"] = 0.0
    elif greedy not in (True, None):
        logger.warning("`do_sample` in %s is left out: it must be true or false, not %s", where, _show(greedy))
    return defaults


def _usable(key: str, value: Any) -> float | int:
    """Return ``value`` in the form of requests; 50.0 is 50. Raise InvalidRequest if it is invalid in a request."""
    if isinstance(value, float) and value.is_integer() and isinstance(getattr(SamplingParams(), key), int):
        value = int(value)
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise InvalidRequest(f"{key} must be a number of at most 64 bits, not {_show(value)}", key)
    return getattr(SamplingParams(**{key: value}), key)


def usable_token_ids(value: Any, vocab_size: int | None, where: str) -> int | list[int] | None:
    """Return a token id or a list of them without ids outside the vocabulary, which are logged.

    Args:
        vocab_size: None: unknown; any id from 0 on is valid.
        where: the key and the file, for the warning.
    """
    if value is None:
        return None
    given = value if isinstance(value, (list, tuple)) else [value]
    ids = [_token_id(item, vocab_size) for item in given]
    wrong = [item for item, token_id in zip(given, ids, strict=True) if token_id is None and item is not None]
    if wrong:
        size = "" if vocab_size is None else f" below the vocabulary's size, {vocab_size}"
        values = ", ".join(map(_show, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        logger.warning("%s: left out, for a token id is an integer from 0 on%s: %s", where, size, values)
    usable = [token_id for token_id in ids if token_id is not None]
    if isinstance(value, (list, tuple)):
        return usable
    return usable[0] if usable else None


def _token_id(value: Any, vocab_size: int | None) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value < (vocab_size or _LARGEST) else None


def _show(value: Any) -> str:
    """Return a short form for messages. Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and abs(value) > _LARGEST:
        return "an integer of more than 64 bits"
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else text[:40] + "..."
