"""NVIDIA GPUs, with Triton's kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from rtp_llm.srt.devices.cuda.triton_provider import TritonProvider


class CudaProvider(TritonProvider):
    """Copies to the device from pinned memory, so that the host waits only for results."""

    torch_device = "cuda"
    chunked_prefill_size = 8192
    mem_fraction_static = 0.88
    overlaps_steps = True
    ranks_share_memory = False
    process_group = "nccl"
    kv_cache_dtypes = ("auto",)
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

    def to_device(self, values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(self.torch_device, non_blocking=True)

    def to_device_together(self, arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, ...]:
        together = torch.from_numpy(np.concatenate(arrays)).pin_memory()
        return together.to(self.torch_device, non_blocking=True).split([len(array) for array in arrays])

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        ready = torch.cuda.Event()
        ready.record()

        def wait() -> list[torch.Tensor]:
            ready.synchronize()
            return copies

        return wait
