"""Checks of a request's JSON that need no knowledge of its fields, made before any field is read.

One walk over the parsed body: text can be encoded as UTF-8, numbers fit in 64 bits and are finite, and the body is
small enough to be validated in good time. Its cost is linear, and a wrong value ends it.
"""

import math
from collections.abc import Mapping
from typing import Any

from rtp_llm.srt.sampling_params import InvalidRequest

MIN_INT, MAX_INT = -(2**63), 2**64 - 1  # what messages to the core can carry
MAX_ITEMS = 4096  # of a list, unless all are integers (token ids)
MAX_NAMES = 4096  # of an object, unless they are token ids
MAX_BIASES = 16_384
MAX_CONTAINERS = 65_536  # lists and objects in a body
SHOWN_CHARS = 40  # of a name or a number, in messages


def check_json(body: Any) -> None:
    """Raise InvalidRequest, with the path and the top-level field, for a value that no field accepts."""
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), body)]
    num_containers = 0
    while pending:
        path, value = pending.pop()
        if isinstance(value, Mapping):
            num_containers += 1
            limit = MAX_BIASES if path and path[-1] == "logit_bias" else MAX_NAMES
            if len(value) > limit:
                raise InvalidRequest(
                    f"{_path(path)} is an object of {len(value)} members; at most {limit} are taken", _field(path)
                )
            _check_strings(path, value.keys(), "name")
            pending += [((*path, name), item) for name, item in value.items()]
        elif isinstance(value, list):
            num_containers += 1
            pending += [((*path, i), item) for i, item in enumerate(value)] if _needs_walk(path, value) else []
        else:
            _check_scalar(path, value)
        if num_containers > MAX_CONTAINERS:
            raise InvalidRequest(f"the body holds more than {MAX_CONTAINERS} lists and objects", _field(path))


def _needs_walk(path: tuple[str | int, ...], items: list[Any]) -> bool:
    """Check a list at once if it is of one type; return whether its items must be checked one by one."""
    kinds = set(map(type, items))
    if kinds <= {int}:
        for value in (min(items), max(items)) if items else ():
            _check_scalar(path, value)
        return False
    if len(items) > MAX_ITEMS:
        raise InvalidRequest(
            f"{_path(path)} is a list of {len(items)} items; at most {MAX_ITEMS} are taken in a request (of integers, "
            "any number): send several",
            _field(path),
        )
    return True


def _check_strings(path: tuple[str | int, ...], names: Any, what: str) -> None:
    if not _encodable("".join(names)):
        bad = next(name for name in names if not _encodable(name))
        place = f"in {_path(path)}" if path else "of a field"
        raise InvalidRequest(
            f"a {what} {place} is not valid Unicode: {ascii(bad)[:SHOWN_CHARS]} holds a lone surrogate", _field(path)
        )


def _check_scalar(path: tuple[str | int, ...], value: Any) -> None:
    if isinstance(value, str):
        if not _encodable(value):
            at = next(i for i, char in enumerate(value) if "\ud800" <= char <= "\udfff")
            raise InvalidRequest(
                f"{_path(path)} is not valid Unicode: character {at} is the lone surrogate {value[at]!a}", _field(path)
            )
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest(f"{_path(path)} must be a finite number: it is too large for 64 bits", _field(path))
    elif isinstance(value, int) and not MIN_INT <= value <= MAX_INT:
        shown = str(value)
        shown = shown if len(shown) <= SHOWN_CHARS else shown[:SHOWN_CHARS] + "..."
        raise InvalidRequest(f"{_path(path)} is {shown}, an integer that does not fit in 64 bits", _field(path))


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _path(path: tuple[str | int, ...]) -> str:
    """Return ``messages[2].content`` for ``("messages", 2, "content")``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:SHOWN_CHARS]}"
    return text.removeprefix(".") or "the body"


def _field(path: tuple[str | int, ...]) -> str | None:
    return path[0][:SHOWN_CHARS] if path and isinstance(path[0], str) else None
