"""generation_config.json of a GGUF: the ids that end a text, and how its makers recommend to sample."""

import logging
from collections.abc import Mapping
from typing import Any

from rtp_llm.srt.gguf.file import GGUFFile
from rtp_llm.srt.gguf.header import GGUFError
from rtp_llm.srt.gguf.vocabulary import known_ends

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.ggml."
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, of a turn, of a message
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def generation_config(file: GGUFFile) -> dict[str, Any]:
    """Return the content of generation_config.json.

    Raises:
        GGUFError: a value is no token id, or no number.
    """
    try:
        return _ids(file.metadata, vocabulary_size(file)) | _sampling(file.metadata)
    except GGUFError as error:
        raise GGUFError(f"{file.paths[0]}: {error}") from None


def _ids(metadata: Mapping[str, Any], size: int) -> dict[str, Any]:
    ends = [token_id(metadata, TOKENIZER + key, size) for key in _ENDS]
    more = metadata.get(f"{TOKENIZER}eos_token_ids", [])
    if not isinstance(more, list):
        raise _wrong(f"{TOKENIZER}eos_token_ids", more, "a list of token ids")
    ends += [token_id({f"{TOKENIZER}eos_token_ids": item}, f"{TOKENIZER}eos_token_ids", size) for item in more]
    ends += [end for end in known_ends(metadata) if end < size]
    config: dict[str, Any] = {}
    if ids := list(dict.fromkeys(end for end in ends if end is not None)):
        config["eos_token_id"] = ids
    start = token_id(metadata, f"{TOKENIZER}bos_token_id", size)
    if start is not None:
        config["bos_token_id"] = start
    return config


def _sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for key, name in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value - value != 0:  # NaN, infinite
            raise _wrong(f"general.sampling.{key}", value, "a number")
        config[name] = value
    return config


def _wrong(key: str, value: object, expected: str) -> GGUFError:
    return GGUFError(f"`{key}` must be {expected}, not {value!r:.40}")


def vocabulary_size(file: GGUFFile) -> int:
    """Return the number of rows of the embedding: ids below it exist."""
    embedding = file.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding else 0


def token_id(metadata: Mapping[str, Any], key: str, size: int) -> int | None:
    """Return a token id; None if the key is missing or, with a warning, if there is no such token.

    Raises:
        GGUFError: it is no integer.
    """
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(key, value, "a token id")
    if 0 <= value < size:
        return value
    logger.warning("`%s` is left out: there is no token %d among %d", key, value, size)
    return None
