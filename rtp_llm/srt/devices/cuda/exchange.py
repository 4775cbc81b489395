"""Sums over ranks whose GPUs reach each other's memory, by Triton's kernel; all else is NCCL's.

Memory comes from torch's symmetric memory: every rank allocates the same, and maps the others'.
"""

import logging
import os
import socket
import zlib
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from rtp_llm.srt.devices.cuda.triton_provider import has_triton
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.distributed.unsummed import NormOfSum

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_RANKS = 8
MOST_BYTES = 512 << 10  # of a sum in one step: every rank reads as many from each other
SAME_DEVICE = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"  # torch's own switch, for tests of ranks on one GPU


class PeerExchange:
    """The memory that a group's ranks have on their GPUs. All must call an operation, in the same order."""

    def __init__(self, rank: int, memories: list[torch.Tensor], device: torch.device | str) -> None:
        """``memories``: of all ranks, [bytes] uint8 each, zero at the beginning, as this rank sees them."""
        self._kernels = _kernels()
        self._rank, self._memories = rank, memories
        self._addresses = torch.tensor([memory.data_ptr() for memory in memories]).to(device)
        self._exchanges = torch.zeros(self._kernels.MOST_ROWS, dtype=torch.int32, device=device)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether a contiguous tensor is summed here: rows that are few and short enough."""
        if x.dtype not in DTYPES or x.device != self._exchanges.device or x.nbytes > MOST_BYTES or not x.numel():
            return False
        return bool(self._kernels.takes(_rows(x)))

    def all_reduce(self, x: torch.Tensor) -> bool:
        """Sum a contiguous tensor in place; return False if it is not summed here."""
        if not self.takes(x):
            return False
        self._kernels.sum_rows(_rows(x), self._addresses, self._exchanges, self._rank)
        return True

    def all_gather(self, x: torch.Tensor) -> torch.Tensor | None:
        return None

    def send_tokens(self, tokens: torch.Tensor, *routing: Any) -> None:
        return None

    def defers(self, x: torch.Tensor) -> bool:
        """Whether a sum may wait for a norm: ``add_norm`` computes both in one launch."""
        return x.dim() > 1 and self.takes(x)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: NormOfSum
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Sum x over the ranks; return as ``reference.add_rms_norm`` of the sum, or None if there is no such kernel."""
        kind = {"rms_norm": self._kernels.RMS.value, "gemma_rms_norm": self._kernels.GEMMA.value}.get(norm.kernel)
        if kind is None or residual.dtype != x.dtype or residual.shape != x.shape:
            return None
        of_rows = kind, _rows(residual.contiguous()), norm.weight, norm.eps
        normed, added = self._kernels.sum_rows(_rows(x), self._addresses, self._exchanges, self._rank, of_rows)
        return normed.view(x.shape), added.view(x.shape)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, x.shape[-1]) if x.dim() else x.view(1, 1)


def _kernels() -> Any:
    return import_module(f"{__package__}.kernels.exchange")


def share_memory(group: RankGroup) -> PeerExchange | None:
    """Map the memory of a group's ranks; None on all of them if one cannot reach another's, and the log says why.

    Every rank of the group calls it.
    """
    if group.device.type != "cuda" or not 1 < group.world_size <= MOST_RANKS or not has_triton():
        return None
    exchange, problem = None, _problem(group)
    if _agree(group, problem is None):
        try:
            exchange = PeerExchange(group.rank, _mapped(group), _device_of(group))
        except RuntimeError as error:
            problem = str(error)
    if _agree(group, exchange is not None):
        return exchange
    others = f"all exchanges are {dist.get_backend(group.device_group)}'s"
    logger.info("GPUs do not reach each other's memory, %s: %s", others, problem or "another rank's log says why")
    return None


def _agree(group: RankGroup, is_fine: bool) -> bool:
    """Return whether it is on every rank; also a barrier."""
    votes = group.all_reduce(torch.tensor([int(is_fine)], dtype=torch.int32, device=group.device))
    return int(votes) == group.world_size


def _problem(group: RankGroup) -> str | None:
    """Return why this rank's GPU does not reach the memory of all others; None: it does."""
    places = torch.zeros(group.world_size, 2, dtype=torch.int64, device=group.device)
    own = _device_of(group).index
    places[group.rank] = torch.tensor([zlib.crc32(socket.gethostname().encode()), _number_of(own)])
    visible = {_number_of(device): device for device in range(torch.cuda.device_count())}
    hosts, devices = group.all_reduce(places).T.tolist()
    for rank in range(group.world_size):
        other = visible.get(devices[rank])
        if rank == group.rank:
            continue
        if hosts[rank] != hosts[group.rank]:
            return f"rank {rank} is on another machine"
        if other is None:
            return f"the GPU of rank {rank} is not visible to rank {group.rank}"
        if other == own:
            if os.environ.get(SAME_DEVICE) != "1":
                return f"ranks {rank} and {group.rank} are on one GPU"
        elif not torch.cuda.can_device_access_peer(own, other):
            return f"GPU {own} has no access to the memory of GPU {other}"
    return None


def _device_of(group: RankGroup) -> torch.device:
    index = group.device.index
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def _number_of(device: int) -> int:
    """A number that is the same for this GPU in every process."""
    return zlib.crc32(str(torch.cuda.get_device_properties(device).uuid).encode())


def _mapped(group: RankGroup) -> list[torch.Tensor]:
    """Allocate this rank's memory, and return that of all ranks, zeroed."""
    num_bytes = _kernels().memory_bytes(group.world_size)
    own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=_device_of(group))
    own.zero_()
    torch.cuda.synchronize()
    process_group = group.device_group
    assert process_group is not None, "several ranks have a group"
    mapped = symmetric_memory.rendezvous(own, process_group)
    _agree(group, True)  # before the first exchange, all memory is zero
    return [mapped.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(group.world_size)]
