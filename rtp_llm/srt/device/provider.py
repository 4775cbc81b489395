"""The port for devices: everything that depends on the device that computes.

A device is a folder with one subclass of DeviceProvider, which ``registry.py`` finds by name; no other module imports
the folder. It is chosen once (``choice.py``). ``devices/reference`` implements the port in plain torch; other devices
derive from it and define only what differs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from rtp_llm.srt.device.graphs import GraphCapture
from rtp_llm.srt.device.packed_files import PackedFiles
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.kernels.packed import PackedExperts, PackedWeight
from rtp_llm.srt.utils.stopwatch import Stopwatch

Kernel = Callable[..., Any]


class DeviceProvider(ABC):
    """One device: its kernels, weight formats, memory and copies.

    Order: ``problem`` and ``memory_bytes`` before anything is loaded; ``prepare_rank`` in a process of its own per
    rank; ``use_threads``; kernels and packed weights while a model is built and loaded; the cache's memory; then the
    methods of steps.

    Attributes:
        name: its name for ``--device``.
        torch_device: torch's name for it (``cpu``, ``cuda``).
        chunked_prefill_size, mem_fraction_static, moe_a2a_backend: the defaults of these options.
        whole_prompt_tokens: tokens of a step of whole prompts beyond which it is no faster; None: it always is.
        overlaps_steps: calls return before their work is done, so that the host can plan the next step meanwhile.
        ranks_share_memory: all ranks use the same memory.
        process_group: torch.distributed's back end between ranks.
        kv_cache_dtypes: values of ``--kv-cache-dtype`` that its attention supports.
        logit_bytes_at_once: logits are computed for about so many bytes of rows at a time, to sample from them; None:
            of all rows.
        narrows_last_layer: a model's last layer is computed of wanted tokens alone (worker/last_layer.py), which takes
            a second call of it, and needs tensors that the host can read.
        step_recorder: the StepRecorder for decode steps, as ``module:attribute``; None: there is none.
        records_graphs: decode steps are recorded whole, with their draws (``graph_capture``).
        activities: activities that a trace can record, by their names for ``start_profile``.
    """

    torch_device: str
    chunked_prefill_size: int
    mem_fraction_static: float
    moe_a2a_backend: str
    whole_prompt_tokens: int | None
    overlaps_steps: bool
    ranks_share_memory: bool
    process_group: str
    kv_cache_dtypes: tuple[str, ...]
    logit_bytes_at_once: int | None
    narrows_last_layer: bool
    step_recorder: str | None
    records_graphs: bool
    activities: Mapping[str, ProfilerActivity]

    def __init__(self, name: str) -> None:
        self.name = name

    # Before anything is loaded

    @abstractmethod
    def problem(self) -> str | None:
        """Return why this device cannot be used here, as the end of a sentence; None: it can."""

    @abstractmethod
    def memory_bytes(self) -> tuple[int, int]:
        """``(free, total)`` bytes of the memory for weights and cache."""

    @abstractmethod
    def prepare_rank(self, rank: int, world_size: int) -> torch.device:
        """Prepare a rank's process for joining the others; return this rank's device."""

    @abstractmethod
    def share_memory(self, group: RankGroup, timeout_s: float) -> None:
        """Give ranks that have joined a faster way than torch.distributed, if this device has one (``group.shared``).

        Every rank of the group calls this. ``timeout_s``: how long an operation may wait for the others.
        """

    @abstractmethod
    def use_threads(self, num_threads: int | None, pinned: bool, rank: int, world_size: int) -> None:
        """Set how many of the host's threads compute for this rank, from the thread that will execute its steps.

        Args:
            num_threads: of all ranks together; None: as many as suit this machine, and not more than before.
            pinned: bind each to a core of its own.
        """

    # While a model is built and loaded

    @abstractmethod
    def expect_weights(self, scheme: str | None) -> None:
        """Begin to prepare what weights of a quantization scheme need; None: those in their own dtype."""

    @abstractmethod
    def find(self, name: str, dtype: torch.dtype) -> Kernel | None:
        """Return this device's own kernel, which equals ``kernels/reference.py``'s ``name``, for ``dtype``, if any."""

    @abstractmethod
    def pick(self, name: str, dtype: torch.dtype) -> Kernel:
        """Return its own kernel, else the reference's. Layers call this once, when they are built."""

    @abstractmethod
    def attention_backend(self, dtype: torch.dtype) -> str:
        """Return the name of the fastest attention back end for models in ``dtype``."""

    @abstractmethod
    def pack_dense(self, weight: torch.Tensor) -> PackedWeight | None:
        """Pack a copy of a weight [N, K]. None: no packed form is faster than the plain tensor."""

    @abstractmethod
    def pack_experts(self, weight: torch.Tensor) -> PackedExperts | None:
        """Pack a copy of weights [experts, N, K]; None as in ``pack_dense``."""

    @abstractmethod
    def pack_int8(self, weight: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
        """Pack [N, K] int8 with scales [N] float32, for the products of ``reference.linear_int8``."""

    @abstractmethod
    def pack_int4(
        self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
    ) -> PackedWeight:
        """Pack [N, K / 2] uint8, scales [N, ceil(K / group_size)] float32 and zeros (the same in uint8, or None), for
        the products of ``reference.linear_int4``."""

    @abstractmethod
    def pack_uint8(
        self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
    ) -> PackedWeight:
        """Pack [N, K] uint8, scales [N, ceil(K / group_size)] float32 and zeros (the same in uint8, or None), for the
        products of ``reference.linear_uint8``."""

    @abstractmethod
    def pack_fp8(
        self, weight: torch.Tensor, scales: torch.Tensor, group_size: int, rounds_inputs: bool = False
    ) -> PackedWeight:
        """Pack [N, K] float8_e4m3fn with scales [N, ceil(K / group_size)] float32, for products as
        ``packed.PlainCodes`` has them.

        ``rounds_inputs``: the checkpoint is made for inputs in fp8. A device that multiplies fp8 with fp8 rounds them,
        as ``reference.linear_fp8`` does; others would lose accuracy and gain nothing.
        """

    @abstractmethod
    def pack_table(
        self, weight: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, group_size: int
    ) -> PackedWeight:
        """Pack [N, K / 2] uint8 of codes of 4 bits with the numbers that they stand for, [16] float32, and scales
        [N, ceil(K / group_size)] float32, for products as ``packed.PlainCodes`` has them."""

    @abstractmethod
    def pack_blocks(self, blocks: torch.Tensor, block_type: str, num_inputs: int) -> PackedWeight:
        """Pack a copy of a weight [N, num_inputs] in blocks, [N, bytes per row] uint8, of a type of
        ``kernels.blocks.BLOCK_TYPES``, for the products of ``kernels.blocks.PlainBlocks``. ``blocks`` may be a view of
        a mapped file."""

    @abstractmethod
    def group_experts(self, experts: Sequence[PackedWeight]) -> PackedExperts:
        """Make one weight of those of a layer's experts, whatever their form, without copying them."""

    @abstractmethod
    def packed_files(self) -> PackedFiles | None:
        """Return how packed weights are kept in files; None: here nothing is packed for kernels, as the log says.

        Raises:
            ValueError: weights of this device are not kept in files.
        """

    @abstractmethod
    def timed_kernels(self, watch: Stopwatch) -> AbstractContextManager[None]:
        """Make kernels that are bound within the context report their times to ``watch``, also later; for a profile."""

    # The cache's memory

    @abstractmethod
    def cache_allocator(self) -> Callable[..., torch.Tensor]:
        """Return the function that allocates the tensors of one cache, called as ``torch.empty(*shape, dtype=...)``."""

    @abstractmethod
    def take_cache(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take note of a cache's tensors, once; may make the system back them with memory before steps need it."""

    @abstractmethod
    def graph_capture(self) -> GraphCapture:
        """Return what records a model's decode steps, once the cache is there; only if ``records_graphs``.

        Raises:
            Exception: nothing can be recorded here; its message says why.
        """

    # In every step

    @abstractmethod
    def copy_to_device(self, target: torch.Tensor, values: np.ndarray) -> None:
        """Copy host values to a tensor on the device of their shape and dtype, without waiting."""

    @abstractmethod
    def to_device(self, values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        """Copy host values to a tensor on the device, without waiting."""

    @abstractmethod
    def to_device_together(self, arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, ...]:
        """Copy one-dimensional int64 arrays to a tensor each, in one copy; the tensors share memory."""

    @abstractmethod
    def to_host(self, tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Start copying to the host; return a function that waits, and returns the copies."""
