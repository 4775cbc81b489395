"""What Triton's kernels do for a device: everything else is the reference's."""

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from rtp_llm.srt.device.provider import Kernel
from rtp_llm.srt.devices.reference.provider import ReferenceProvider

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that all kernels read and write
KERNELS: dict[str, str] = {  # kernel -> module of the folder ``kernels``
    "rms_norm": "norms",
    "gemma_rms_norm": "norms",
    "layer_norm": "norms",
    "add_rms_norm": "norms",
    "add_gemma_rms_norm": "norms",
    "add_layer_norm": "norms",
    "gated_rms_norm": "norms",
    "silu_and_mul": "gates",
    "gelu_and_mul": "gates",
    "gelu_tanh_and_mul": "gates",
    "swiglu_oai_and_mul": "gates",
    "sigmoid_gate": "gates",
    "rotary_pair": "rotary",
    "norm_rotary_pair": "rotary",
}


@cache
def has_triton() -> bool:
    """Whether Triton is installed; without it, kernels are plain torch's."""
    found = find_spec("triton") is not None
    if not found:
        logger.warning("Triton is not installed: kernels are plain torch's, and slow (pip install triton)")
    return found


class TritonProvider(ReferenceProvider):
    """A device whose kernels are Triton's. It imports Triton for the first of them."""

    def find(self, name: str, dtype: torch.dtype) -> Kernel | None:
        if name not in KERNELS or dtype not in DTYPES or not has_triton():
            return None
        kernel: Kernel = getattr(import_module(f"{__package__}.kernels.{KERNELS[name]}"), name)
        return kernel

    def attention_backend(self, dtype: torch.dtype) -> str:
        return "triton" if dtype in DTYPES and has_triton() else super().attention_backend(dtype)
