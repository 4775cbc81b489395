"""What a model file demands of a configuration."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def require(config: "PretrainedConfig", name: str, supported: tuple[object, ...]) -> None:
    """Raise ValueError if the configuration has the field with a value that is not ``supported``."""
    value = getattr(config, name, supported[0])
    if value not in supported:
        raise ValueError(f"{name}={value!r} is not supported for {config.model_type}; have {list(supported)}")
