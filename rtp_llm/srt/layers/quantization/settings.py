"""Reading a checkpoint's ``quantization_config``: values that are checked, and which layers are left as they are."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rtp_llm.srt.layers.quantization.base import QuantizationError, QuantizedModel

REGEX = "re:"  # what names that are regular expressions begin with
_NAME = re.compile(r"[\w.-]*")  # what a layer's name is made of


def number(value: Any) -> Any:
    """An integer for what is written as one: 4, 4.0, "4", "4.0"; anything else as it is."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def choice(settings: Mapping[str, Any], key: str, allowed: Sequence[Any], default: Any = None) -> Any:
    """The value of ``key``, one of ``allowed``; ``default`` where there is none.

    Case does not matter, nor a hyphen for an underscore, nor how a number is written.
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
    """The value of ``key``: a positive number, or -1; ``default`` where there is none."""
    given = settings.get(key)
    value = default if given is None else number(given)
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise QuantizationError(f"quantization_config: {key} must be a positive number or -1, not {given!r}")
    return value


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
    """The names under ``key``: a list, however deep, or one name; none where there is nothing."""
    value = settings.get(key)
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, (str, list, tuple)) for one in value):
        raise QuantizationError(f"quantization_config: {key} must be a list of names, not {value!r}")
    return [name for one in value for name in strings({key: one}, key)]


class LayerRules:
    """Which layers a checkpoint keeps unquantized.

    Args:
        left: names, or parts of names between dots, or regular expressions, which match from the start.
        taken: ends of names; if there are any, all other layers are left.

    Raises:
        QuantizationError: what is no name is no regular expression either.
    """

    def __init__(self, model: QuantizedModel, left: Sequence[str], taken: Sequence[str] = ()) -> None:
        self._model = model
        self._left = [name if name.startswith(REGEX) else _renamed(name, model) for name in map(layer_name, left)]
        self._taken = [name.strip(".") for name in taken]

    def leaves(self, prefix: str) -> bool:
        """Whether the layer, with all that it fuses, stays unquantized.

        Raises:
            ValueError: a part of what it fuses does, and another does not.
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
    """``name`` as rules have it: without dots around and ``.weight``, or, if it is more than a name, after ``re:``.

    Raises:
        QuantizationError: it is no regular expression.
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
    """Whether ``source`` is called so: wholly, by neighbouring parts of it, or by a regular expression."""
    if name.startswith(REGEX):
        return re.match(name.removeprefix(REGEX), source) is not None
    return f".{name}." in f".{source}."


def _renamed(name: str, model: QuantizedModel) -> str:
    for pattern, replacement in model.rename:
        name = re.sub(pattern, replacement, name)
    return name
