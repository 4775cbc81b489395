"""Loaders of parameters from a checkpoint.

Every parameter has ``weight_loader(param, tensor, shard_id=None)``. ``tensor`` may be a view of a memory-mapped file: a
loader checks shapes, cuts this rank's part, and only then copies, converting to the parameter's dtype.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

Weights = Iterable[tuple[str, torch.Tensor]]  # the tensors of a checkpoint, by name
ShardId = str | int | tuple[int, str] | None  # (expert, "w1" | "w2" | "w3") for experts
WeightLoader = Callable[[nn.Parameter, torch.Tensor, ShardId], None]


def make_parameter(
    data: torch.Tensor,
    weight_loader: WeightLoader,
    input_dim: int | None = None,
    output_dim: int | None = None,
    is_optional: bool = False,
) -> nn.Parameter:
    """Make a parameter without gradient.

    Args:
        input_dim, output_dim: the dimensions that are split over ranks.
        is_optional: a checkpoint may lack it; its default is ``data``.
    """
    param = nn.Parameter(data, requires_grad=False)
    param.weight_loader = weight_loader  # type: ignore[attr-defined]
    param.input_dim = input_dim  # type: ignore[attr-defined]
    param.output_dim = output_dim  # type: ignore[attr-defined]
    param.is_optional = is_optional  # type: ignore[attr-defined]
    return param


def is_optional(target: torch.Tensor) -> bool:
    """Whether a checkpoint may lack a parameter or buffer, because it has a default value."""
    return getattr(target, "is_optional", False)


def default_weight_loader(param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
    """Load the whole tensor, the same on every rank."""
    refuse_shard(shard_id, "parameter")
    check_shape(tensor, param.shape, "parameter")
    param.data.copy_(tensor)


def load_part(
    target: torch.Tensor, tensor: torch.Tensor, dim: int | None, part: int, num_parts: int, name: str
) -> None:
    """Copy part ``part`` of ``num_parts`` equal parts of ``tensor`` along ``dim`` (None: all of it) to ``target``."""
    expected = list(target.shape)
    if dim is not None:
        expected[dim] *= num_parts
    check_shape(tensor, expected, name)
    if dim is not None:
        size = target.shape[dim]
        tensor = tensor.narrow(dim, part * size, size)
    target.copy_(tensor)


def check_shape(tensor: torch.Tensor, expected: Sequence[int], name: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name}: the configuration expects a tensor of shape {tuple(expected)}, "
            f"the checkpoint has {tuple(tensor.shape)}"
        )


def refuse_shard(shard_id: ShardId, name: str) -> None:
    if shard_id is not None:
        raise ValueError(f"{name} is not fused from several checkpoint tensors, got shard_id {shard_id!r}")
