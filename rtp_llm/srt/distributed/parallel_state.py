"""Tensor parallelism: this process's rank, and the two collective operations that layers need.

Layers call ``get_tp_group()`` when they are built and keep the group. Until ``init_tensor_parallel`` is called there
is one rank, and the operations are the identity.
"""

from datetime import timedelta

import torch
import torch.distributed as dist


class TPGroup:
    """The ranks that share one model. Every rank must call both operations, in the same order."""

    def __init__(self, rank: int, world_size: int, device: torch.device | str = "cpu") -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"tensor-parallel rank must be in [0, {world_size}), got {rank}")
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)

    @property
    def rank_in_group(self) -> int:
        return self.rank

    @property
    def device_group(self) -> dist.ProcessGroup | None:
        """The group of torch's own calls, which has these ranks; None with one rank."""
        return dist.group.WORLD if self.world_size > 1 else None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``x`` over the ranks, in its shape and dtype. May write to ``x``."""
        if self.world_size == 1:
            return x
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Return the ranks' ``x``, all of one shape, concatenated along ``dim`` in rank order."""
        if self.world_size == 1:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim=dim)


_tp_group = TPGroup(rank=0, world_size=1)


def init_tensor_parallel(
    rank: int,
    world_size: int,
    backend: str,
    init_method: str,
    timeout_s: float,
    device: torch.device | str = "cpu",
) -> TPGroup:
    """Join the group; return when every rank has joined.

    Args:
        backend: of torch.distributed: ``gloo``, ``nccl`` and what else it has here.
        init_method: where the ranks meet, as ``torch.distributed`` spells it (``tcp://host:port``, ``file:///path``).
        timeout_s: how long joining, and any later operation, may wait for the other ranks.
        device: this rank's, with an index if the process could use several.

    Raises:
        RuntimeError: a group was already joined in this process.
        ValueError: unknown back end, or ``rank`` outside ``[0, world_size)``.
    """
    global _tp_group
    if dist.is_initialized():
        raise RuntimeError("tensor parallelism is already initialised: call destroy_tensor_parallel() first")
    backends = [name for name in dist.Backend.default_device_backend_map.values() if dist.is_backend_available(name)]
    if backend not in backends:
        raise ValueError(f"unknown distributed backend {backend!r}; have {backends}")
    group = TPGroup(rank, world_size, device)
    if world_size > 1:
        dist.init_process_group(
            backend,
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=group.device if group.device.index is not None else None,
        )
    _tp_group = group
    return group


def destroy_tensor_parallel() -> None:
    """Leave the group. Layers built before keep their old group and must not be used any more."""
    global _tp_group
    if dist.is_initialized():
        dist.destroy_process_group()
    _tp_group = TPGroup(rank=0, world_size=1)


def get_tp_group() -> TPGroup:
    return _tp_group


def get_tensor_model_parallel_rank() -> int:
    return _tp_group.rank


def get_tensor_model_parallel_world_size() -> int:
    return _tp_group.world_size


def tensor_model_parallel_all_reduce(x: torch.Tensor) -> torch.Tensor:
    """See ``TPGroup.all_reduce``."""
    return _tp_group.all_reduce(x)


def tensor_model_parallel_all_gather(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """See ``TPGroup.all_gather``."""
    return _tp_group.all_gather(x, dim)


def tensor_model_parallel_reduce_scatter(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Return this rank's part, along ``dim``, of the sum over all ranks."""
    return _tp_group.all_reduce(x).chunk(_tp_group.world_size, dim)[_tp_group.rank]


def divide(numerator: int, denominator: int, what: str = "size") -> int:
    """Return ``numerator / denominator``; raise ValueError, which names ``what``, if it is not a whole number."""
    if numerator % denominator != 0:
        raise ValueError(f"{what} {numerator} is not divisible by {denominator}; choose another tp_size")
    return numerator // denominator


def split_tensor_along_last_dim(tensor: torch.Tensor, num_partitions: int) -> tuple[torch.Tensor, ...]:
    """Return equal parts of the last dimension, as views: each rank's, where there are as many as ranks."""
    return tensor.split(divide(tensor.shape[-1], num_partitions, "the tensor's last dimension"), dim=-1)
