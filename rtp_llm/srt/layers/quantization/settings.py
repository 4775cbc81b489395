"""Reading a checkpoint's ``quantization_config``: values that are checked, and which layers are left as they are."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rtp_llm.srt.layers.quantization.base import QuantizationError, QuantizedModel

REGEX = "re:"  # what names that are regular expressions begin with


def choice(settings: Mapping[str, Any], key: str, allowed: Sequence[Any], default: Any = None) -> Any:
    """The value of ``key``, one of ``allowed``; ``default`` where there is none."""
    value = settings.get(key, default)
    if value not in allowed:
        raise QuantizationError(f"quantization_config: {key} must be one of {list(allowed)}, not {value!r}")
    return value


def integer(settings: Mapping[str, Any], key: str) -> int:
    """The value of ``key``: a positive number, or -1."""
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise QuantizationError(f"quantization_config: {key} must be a positive number or -1, not {value!r}")
    return value


class LayerRules:
    """Which layers a checkpoint keeps unquantized.

    Args:
        left: names, or parts of names between dots, or regular expressions after ``re:``, which match from the start.
        taken: ends of names; if there are any, all other layers are left.
    """

    def __init__(self, model: QuantizedModel, left: Sequence[str], taken: Sequence[str] = ()) -> None:
        self._model = model
        self._left = [name if name.startswith(REGEX) else _renamed(name, model) for name in left]
        self._taken = list(taken)

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


def matches(name: str, source: str) -> bool:
    """Whether ``source`` is called so: wholly, by neighbouring parts of it, or by a regular expression."""
    if name.startswith(REGEX):
        return re.match(name.removeprefix(REGEX), source) is not None
    return f".{name}." in f".{source}."


def _renamed(name: str, model: QuantizedModel) -> str:
    for pattern, replacement in model.rename:
        name = re.sub(pattern, replacement, name)
    return name
