"""Which entry of a configuration it is that cannot be used, where the error does not say so itself."""

from collections.abc import Callable, Mapping
from typing import Any

MAX_KEYS = 200  # in files of more, nothing is looked for


def find_culprit(config: Mapping[str, Any], load: Callable[[dict[str, Any]], Any], error: Exception) -> str | None:
    """The key without which ``load(config)`` does not fail, or at least not with ``error``; None: no single one.

    Without ``model_type`` everything fails otherwise, so that is the answer only where there is no other.
    """
    if len(config) > MAX_KEYS or any(f"`{key}`" in str(error) for key in config):
        return None
    others = []
    for key in config:
        try:
            load({name: value for name, value in config.items() if name != key})
        except Exception as other:  # whatever it is: the question is only whether it is the same
            if (type(other), str(other)) != (type(error), str(error)):
                others.append(key)
        else:
            return key
    others = [key for key in others if key != "model_type"] or others
    return others[0] if len(others) == 1 else None


def shown(value: Any) -> str:
    """A value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
