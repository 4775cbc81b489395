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


def cache_number(layer_name: str) -> int:
    """Return a number for the cache of an attention layer, by its dotted name: the layer's index; where one layer has
    several attention layers, whose names have a second number, one that no other layer's cache has."""
    numbers = [int(part) for part in layer_name.split(".") if part.isdecimal()]
    if len(numbers) != 2:
        return extract_layer_index(layer_name)
    layer, own = numbers
    return _PER_LAYER * (own + 1) + layer


_PER_LAYER = 1 << 20  # above every index of a layer


def extract_layer_index(layer_name: str) -> int:
    """Return the number in a layer's dotted name: ``extract_layer_index("model.layers.3.self_attn") == 3``.

    Raises:
        ValueError: the name has no number, or several.
    """
    numbers = [int(part) for part in layer_name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise ValueError(
            f"a layer's name must have one number among its parts, its index; {layer_name!r} has {numbers}"
        )
    return numbers[0]
