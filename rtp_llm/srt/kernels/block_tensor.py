"""A tensor whose values lie in blocks, for loaders, which cut, order and copy weights by rows.

Every operation gives what it would give for the values. Those that move whole rows, or whole blocks, move the bytes
and give a BlockTensor again; all others compute values first.
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_map

from rtp_llm.srt.kernels.blocks import BLOCK_TYPES, dequantize_into

logger = logging.getLogger(__name__)

aten = torch.ops.aten


@dataclass(slots=True)
class Target:
    """What is written to. A whole tensor that is written to it is adopted: its blocks are not copied."""

    own: torch.Tensor
    adopted: torch.Tensor | None = None

    def settle(self) -> None:
        """Copy adopted blocks, before a part of them is written."""
        if self.adopted is not None:
            self.own.copy_(self.adopted)
            self.adopted = None


class BlockTensor(torch.Tensor):
    """Behaves as a tensor of the shape of its values, in ``dtype``.

    Attributes:
        blocks: uint8, of the same dimensions, with bytes in place of the inputs.
        block_type: one of ``kernels.blocks.BLOCK_TYPES``.
        axis: the dimension of the inputs, which is the last one unless the tensor is transposed.
        target: of a tensor that is written to: an access to other than whole blocks of it is an error, since it would
            write to a copy.
        is_whole: it is all of its target.
    """

    blocks: torch.Tensor
    block_type: str
    axis: int
    target: Target | None
    is_whole: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        blocks: torch.Tensor,
        block_type: str,
        dtype: torch.dtype,
        axis: int = -1,
        target: Target | None = None,
        is_whole: bool = False,
    ) -> "BlockTensor":
        layout, axis = BLOCK_TYPES[block_type], axis % blocks.dim()
        if blocks.shape[axis] % layout.num_bytes or blocks.stride(axis) != 1:
            raise ValueError(
                f"blocks of {block_type} are {layout.num_bytes} bytes each, side by side along dimension {axis} of "
                f"{list(blocks.shape)}"
            )
        shape, strides = list(blocks.shape), [s // layout.num_bytes * layout.num_values for s in blocks.stride()]
        shape[axis], strides[axis] = shape[axis] // layout.num_bytes * layout.num_values, 1
        result = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, strides=strides, dtype=dtype, device=blocks.device
        )
        result.blocks, result.block_type, result.axis = blocks, block_type, axis
        result.target, result.is_whole = target, is_whole
        return result  # type: ignore[no-any-return]

    @classmethod
    def to_be_written(cls, shape: Sequence[int], block_type: str, dtype: torch.dtype) -> "BlockTensor":
        """Make a target on the default device; ``written`` gives what was written to it."""
        blocks = torch.empty(*shape[:-1], BLOCK_TYPES[block_type].row_bytes(shape[-1]), dtype=torch.uint8)
        return cls(blocks, block_type, dtype, target=Target(blocks), is_whole=True)

    def written(self) -> "BlockTensor":
        """Return what was written to a target, perhaps a view of a mapped file."""
        adopted = self.target.adopted if self.target else None
        return BlockTensor(self.blocks if adopted is None else adopted, self.block_type, self.dtype, self.axis)

    def values(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values as a plain tensor; ``dtype`` None: the tensor's own."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        self.write_to(out)
        return out

    def write_to(self, out: torch.Tensor) -> None:
        """Write the values to a plain tensor of the same shape, a few rows at a time."""
        dequantize_into(out.movedim(self.axis, -1), self.blocks.movedim(self.axis, -1), self.block_type)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func.overloadpacket)
        result = handler(*args, **kwargs) if handler else NotImplemented
        if result is not NotImplemented:
            return result
        if isinstance(args[0], BlockTensor) and (args[0].target or func._schema.is_mutable):
            raise TypeError(f"{func} cannot be done in the blocks of a {args[0].block_type} tensor")
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    def like(self, blocks: torch.Tensor, axis: int | None = None) -> "BlockTensor":
        """Return a tensor of other blocks of the same type."""
        return BlockTensor(blocks, self.block_type, self.dtype, self.axis if axis is None else axis, self.target)


def leave_out_distributed_tensors() -> None:
    """Keep torch from importing its distributed tensors, and sympy with them: 45 MB and a second.

    It does so at the first operation on a tensor of any class but its own, to see whether that is one of them
    (``DTensor``). A class of this name that has no instances serves as well. Only for processes that have no DTensor:
    torch would not know it afterwards.
    """
    name = "torch.distributed.tensor"
    if name in sys.modules:
        return
    stand_in: Any = ModuleType(name)
    stand_in.DTensor = type("DTensor", (torch.Tensor,), {})
    sys.modules[name] = stand_in
    try:
        BlockTensor(torch.zeros(1, BLOCK_TYPES["Q8_0"].num_bytes, dtype=torch.uint8), "Q8_0", torch.float32).detach()
    except AttributeError as error:  # another version asks the stand-in for more
        logger.debug("torch %s imports its distributed tensors all the same: %s", torch.__version__, error)
    finally:
        del sys.modules[name]


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself, or the values of a BlockTensor."""
    return tensor.values() if isinstance(tensor, BlockTensor) else tensor


def _plain(value: Any) -> Any:
    return plain(value) if isinstance(value, torch.Tensor) else value


# Operations that move rows or blocks; NotImplemented: this call does something else.


def _detach(tensor: BlockTensor) -> Any:
    return BlockTensor(tensor.blocks, tensor.block_type, tensor.dtype, tensor.axis, tensor.target, tensor.is_whole)


def _slice(tensor: BlockTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    dim %= tensor.dim()
    first, last, step = slice(start, end, step).indices(tensor.shape[dim])
    if (first, last, step) == (0, tensor.shape[dim], 1):
        return _detach(tensor)
    if dim != tensor.axis:
        return tensor.like(aten.slice(tensor.blocks, dim, first, max(first, last), step))
    layout = BLOCK_TYPES[tensor.block_type]
    if step != 1 or first % layout.num_values or last % layout.num_values:
        return NotImplemented
    start_byte, end_byte = layout.row_bytes(first), layout.row_bytes(max(first, last))
    return tensor.like(tensor.blocks.narrow(dim, start_byte, end_byte - start_byte))


def _select(tensor: BlockTensor, dim: int, index: int) -> Any:
    dim %= tensor.dim()
    if dim == tensor.axis:
        return NotImplemented
    return tensor.like(tensor.blocks.select(dim, index), tensor.axis - (dim < tensor.axis))


def _unbind(tensor: BlockTensor, dim: int = 0) -> Any:
    if dim % tensor.dim() == tensor.axis:
        return NotImplemented
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _split(tensor: BlockTensor, size: int, dim: int = 0) -> Any:
    length = tensor.shape[dim]
    return _split_with_sizes(tensor, [min(size, length - at) for at in range(0, length, size)], dim)


def _split_with_sizes(tensor: BlockTensor, sizes: Sequence[int], dim: int = 0) -> Any:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [_slice(tensor, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return NotImplemented if any(part is NotImplemented for part in parts) else parts


def _view(tensor: BlockTensor, size: Sequence[int]) -> Any:
    sizes = [int(number) for number in size]
    if -1 in sizes:
        sizes[sizes.index(-1)] = tensor.numel() // -prod(sizes) if tensor.numel() else 0
    num_inputs, num_before = tensor.shape[tensor.axis], prod(tensor.shape[: tensor.axis])
    places = [dim for dim in range(len(sizes)) if sizes[dim] == num_inputs and prod(sizes[:dim]) == num_before]
    if not places:
        return NotImplemented
    axis = places[-1]
    return tensor.like(tensor.blocks.view(*sizes[:axis], tensor.blocks.shape[tensor.axis], *sizes[axis + 1 :]), axis)


def _unsqueeze(tensor: BlockTensor, dim: int) -> Any:
    dim %= tensor.dim() + 1
    return tensor.like(tensor.blocks.unsqueeze(dim), tensor.axis + (dim <= tensor.axis))


def _permute(tensor: BlockTensor, dims: Sequence[int]) -> Any:
    order = [dim % tensor.dim() for dim in dims]
    return tensor.like(tensor.blocks.permute(order), order.index(tensor.axis))


def _transpose(tensor: BlockTensor, dim0: int, dim1: int) -> Any:
    order = list(range(tensor.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(tensor, order)


def _t(tensor: BlockTensor) -> Any:
    return _transpose(tensor, 0, 1) if tensor.dim() == 2 else _detach(tensor)


def _clone(tensor: BlockTensor, memory_format: torch.memory_format = torch.preserve_format) -> Any:
    if memory_format == torch.contiguous_format and tensor.axis != tensor.dim() - 1:
        return NotImplemented
    return tensor.like(tensor.blocks.clone(memory_format=memory_format))


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if not isinstance(first, BlockTensor) or not all(
        isinstance(tensor, BlockTensor) and (tensor.block_type, tensor.axis) == (first.block_type, first.axis)
        for tensor in tensors
    ):
        return NotImplemented
    return first.like(torch.cat([tensor.blocks for tensor in tensors], dim))  # type: ignore[attr-defined]


def _index_select(tensor: BlockTensor, dim: int, index: torch.Tensor) -> Any:
    if dim % tensor.dim() == tensor.axis:
        return NotImplemented
    return tensor.like(tensor.blocks.index_select(dim, index))


def _to_copy(tensor: BlockTensor, dtype: torch.dtype | None = None, **options: Any) -> Any:
    if dtype in (None, tensor.dtype):
        return tensor.like(aten._to_copy(tensor.blocks, device=options.get("device")))
    return aten._to_copy(tensor.values(dtype), **options)


def _copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(target, BlockTensor):
        assert isinstance(source, BlockTensor)
        if target.device == source.device and target.shape == source.shape and target.is_floating_point():
            source.write_to(target)
        else:
            target.copy_(source.values())
        return target
    if not isinstance(source, BlockTensor) or (source.block_type, source.axis) != (target.block_type, target.axis):
        return NotImplemented
    if target.target is None or target.shape != source.shape:
        target.blocks.copy_(source.blocks)
    elif target.is_whole and target.device == source.device and source.target is None:
        target.target.adopted = source.blocks
    else:
        target.target.settle()
        target.blocks.copy_(source.blocks)
    return target


def _zero_(target: BlockTensor) -> Any:
    if target.target is not None and target.blocks.numel():
        target.target.settle()
    target.blocks.zero_()
    return target


def _equal(a: torch.Tensor, b: torch.Tensor) -> Any:
    both = isinstance(a, BlockTensor) and isinstance(b, BlockTensor)
    if both and (a.block_type, a.axis) == (b.block_type, b.axis) and torch.equal(a.blocks, b.blocks):  # type: ignore
        return True
    return NotImplemented


_HANDLERS: Mapping[Any, Callable[..., Any]] = {
    aten.detach: _detach,
    aten.alias: _detach,
    aten.slice: _slice,
    aten.select: _select,
    aten.unbind: _unbind,
    aten.split: _split,
    aten.split_with_sizes: _split_with_sizes,
    aten.view: _view,
    aten._unsafe_view: _view,
    aten.unsqueeze: _unsqueeze,
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.t: _t,
    aten.clone: _clone,
    aten.cat: _cat,
    aten.index_select: _index_select,
    aten._to_copy: _to_copy,
    aten.copy_: _copy_,
    aten.zero_: _zero_,
    aten.equal: _equal,
}
