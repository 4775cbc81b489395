"""Helpers for building model trees."""

from collections.abc import Callable

from torch import nn


def add_prefix(name: str, prefix: str) -> str:
    """``add_prefix("q_proj", "model.layers.0") == "model.layers.0.q_proj"``; an empty prefix adds no dot."""
    return f"{prefix}.{name}" if prefix else name


def make_layers(num_layers: int, layer_fn: Callable[[int, str], nn.Module], prefix: str = "") -> nn.ModuleList:
    """``num_layers`` modules from ``layer_fn(idx=..., prefix=...)``, each told its index and its dotted name."""
    return nn.ModuleList(
        [layer_fn(idx=idx, prefix=add_prefix(str(idx), prefix)) for idx in range(num_layers)]  # type: ignore[call-arg]
    )
