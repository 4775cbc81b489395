"""The port that devices fill: everything that depends on which device computes.

A device is a folder with one class of DeviceProvider, which ``registry.py`` finds by name; nobody else imports the
folder. It is chosen once (``choice.py``). ``devices/reference`` fills the port in plain torch, and is what another
device derives from, so that it writes down only what it does differently.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from rtp_llm.srt.kernels.packed import PackedExperts, PackedWeight
from rtp_llm.srt.utils.stopwatch import Stopwatch

Kernel = Callable[..., Any]


class DeviceProvider(ABC):
    """One device, and what computes on it.

    Order: ``problem`` and ``memory_bytes`` before anything is loaded; ``prepare_rank`` in a process of its own per
    rank; kernels and packed weights while a model is built and loaded; the cache's memory; then the methods of steps.

    Attributes:
        name: what ``--device`` calls it.
        torch_device: where torch puts its tensors (``cpu``, ``cuda``).
        chunked_prefill_size, mem_fraction_static: the defaults of these options.
        overlaps_steps: calls return before their work is done, so that the host plans the next step meanwhile.
        ranks_share_memory: all ranks take theirs from the same memory.
        process_group: torch.distributed's back end between ranks.
        kv_cache_dtypes: values of ``--kv-cache-dtype`` that its attention can store.
        step_recorder: the StepRecorder that runs decode steps without their Python, as ``module:attribute``.
        activities: what a trace can record, by the names of ``start_profile``.
    """

    torch_device: str
    chunked_prefill_size: int
    mem_fraction_static: float
    overlaps_steps: bool
    ranks_share_memory: bool
    process_group: str
    kv_cache_dtypes: tuple[str, ...]
    step_recorder: str | None
    activities: Mapping[str, ProfilerActivity]

    def __init__(self, name: str) -> None:
        self.name = name

    # Before anything is loaded

    @abstractmethod
    def problem(self) -> str | None:
        """Why this device cannot be used here, as the end of a sentence; None: it can."""

    @abstractmethod
    def memory_bytes(self) -> tuple[int, int]:
        """``(free, total)`` bytes of what weights and cache are kept in."""

    @abstractmethod
    def prepare_rank(self, rank: int, world_size: int) -> torch.device:
        """Make a rank's process ready to join the others; return the device that is this rank's own."""

    # While a model is built and loaded

    @abstractmethod
    def find(self, name: str, dtype: torch.dtype) -> Kernel | None:
        """This device's own kernel: equal to the function of that name in ``kernels/reference.py``, for ``dtype``."""

    @abstractmethod
    def pick(self, name: str, dtype: torch.dtype) -> Kernel:
        """Its own kernel, else the reference. Layers ask once, when they are built, and keep the answer."""

    @abstractmethod
    def attention_backend(self, dtype: torch.dtype) -> str:
        """The name of the fastest attention back end for models in ``dtype``."""

    @abstractmethod
    def pack_dense(self, weight: torch.Tensor) -> PackedWeight | None:
        """[N, K] as products read it, a copy. None: nothing is faster than the tensor as it is."""

    @abstractmethod
    def pack_experts(self, weight: torch.Tensor) -> PackedExperts | None:
        """As ``pack_dense``, for [experts, N, K]."""

    @abstractmethod
    def pack_int8(self, weight: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
        """[N, K] int8 and [N] float32; products are those of ``reference.linear_int8``."""

    @abstractmethod
    def pack_int4(
        self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
    ) -> PackedWeight:
        """[N, K / 2] uint8, [N, ceil(K / group_size)] float32, uint8 or None: those of ``reference.linear_int4``."""

    @abstractmethod
    def pack_uint8(
        self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
    ) -> PackedWeight:
        """[N, K] uint8, [N, ceil(K / group_size)] float32, uint8 or None: those of ``reference.linear_uint8``."""

    @abstractmethod
    def timed_kernels(self, watch: Stopwatch) -> AbstractContextManager[None]:
        """Kernels that are bound within are parts of ``watch`` from then on; for a profile."""

    # The cache's memory

    @abstractmethod
    def cache_allocator(self) -> Callable[..., torch.Tensor]:
        """What reserves a cache's tensors, one for each cache: called as ``torch.empty(*shape, dtype=...)``."""

    @abstractmethod
    def take_cache(self, tensors: Sequence[torch.Tensor]) -> None:
        """Called once with a cache's tensors; may have the system give them memory before steps need it."""

    # In every step

    @abstractmethod
    def to_device(self, values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the host's values, for which the host does not wait."""

    @abstractmethod
    def to_device_together(self, arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, ...]:
        """A tensor for each one-dimensional int64 array. They share memory, and get there in one copy."""

    @abstractmethod
    def to_host(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Start copying to the host; what is returned waits for it, and gives the copies."""
