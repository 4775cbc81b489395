"""Loaders of parameters from a checkpoint.

Every parameter has ``weight_loader(param, tensor, shard_id=None)``. ``tensor`` may be a view of a memory-mapped file: a
loader checks shapes, cuts this rank's part, and only then copies, converting to the parameter's dtype.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rtp_llm.srt.distributed.parallel_state import get_tp_group
from rtp_llm.srt.model_traits import NamesSources

COMMON_IGNORE = (  # tensors that no model needs
    r"(^|\.)rotary_emb\.(original_)?inv_freq$",
    r"(^|\.)rotary_pos_emb\.inv_freq$",
    r"(^|\.)rotary_emb\.(cos_cached|sin_cached|cos_sin_cache)$",
    r"(^|\.)(self_)?(attn|attention)\.(bias|masked_bias)$",  # causal masks kept as buffers
    r"(^|\.)embeddings\.position_ids$",  # 0, 1, 2, ... kept as a buffer
    r"^(model\.)?mtp(_layers|_block)?\.",  # multi-token prediction
)

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


def set_weight_attrs(param: torch.Tensor, attributes: Mapping[str, Any] | None) -> None:
    """Set attributes of a parameter, such as ``{"weight_loader": sharded_weight_loader(0)}``."""
    for name, value in (attributes or {}).items():
        setattr(param, name, value)


def is_optional(target: torch.Tensor) -> bool:
    """Whether a checkpoint may lack a parameter or buffer, because it has a default value."""
    return getattr(target, "is_optional", False)


def default_weight_loader(param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
    """Load the whole tensor, the same on every rank."""
    refuse_shard(shard_id, "parameter")
    check_shape(tensor, param.shape, "parameter")
    param.data.copy_(tensor)


def row_parallel_weight_loader(param: nn.Parameter, tensor: torch.Tensor) -> None:
    """Load this rank's part of the first dimension; all of a tensor of one dimension."""
    group = get_tp_group()
    load_part(param.data, tensor, 0 if param.dim() > 1 else None, group.rank, group.world_size, "parameter")


def sharded_weight_loader(shard_axis: int) -> Callable[[nn.Parameter, torch.Tensor], None]:
    """Return a loader of this rank's part along a dimension."""
    group = get_tp_group()

    def load(param: nn.Parameter, tensor: torch.Tensor) -> None:
        load_part(param.data, tensor, shard_axis, group.rank, group.world_size, "parameter")

    return load


def composed_weight_loader(
    loader: Callable[[nn.Parameter, torch.Tensor], Any], fn: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[nn.Parameter, torch.Tensor], None]:
    """Return a loader that then applies a function to what was loaded."""

    def load(param: nn.Parameter, tensor: torch.Tensor) -> None:
        loader(param, tensor)
        param.data.copy_(fn(param.data))

    return load


def fill(target: torch.Tensor, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
    """Load a tensor, or a shard, into a parameter or buffer: by its ``weight_loader`` if it has one, else as a copy.

    Raises:
        ValueError: the tensor does not fit.
    """
    if target.is_floating_point() != tensor.is_floating_point():
        raise ValueError(f"expected dtype {target.dtype}, got {tensor.dtype}")
    weight_loader = getattr(target, "weight_loader", None)
    if weight_loader:
        weight_loader(target, tensor) if shard_id is None else weight_loader(target, tensor, shard_id)
    elif shard_id is not None:
        raise TypeError("a packed parameter needs a weight_loader that takes a shard id")
    elif target.shape != tensor.shape:
        raise ValueError(f"expected shape {shape_of(target)}, got {shape_of(tensor)}")
    else:
        target.data.copy_(tensor)


def declared_sources(model: nn.Module) -> dict[str, tuple[str, ShardId]]:
    """Return checkpoint names -> parameters and shards, as the model's layers declare them in ``weight_sources``."""
    return {
        f"{path}.{source}".removeprefix("."): (f"{path}.{parameter}".removeprefix("."), shard_id)
        for path, module in model.named_modules()
        if isinstance(module, NamesSources)
        for source, (parameter, shard_id) in module.weight_sources.items()
    }


def swap_part(name: str, part: str, other: str) -> str | None:
    """Return a dotted name with a part of it replaced, or None if it has no such part."""
    dotted = f".{name}."
    if f".{part}." not in dotted:
        return None
    return dotted.replace(f".{part}.", f".{other}.", 1)[1:-1]


def packed_shard_ids(layer: nn.Module, packed: str, num_sources: int) -> tuple[ShardId, ...]:
    """Return the shard ids of a packed layer's sources, in the order of ``packed_modules_mapping``."""
    default = ("q", "k", "v") if packed.endswith("qkv_proj") and num_sources == 3 else tuple(range(num_sources))
    return tuple(getattr(layer, "shard_ids", default))


def shape_of(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


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
