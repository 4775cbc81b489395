"""NVIDIA GPUs, with Triton's kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from rtp_llm.srt.device.graphs import GraphCapture
from rtp_llm.srt.devices.cuda import exchange
from rtp_llm.srt.devices.cuda.graphs import CudaGraphs
from rtp_llm.srt.devices.cuda.triton_provider import TritonProvider
from rtp_llm.srt.distributed.parallel_state import RankGroup


class CudaProvider(TritonProvider):
    """Copies to the device from pinned memory, so that the host waits only for results."""

    torch_device = "cuda"
    chunked_prefill_size = 8192
    mem_fraction_static = 0.88
    overlaps_steps = True
    moe_a2a_backend = "none"  # until the other is measured
    ranks_share_memory = False
    process_group = "nccl"
    kv_cache_dtypes = ("auto",)
    records_graphs = True
    activities = {"CPU": ProfilerActivity.CPU, "GPU": ProfilerActivity.CUDA}

    def problem(self) -> str | None:
        if torch.cuda.is_available():
            return None
        reason = "has no CUDA support" if torch.version.cuda is None else f"(CUDA {torch.version.cuda}) sees no GPU"
        return f"torch {torch.__version__} {reason}; choose device 'cpu'"

    def memory_bytes(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info()

    def prepare_rank(self, rank: int, world_size: int) -> torch.device:
        index = (
            rank % torch.cuda.device_count()
        )  # ranks of other machines count, too; Ray shows each rank its GPU alone
        torch.cuda.set_device(index)
        return torch.device(self.torch_device, index)

    def share_memory(self, group: RankGroup, timeout_s: float) -> None:
        """See ``exchange.py``. A rank that does not come lets the others wait on their devices until they are ended."""
        group.shared = exchange.share_memory(group)

    def graph_capture(self) -> GraphCapture:
        return CudaGraphs()

    def copy_to_device(self, target: torch.Tensor, values: np.ndarray) -> None:
        target.copy_(self.pinned(torch.from_numpy(values)), non_blocking=True)

    def to_device(self, values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        return self.pinned(torch.tensor(values, dtype=dtype)).to(self.torch_device, non_blocking=True)

    def to_device_together(self, arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, ...]:
        together = self.pinned(torch.from_numpy(np.concatenate(arrays)))
        return together.to(self.torch_device, non_blocking=True).split([len(array) for array in arrays])

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        copies = [self.start_copy(tensor) for tensor in tensors]
        ready = torch.cuda.Event()
        ready.record()

        def wait() -> list[torch.Tensor]:
            ready.synchronize()
            return copies

        return wait

    def pinned(self, values: torch.Tensor) -> torch.Tensor:
        """Copy a tensor of the host to pinned memory, which torch lends anew only after copies from it are done."""
        return values.pin_memory()

    def start_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Start copying to pinned memory of the host; return the copy, which an event says to be there."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
