"""Helpers for building model trees."""

from collections.abc import Callable

from torch import nn


def add_prefix(name: str, prefix: str) -> str:
    """Join names: ``add_prefix("q_proj", "layers.0") == "layers.0.q_proj"``; an empty prefix adds no dot."""
    return f"{prefix}.{name}" if prefix else name


def make_layers(num_layers: int, layer_fn: Callable[[int, str], nn.Module], prefix: str = "") -> nn.ModuleList:
    """Make ``num_layers`` modules by ``layer_fn(idx=..., prefix=...)`` from each one's index and dotted name."""
    return nn.ModuleList(
        [layer_fn(idx=idx, prefix=add_prefix(str(idx), prefix)) for idx in range(num_layers)]  # type: ignore[call-arg]
    )
