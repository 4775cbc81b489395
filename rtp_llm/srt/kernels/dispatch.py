"""Which implementation of a kernel a layer calls: picked once, when the layer is built.

``reference.py`` has every kernel in plain torch. A fast one has the same name and signature, stands in one of the
modules below, and is picked where the layer is built for a device, a dtype and a machine that it is for.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch

from rtp_llm.srt.devices.cpu import build
from rtp_llm.srt.kernels import reference

logger = logging.getLogger(__name__)

CPU_DTYPES = (torch.float32, torch.bfloat16)  # of what kernels read and write
CPU_KERNELS: dict[str, str] = {  # kernel -> module of rtp_llm.srt.devices.cpu
    "rms_norm": "elementwise",
    "gemma_rms_norm": "elementwise",
    "layer_norm": "elementwise",
    "add_rms_norm": "elementwise",
    "add_gemma_rms_norm": "elementwise",
    "add_layer_norm": "elementwise",
    "silu_and_mul": "elementwise",
    "gelu_and_mul": "elementwise",
    "gelu_tanh_and_mul": "elementwise",
    "swiglu_oai_and_mul": "elementwise",
    "rotary_pair": "elementwise",
    "argmax": "sampling",
    "group_rows": "moe",
    "gather_rows": "moe",
    "sum_rows": "moe",
}

_cpu_kernels = ContextVar("cpu_kernels", default=True)


@contextmanager
def cpu_kernels(enabled: bool) -> Iterator[None]:
    """Layers that are built within take plain torch on a CPU, if not ``enabled``."""
    token = _cpu_kernels.set(enabled)
    try:
        yield
    finally:
        _cpu_kernels.reset(token)


def pick(name: str, dtype: torch.dtype | None = None) -> Callable[..., Any]:
    """The kernel called ``name`` for the default device and ``dtype`` (None: the default dtype)."""
    if uses_cpu_kernels(dtype) and name in CPU_KERNELS:
        return getattr(import_module(f"rtp_llm.srt.devices.cpu.{CPU_KERNELS[name]}"), name)
    return getattr(reference, name)


def uses_cpu_kernels(dtype: torch.dtype | None = None) -> bool:
    """Whether a layer that is built now, in ``dtype`` (None: the default dtype), runs on C++ kernels."""
    return (
        _cpu_kernels.get()
        and torch.get_default_device().type == "cpu"
        and (dtype or torch.get_default_dtype()) in CPU_DTYPES
        and cpu_kernels_work()
    )


@functools.cache
def cpu_kernels_work() -> bool:
    """Whether this machine can compile and load them. Says once why not."""
    try:
        build.load("probe")
    except build.KernelBuildError as error:
        logger.warning(
            "no CPU kernels: %s\nPlain torch computes instead, several times slower in bfloat16. Install g++ "
            "(Debian: apt-get install g++), or name a C++ compiler in CXX.",
            error,
        )
        return False
    return True
