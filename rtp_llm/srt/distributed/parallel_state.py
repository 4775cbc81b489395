"""The ranks that compute one model together, and the groups in which they exchange tensors.

Layers call ``get_tp_group()`` when they are built and keep the group. Until ``init_world`` is called there is one rank,
and the operations of every group are the identity.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from rtp_llm.srt.distributed.unsummed import SumsLater, Unsummed, plain

TENSOR, PIPELINE, EXPERT, EXPERT_TENSOR, DATA = "tensor", "pipeline", "expert", "expert_tensor", "data"
GROUPS = (TENSOR, PIPELINE, EXPERT, EXPERT_TENSOR, DATA)


@dataclass(frozen=True, slots=True)
class WorldShape:
    """How the ranks of one model are arranged: ``pipeline`` stages one after the other, of ``tensor`` ranks each.

    Rank ``stage * tensor + t`` is rank t of its stage's tensor group, and has one of ``pipeline`` places in a pipeline
    group with the ranks t of the other stages. A tensor group divides experts into ``expert`` parts, of which
    neighbouring ranks, ``tensor / expert`` of them, share one and split it; these are an expert-tensor group. The ranks
    with the same place in theirs are an expert group.

    With ``data`` > 1, so many ranks have requests of their own and all layers whole, but experts, which are divided
    among them: each is alone in its tensor group, and all are one data group and one expert group.

    Replicas of a model (``--dp-size``) exchange nothing: each is a world of its own.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    data: int = 1

    def __post_init__(self) -> None:
        if min(self.tensor, self.pipeline, self.expert, self.data) < 1:
            raise ValueError(f"sizes of groups must be at least 1, got {self}")
        if self.data > 1:
            if (self.tensor, self.pipeline, self.expert) != (1, 1, self.data):
                raise ValueError(f"ranks with requests of their own divide experts, and nothing else: not {self}")
        elif self.tensor % self.expert:
            raise ValueError(f"ep_size {self.expert} does not divide tp_size {self.tensor}")

    @property
    def size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def stage_of(self, rank: int) -> int:
        return rank // self.tensor % self.pipeline

    def members(self, group: str) -> list[list[int]]:
        """Return the ranks of each group of a kind, in the order of their places in it."""
        if group not in GROUPS:
            raise ValueError(f"unknown group {group!r}; have {list(GROUPS)}")
        alone = [[rank] for rank in range(self.size)]
        if self.data > 1:
            return [list(range(self.size))] if group in (EXPERT, DATA) else alone
        stages = [list(range(first, first + self.tensor)) for first in range(0, self.size, self.tensor)]
        shared = self.tensor // self.expert  # ranks that split a part of the experts
        if group == TENSOR:
            return stages
        if group == PIPELINE:
            return [list(ranks) for ranks in zip(*stages, strict=True)]
        if group == EXPERT_TENSOR:
            return [ranks[first : first + shared] for ranks in stages for first in range(0, self.tensor, shared)]
        if group == EXPERT:
            return [ranks[place::shared] for ranks in stages for place in range(shared)]
        return alone


class ArrivedTokens(Protocol):
    """Tokens of all ranks that have an expert on this one, with weights and experts, [T, ...]."""

    @property
    def tokens(self) -> torch.Tensor: ...
    @property
    def topk_weights(self) -> torch.Tensor: ...
    @property
    def topk_ids(self) -> torch.Tensor: ...

    def sums(self, summands: torch.Tensor) -> torch.Tensor:
        """Bring back what ranks have made of tokens, here ``summands`` [T, n] of those that have arrived; return the
        sum for each of the tokens that this rank has sent. All ranks call it, before any sends more."""


class SharedMemory(SumsLater, Protocol):
    """A device's own way between ranks of one machine. All of them call an operation, in the same order."""

    def defers(self, x: torch.Tensor) -> bool:
        """Whether the sum of a contiguous tensor may wait for a norm, which costs no further launch then."""

    def all_reduce(self, x: torch.Tensor) -> bool:
        """Sum a contiguous tensor over the ranks, in place; return False if it does not take this tensor."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the ranks' contiguous tensors, [ranks, *x.shape]; None if it does not take this tensor."""

    def send_tokens(
        self,
        tokens: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        counts: Sequence[int],
        num_own_experts: int,
    ) -> ArrivedTokens | None:
        """Send tokens to the ranks that have one of their experts; None if it does not take these, on no rank then.

        Args:
            tokens: [T, hidden_size]; topk_weights, topk_ids: [T, top_k].
            counts: tokens that each rank has to send.
            num_own_experts: of each rank; the first one has the first ones.
        """


class RankGroup:
    """This rank's place among ranks that work together. All of them must call an operation, in the same order.

    Attributes:
        rank, world_size: of this group, not of the world.
        shared: is asked before torch.distributed is.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device | str = "cpu",
        process_group: dist.ProcessGroup | None = None,
        members: list[int] | None = None,
    ) -> None:
        """``process_group``: of torch, with these ranks; None: the one of all ranks. ``members``: their ranks there."""
        if not 0 <= rank < world_size:
            raise ValueError(f"the rank must be in [0, {world_size}), got {rank}")
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self.members = list(range(world_size)) if members is None else members
        self.shared: SharedMemory | None = None
        self._process_group = process_group

    @property
    def rank_in_group(self) -> int:
        return self.rank

    @property
    def is_first_rank(self) -> bool:
        return self.rank == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank == self.world_size - 1

    @property
    def device_group(self) -> dist.ProcessGroup | None:
        """The group of torch's own calls, which has these ranks; None with one rank."""
        if self.world_size == 1:
            return None
        return self._process_group if self._process_group is not None else dist.group.WORLD

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``x`` over the ranks, in its shape and dtype. May write to ``x``, also later."""
        if self.world_size == 1:
            return x
        x = plain(x).contiguous()
        if self.shared is not None and self.shared.defers(x):
            return Unsummed.of(x, self.shared)
        if self.shared is None or not self.shared.all_reduce(x):
            dist.all_reduce(x, group=self._process_group)
        return x

    def all_agree(self, agrees: bool) -> bool:
        """Return whether all ranks say so. Waits for the device."""
        if self.world_size == 1:
            return agrees
        votes = self.all_reduce(torch.tensor(float(agrees), device=self.device))
        return votes.item() == self.world_size

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Return the ranks' ``x``, all of one shape, concatenated along ``dim`` in rank order."""
        if self.world_size == 1:
            return x
        x = plain(x).contiguous()
        gathered = None if self.shared is None else self.shared.all_gather(x)
        if gathered is not None:
            return torch.cat(gathered.unbind(), dim=dim)
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x, group=self._process_group)
        return torch.cat(parts, dim=dim)

    def all_to_all(self, x: torch.Tensor, counts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Send rows to ranks; return those that ranks have sent to this one, in the order of ranks.

        Args:
            x: [rows, ...], in the order of the ranks that rows are for.
            counts: ``counts[a][b]`` rows go from rank a to rank b, also where both are one; the same on all ranks.

        Raises:
            ValueError: ``x`` has not as many rows as ``counts`` says.
        """
        x, sent, received = plain(x), list(counts[self.rank]), [of_rank[self.rank] for of_rank in counts]
        if len(x) != sum(sent):
            raise ValueError(f"rank {self.rank} has {len(x)} rows to send, but its counts are {sent}")
        if self.world_size == 1:
            return x
        result = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(result, x.contiguous(), received, sent, group=self._process_group)
        return result

    def send(self, x: torch.Tensor, rank: int) -> dist.Work:
        """Begin to send a tensor to another rank of the group. Keep ``x`` as it is until the result's ``wait()``."""
        work = dist.isend(plain(x), self.members[rank], group=self._process_group)
        assert work is not None  # as on ranks outside of the group
        return work

    def receive(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """Fill ``x`` with the next tensor of another rank of the group, which has its shape and dtype; return it."""
        dist.recv(x, self.members[rank], group=self._process_group)
        return x


class World:
    """The groups that one rank belongs to, by name (``GROUPS``); without any, it is alone in each.

    Attributes:
        step_tokens: tokens that each rank of the data group computes in this step. The worker sets it before each.
        moe_a2a_backend: how tokens come to other ranks' experts, as the option of this name says. The worker sets it
            before it loads the model.
    """

    def __init__(self, shape: WorldShape, rank: int = 0, groups: dict[str, RankGroup] | None = None) -> None:
        self.shape = shape
        self.rank = rank
        self.step_tokens: list[int] = []
        self.moe_a2a_backend = "none"
        self._groups = groups or {name: RankGroup(0, 1) for name in GROUPS}

    def group(self, name: str) -> RankGroup:
        return self._groups[name]

    @classmethod
    def seen_by(cls, rank: int, shape: WorldShape, device: torch.device | str = "cpu") -> "World":
        """Return a rank's groups without a connection between them: to build a model, not to compute with it."""
        return cls(shape, rank, {name: _group_of(rank, shape, name, device) for name in GROUPS})


def _group_of(rank: int, shape: WorldShape, name: str, device: torch.device | str) -> RankGroup:
    [members] = [ranks for ranks in shape.members(name) if rank in ranks]
    return RankGroup(members.index(rank), len(members), device, members=members)


_world = World(WorldShape())
_of_thread = threading.local()


def init_world(
    rank: int,
    shape: WorldShape,
    backend: str,
    init_method: str,
    timeout_s: float,
    device: torch.device | str = "cpu",
) -> World:
    """Join the other ranks; return when every rank has joined.

    Args:
        backend: of torch.distributed: ``gloo``, ``nccl`` and what else it has here.
        init_method: where the ranks meet, as ``torch.distributed`` spells it (``tcp://host:port``, ``file:///path``).
        timeout_s: how long joining, and any later operation, may wait for the other ranks.
        device: this rank's, with an index if the process could use several.

    Raises:
        RuntimeError: a world was already joined in this process.
        ValueError: unknown back end, or ``rank`` outside of the world.
    """
    if dist.is_initialized():
        raise RuntimeError("the ranks of this process have joined already: call destroy_world() first")
    backends = [name for name in dist.Backend.default_device_backend_map.values() if dist.is_backend_available(name)]
    if backend not in backends:
        raise ValueError(f"unknown distributed backend {backend!r}; have {backends}")
    if not 0 <= rank < shape.size:
        raise ValueError(f"the rank must be in [0, {shape.size}), got {rank}")
    device, timeout = torch.device(device), timedelta(seconds=timeout_s)
    if shape.size > 1:
        device_id = device if device.index is not None else None
        dist.init_process_group(
            backend, init_method=init_method, rank=rank, world_size=shape.size, timeout=timeout, device_id=device_id
        )
    return _enter(World(shape, rank, {name: _joined(rank, shape, name, device, timeout) for name in GROUPS}))


def _joined(rank: int, shape: WorldShape, name: str, device: torch.device, timeout: timedelta) -> RankGroup:
    """Return a rank's group of a kind. Every rank makes all groups of several ranks, in the same order."""
    own = _group_of(rank, shape, name, device)
    process_group = None
    for members in shape.members(name):
        if 1 < len(members) < shape.size:
            made = dist.new_group(members, timeout=timeout)
            process_group = made if members == own.members else process_group
    return RankGroup(own.rank, own.world_size, device, process_group, own.members)


def _enter(world: World) -> World:
    global _world
    _world = world
    return world


def destroy_world() -> None:
    """Leave the other ranks. Layers built before keep their old groups and must not be used any more."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _enter(World(WorldShape()))


@contextmanager
def seen_as(world: World) -> Iterator[None]:
    """Make a world that of what this thread builds and computes within the context."""
    before = getattr(_of_thread, "world", None)
    _of_thread.world = world
    try:
        yield
    finally:
        _of_thread.world = before


def get_world() -> World:
    return getattr(_of_thread, "world", None) or _world


def get_tp_group() -> RankGroup:
    return get_world().group(TENSOR)


def get_pp_group() -> RankGroup:
    return get_world().group(PIPELINE)


def get_ep_group() -> RankGroup:
    return get_world().group(EXPERT)


def get_expert_tensor_group() -> RankGroup:
    return get_world().group(EXPERT_TENSOR)


def get_tensor_model_parallel_rank() -> int:
    return get_tp_group().rank


def get_tensor_model_parallel_world_size() -> int:
    return get_tp_group().world_size


def tensor_model_parallel_all_reduce(x: torch.Tensor) -> torch.Tensor:
    """See ``RankGroup.all_reduce``."""
    return get_tp_group().all_reduce(x)


def tensor_model_parallel_all_gather(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """See ``RankGroup.all_gather``."""
    return get_tp_group().all_gather(x, dim)


def tensor_model_parallel_reduce_scatter(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Return this rank's part, along ``dim``, of the sum over all ranks."""
    group = get_tp_group()
    return group.all_reduce(x).chunk(group.world_size, dim)[group.rank]


class SplitError(ValueError):
    """Something of a model cannot be divided over so many ranks; the message names it."""


def divide(numerator: int, denominator: int, what: str = "size", option: str = "tp_size") -> int:
    """Return ``numerator / denominator``; raise SplitError, which names ``what``, if it is not a whole number.

    ``option``: the one to change then.
    """
    if numerator % denominator != 0:
        raise SplitError(f"{what} {numerator} is not divisible by {denominator}; choose another {option}")
    return numerator // denominator


def split_tensor_along_last_dim(tensor: torch.Tensor, num_partitions: int) -> tuple[torch.Tensor, ...]:
    """Return equal parts of the last dimension, as views: each rank's, where there are as many as ranks."""
    return tensor.split(divide(tensor.shape[-1], num_partitions, "the tensor's last dimension"), dim=-1)
