"""Read a checkpoint's ``quantization_config``: checked values, and rules about layers that stay unquantized."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rtp_llm.srt.layers.quantization.base import QuantizationError, QuantizedModel

REGEX = "re:"  # prefix of names that are regular expressions
_NAME = re.compile(r"[\w.-]*")  # a layer's name


def number(value: Any) -> Any:
    """Return an integer for 4, 4.0, "4" or "4.0"; any other value unchanged."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def choice(settings: Mapping[str, Any], key: str, allowed: Sequence[Any], default: Any = None) -> Any:
    """Return the value of ``key``, one of ``allowed``; ``default`` where there is none.

    Case, hyphen or underscore, and the spelling of numbers do not matter.
    """
    value = settings.get(key)
    value = default if value is None or value == "" else value
    spellings = {_spelling(one): one for one in allowed}
    if _spelling(value) not in spellings:
        raise QuantizationError(f"quantization_config: {key} must be one of {list(allowed)}, not {value!r}")
    return spellings[_spelling(value)]


def _spelling(value: Any) -> str:
    return str(number(value)).strip().lower().replace("_", "-")


def integer(settings: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return the value of ``key``: a positive number, or -1; ``default`` where there is none."""
    given = settings.get(key)
    value = default if given is None else number(given)
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise QuantizationError(f"quantization_config: {key} must be a positive number or -1, not {given!r}")
    return value


def block_size(settings: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    """Return the value of ``key``, rows and columns of a block; None where there is none.

    Raises:
        QuantizationError: it is no pair of positive numbers.
    """
    value = settings.get(key)
    if not value:
        return None
    sizes = value.lower().split("x") if isinstance(value, str) else value
    pair = [number(size) for size in sizes] if isinstance(sizes, (list, tuple)) else []
    if len(pair) != 2 or not all(isinstance(size, int) and size > 0 for size in pair):
        raise QuantizationError(f"quantization_config: {key} must be two positive numbers, not {value!r}")
    return pair[0], pair[1]


def flag(settings: Mapping[str, Any], key: str, default: bool) -> bool:
    """Whether ``key`` holds: true, 1, "true" and their opposites; ``default`` where there is none."""
    value = settings.get(key)
    if value is None:
        return default
    words = {"true": True, "1": True, "false": False, "0": False}
    word = _spelling(value)
    if word not in words:
        raise QuantizationError(f"quantization_config: {key} must be true or false, not {value!r}")
    return words[word]


def strings(settings: Mapping[str, Any], key: str) -> list[str]:
    """Return the names under ``key``: one name, or a list that may be nested; empty if there is no value."""
    value = settings.get(key)
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, (str, list, tuple)) for one in value):
        raise QuantizationError(f"quantization_config: {key} must be a list of names, not {value!r}")
    return [name for one in value for name in strings({key: one}, key)]


class LayerRules:
    """Rules about which layers a checkpoint leaves unquantized.

    Args:
        left: names, or parts of names between dots, or regular expressions, which match from the start.
        taken: ends of names; if there are any, all other layers are left unquantized.

    Raises:
        QuantizationError: an entry is neither a name nor a regular expression.
    """

    def __init__(self, model: QuantizedModel, left: Sequence[str], taken: Sequence[str] = ()) -> None:
        self._model = model
        self._left = [name if name.startswith(REGEX) else _renamed(name, model) for name in map(layer_name, left)]
        self._taken = [name.strip(".") for name in taken]

    def leaves(self, prefix: str) -> bool:
        """Whether the layer, with all layers that it fuses, stays unquantized.

        Raises:
            ValueError: some of the layers that it fuses do, and others do not.
        """
        sources = self._model.sources(prefix)
        left = [source for source in sources if self._leaves_source(source)]
        if left and len(left) < len(sources):
            raise ValueError(
                f"{prefix}: the checkpoint quantizes some of {', '.join(sources)} only (not {', '.join(left)}), which "
                "are computed as one"
            )
        return bool(left)

    def _leaves_source(self, source: str) -> bool:
        if self._taken and not any(f".{source}".endswith(f".{name}") for name in self._taken):
            return True
        return any(matches(name, source) for name in self._left)


def layer_name(name: str) -> str:
    """Return ``name`` without outer dots and ``.weight``; if it is not a plain name, as an expression after ``re:``.

    Raises:
        QuantizationError: it is not a regular expression.
    """
    if not name.startswith(REGEX) and _NAME.fullmatch(name):
        return name.strip(".").removesuffix(".weight")
    pattern = name.removeprefix(REGEX)
    try:
        re.compile(pattern)
    except re.error as error:
        raise QuantizationError(f"quantization_config: {name!r} is no regular expression: {error}") from error
    return REGEX + pattern


def matches(name: str, source: str) -> bool:
    """Whether ``name`` names ``source``: all of it, consecutive parts of it, or by a regular expression."""
    if name.startswith(REGEX):
        return re.match(name.removeprefix(REGEX), source) is not None
    return f".{name}." in f".{source}."


def _renamed(name: str, model: QuantizedModel) -> str:
    for pattern, replacement in model.rename:
        name = re.sub(pattern, replacement, name)
    return name
