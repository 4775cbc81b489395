"""Attention back ends by name."""

from importlib import import_module

import torch

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.kernels.dispatch import CPU_DTYPES, uses_cpu_kernels

_BACKENDS = {
    "cpu": ("rtp_llm.srt.attention.cpu", "CpuAttention"),
    "torch_native": ("rtp_llm.srt.attention.torch", "TorchAttention"),
}


def make_backend(name: str | None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> AttentionBackend:
    """The back end called ``name``; None: the fastest for a model in ``dtype`` on ``device``.

    Raises:
        ValueError: there is no such back end, or it is not for this device or dtype.
        KernelBuildError: "cpu" is asked for, and its kernels do not compile here.
    """
    if name is None:
        name = "cpu" if device == "cpu" and uses_cpu_kernels(dtype) else "torch_native"
    if name not in _BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; have {sorted(_BACKENDS)}")
    if name == "cpu" and (device != "cpu" or dtype not in CPU_DTYPES):
        known = ", ".join(str(known).removeprefix("torch.") for known in CPU_DTYPES)
        raise ValueError(
            f"the attention backend 'cpu' is for models in {known} on a CPU, not {str(dtype).removeprefix('torch.')} "
            f"on {device}: use 'torch_native', or leave it unset"
        )
    module, attribute = _BACKENDS[name]
    return getattr(import_module(module), attribute)()
