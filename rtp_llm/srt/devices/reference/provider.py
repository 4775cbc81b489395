"""Plain torch on the host: documentation, oracle and base class of every other device."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from rtp_llm.srt.device.graphs import GraphCapture
from rtp_llm.srt.device.packed_files import PackedFiles
from rtp_llm.srt.device.provider import DeviceProvider, Kernel
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.kernels import packed, recurrent, reference
from rtp_llm.srt.kernels.blocks import BLOCK_TYPES, PlainBlocks
from rtp_llm.srt.platform import compute_cores, host_memory_bytes
from rtp_llm.srt.utils.stopwatch import Stopwatch


class ReferenceProvider(DeviceProvider):
    torch_device = "cpu"
    chunked_prefill_size = 2048
    whole_prompt_tokens: int | None = None
    mem_fraction_static = 0.6
    overlaps_steps = False
    moe_a2a_backend = "all_to_all"
    ranks_share_memory = True
    process_group = "gloo"
    kv_cache_dtypes: tuple[str, ...] = ("auto", "bf16", "int8")
    logit_bytes_at_once: int | None = None
    narrows_last_layer = False
    step_recorder: str | None = None
    records_graphs = False
    activities: Mapping[str, ProfilerActivity] = {"CPU": ProfilerActivity.CPU}

    def problem(self) -> str | None:
        return None

    def memory_bytes(self) -> tuple[int, int]:
        return host_memory_bytes()

    def prepare_rank(self, rank: int, world_size: int) -> torch.device:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return torch.device(self.torch_device)

    def share_memory(self, group: RankGroup, timeout_s: float) -> None:
        pass

    def use_threads(self, num_threads: int | None, pinned: bool, rank: int, world_size: int) -> None:
        """Nothing is pinned: plain torch has no way to."""
        if num_threads is None:
            num_threads = min(torch.get_num_threads(), len(compute_cores()))
        torch.set_num_threads(max(1, num_threads // world_size))

    def expect_weights(self, scheme: str | None) -> None:
        pass

    def find(self, name: str, dtype: torch.dtype) -> Kernel | None:
        return None

    def pick(self, name: str, dtype: torch.dtype) -> Kernel:
        plain = recurrent if hasattr(recurrent, name) else reference
        return self.find(name, dtype) or getattr(plain, name)

    def attention_backend(self, dtype: torch.dtype) -> str:
        return "torch_native"

    def pack_dense(self, weight: torch.Tensor) -> packed.PackedWeight | None:
        return None

    def pack_experts(self, weight: torch.Tensor) -> packed.PackedExperts | None:
        return None

    def pack_int8(self, weight: torch.Tensor, scales: torch.Tensor) -> packed.PackedWeight:
        return packed.PlainInt8(weight, scales)

    def pack_int4(
        self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
    ) -> packed.PackedWeight:
        return packed.PlainGroups(weight, scales, zeros, group_size, bits=4)

    def pack_uint8(
        self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
    ) -> packed.PackedWeight:
        return packed.PlainGroups(weight, scales, zeros, group_size, bits=8)

    def pack_fp8(
        self, weight: torch.Tensor, scales: torch.Tensor, group_size: int, rounds_inputs: bool = False
    ) -> packed.PackedWeight:
        return packed.PlainCodes(weight, scales, group_size)

    def pack_table(
        self, weight: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, group_size: int
    ) -> packed.PackedWeight:
        return packed.PlainCodes(weight, scales, group_size, table)

    def pack_blocks(self, blocks: torch.Tensor, block_type: str, num_inputs: int) -> packed.PackedWeight:
        if blocks.shape[-1] != BLOCK_TYPES[block_type].row_bytes(num_inputs):
            raise ValueError(f"{num_inputs} inputs in blocks of {block_type} are not of shape {list(blocks.shape)}")
        return PlainBlocks(blocks.clone(), block_type)

    def group_experts(self, experts: Sequence[packed.PackedWeight]) -> packed.PackedExperts:
        return packed.OneByOne(experts)

    def packed_files(self) -> PackedFiles | None:
        raise ValueError(
            f"packed_cache keeps weights that are packed for a CPU's kernels, and the device {self.name!r} has none: "
            "leave it out"
        )

    def timed_kernels(self, watch: Stopwatch) -> AbstractContextManager[None]:
        return nullcontext()

    def cache_allocator(self) -> Callable[..., torch.Tensor]:
        return partial(torch.empty, device=self.torch_device)

    def take_cache(self, tensors: Sequence[torch.Tensor]) -> None:
        pass

    def graph_capture(self) -> GraphCapture:
        raise RuntimeError(f"the device {self.name!r} records no graphs")

    def copy_to_device(self, target: torch.Tensor, values: np.ndarray) -> None:
        target.copy_(torch.from_numpy(values))

    def to_device(self, values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.int64:  # takes half the time of torch.tensor, for the lists of every step
            return torch.from_numpy(np.array(values, dtype=np.int64)).to(self.torch_device)
        return torch.tensor(values, dtype=dtype, device=self.torch_device)

    def to_device_together(self, arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, ...]:
        together = torch.from_numpy(np.concatenate(arrays)).to(self.torch_device)
        return together.split([len(array) for array in arrays])

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        copies = [tensor.to("cpu") for tensor in tensors]
        return lambda: copies
