"""What Triton's kernels do for a device: everything else is the reference's."""

import logging
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from rtp_llm.srt.device.provider import Kernel
from rtp_llm.srt.devices.reference.provider import ReferenceProvider
from rtp_llm.srt.kernels import packed

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
    "causal_conv1d": "conv",
    "gated_delta_rule": "delta",
    "delta_gates": "delta",
    "linear_attention": "scans",
    "ssd": "scans",
    "selective_scan": "scans",
    "linear_recurrence": "scans",
    "quantize_rows": "linear",
    "route": "routing",
    "group_rows": "moe",
    "gather_rows": "moe",
    "sum_rows": "moe",
    "argmax": "sampling",
    "mask_tokens": "sampling",
    "draw": "sampling",
    "draw_rows": "sampling",
    "adjust_rows": "adjust",
    "count_rows": "adjust",
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

    def pack_experts(self, weight: torch.Tensor) -> packed.PackedExperts | None:
        return _forms().TritonDenseExperts(weight) if weight.dtype in DTYPES and has_triton() else None

    def pack_int8(self, weight: torch.Tensor, scales: torch.Tensor) -> packed.PackedWeight:
        return _forms().TritonInt8(weight, scales) if has_triton() else super().pack_int8(weight, scales)

    def pack_int4(
        self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
    ) -> packed.PackedWeight:
        plain = super().pack_int4(weight, scales, zeros, group_size)
        return _or_plain("TritonGroups", plain, weight, scales, zeros, group_size, 4)

    def pack_uint8(
        self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
    ) -> packed.PackedWeight:
        plain = super().pack_uint8(weight, scales, zeros, group_size)
        return _or_plain("TritonGroups", plain, weight, scales, zeros, group_size, 8)

    def pack_fp8(
        self, weight: torch.Tensor, scales: torch.Tensor, group_size: int, rounds_inputs: bool = False
    ) -> packed.PackedWeight:
        plain = super().pack_fp8(weight, scales, group_size, rounds_inputs)
        return _or_plain("fp8_weight", plain, weight, scales, group_size, rounds_inputs)

    def pack_table(
        self, weight: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, group_size: int
    ) -> packed.PackedWeight:
        plain = super().pack_table(weight, table, scales, group_size)
        return _or_plain("TritonCodes", plain, weight, scales, group_size, table)

    def group_experts(self, experts: Sequence[packed.PackedWeight]) -> packed.PackedExperts:
        if has_triton() and _forms().TritonExperts.are_alike(experts):
            grouped: packed.PackedExperts = _forms().TritonExperts(experts)
            return grouped
        return super().group_experts(experts)


def _forms() -> Any:
    """The module of weights for Triton's products, which imports Triton."""
    return import_module(f"{__package__}.packed")


def _or_plain(form: str, plain: packed.PackedWeight, *arguments: Any) -> packed.PackedWeight:
    """Return the weight in a form of Triton's, unless its kernel cannot multiply it."""
    if not has_triton():
        return plain
    weight: packed.PackedWeight = _forms().or_plain(getattr(_forms(), form)(*arguments), plain)
    return weight
