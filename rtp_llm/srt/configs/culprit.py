"""Search for the entry of a configuration that causes an error."""

from collections.abc import Callable, Mapping
from typing import Any

MAX_KEYS = 200  # larger files are not searched


def find_culprit(config: Mapping[str, Any], load: Callable[[dict[str, Any]], Any], error: Exception) -> str | None:
    """Return the key without which ``load(config)`` does not fail with ``error``; None: no single one.

    Without ``model_type`` the error always differs, so that key is returned only if no other fits.
    """
    if len(config) > MAX_KEYS or any(f"`{key}`" in str(error) for key in config):
        return None
    others = []
    for key in config:
        try:
            load({name: value for name, value in config.items() if name != key})
        except Exception as other:  # of any kind, only compared
            if (type(other), str(other)) != (type(error), str(error)):
                others.append(key)
        else:
            return key
    others = [key for key in others if key != "model_type"] or others
    return others[0] if len(others) == 1 else None


def shown(value: Any) -> str:
    """Return a value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
