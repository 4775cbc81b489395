"""Inputs of an encoder as a class with the shapes of its tensors, under the names that vLLM's model files have.

class PixelInputs(TensorSchema):
    pixel_values: Annotated[torch.Tensor, TensorShape("images", 3, "height", "width")]

PixelInputs(pixel_values=pixels, resolve_bindings={"height": 224})["pixel_values"]
"""

from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch

__all__ = ["TensorSchema", "TensorShape"]

Shape = tuple[int, ...]
UNKNOWN = -1  # a size that differs between the parts of a list


class TensorShape:
    """Sizes of a tensor's dimensions: numbers, or names, of which one means one size. Sizes of ``dynamic_dims`` may
    differ between the tensors of a list."""

    def __init__(self, *dims: int | str, dynamic_dims: Iterable[str] = ()) -> None:
        self.dims = dims
        self.dynamic_dims = frozenset(dynamic_dims)

    def __repr__(self) -> str:
        return f"[{', '.join(map(str, self.dims))}]"


class TensorSchema:
    """Named values; those whose annotation has a TensorShape are tensors, or lists of them, of that shape.

    Args:
        validate: whether shapes are looked at.
        resolve_bindings: sizes of named dimensions.

    Raises:
        ValueError: a value is missing that may not be None, or a shape does not fit.
    """

    def __init__(
        self, *, validate: bool = True, resolve_bindings: Mapping[str, int] | None = None, **values: Any
    ) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        if validate:
            self._check(dict(resolve_bindings or {}))

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    def _check(self, sizes: dict[str, int]) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value, parts = getattr(self, name, None), _parts(hint)
            if value is None:
                if NoneType not in parts:
                    raise ValueError(f"{type(self).__name__} needs {name}")
                continue
            for shape in parts:
                if isinstance(shape, TensorShape):
                    _fit(f"{type(self).__name__}.{name}", _shape_of(value), shape, sizes)


def _parts(hint: Any) -> list[Any]:
    """Return what a type is made of, all the way down."""
    return [part for arg in get_args(hint) for part in (arg, *_parts(arg))]


def _shape_of(value: Any) -> Shape:
    """Return the shape of a tensor, or of a list of them as if they were stacked."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if not isinstance(value, list | tuple):
        return ()
    shapes = [_shape_of(part) for part in value]
    if not shapes or any(len(shape) != len(shapes[0]) for shape in shapes):
        return (len(shapes),)
    return (len(shapes), *(sizes[0] if len(set(sizes)) == 1 else UNKNOWN for sizes in zip(*shapes, strict=True)))


def _fit(name: str, found: Shape, expected: TensorShape, sizes: dict[str, int]) -> None:
    """Compare a shape, and remember the sizes of named dimensions."""
    fits = len(found) == len(expected.dims)
    for size, dim in zip(found, expected.dims, strict=False):
        if dim in expected.dynamic_dims:
            continue
        wanted = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
        fits = fits and size == wanted != UNKNOWN
    if not fits:
        known = {dim: sizes[dim] for dim in expected.dims if isinstance(dim, str) and dim in sizes}
        raise ValueError(f"{name} must be of shape {expected} with {known}, got {list(found)}")
