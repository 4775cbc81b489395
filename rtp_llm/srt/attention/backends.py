"""Attention back ends by name."""

import torch

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.device.registry import ATTENTION_BACKENDS


def make_backend(name: str | None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> AttentionBackend:
    """Make the back end ``name``; None: the fastest for a model in ``dtype`` on ``device``.

    Raises:
        ValueError: there is no such back end, or it does not support this device or dtype.
        RuntimeError: the back end's kernels cannot be compiled or loaded here.
    """
    provider = provider_named(device)
    chosen: type[AttentionBackend] = ATTENTION_BACKENDS.load(name or provider.attention_backend(dtype))
    problem = chosen.problem(provider.torch_device, dtype)
    if problem is not None:
        raise ValueError(problem)
    return chosen()
