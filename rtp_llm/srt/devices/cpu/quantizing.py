"""Weights in 8 and 4 bits in C++, made while a checkpoint is loaded."""

import functools

import torch

from rtp_llm.srt.devices.cpu.binding import INT, INT64, POINTER, Kernel, bind
from rtp_llm.srt.kernels import reference

_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Kernel:
    shape = (POINTER, INT64, INT64, INT64)  # weight, stride, rows, size
    types = {"int8": (*shape, POINTER, POINTER), "int4": (*shape, INT64, POINTER, POINTER, POINTER)}
    result = INT if name == "int4" else None
    return bind("quantizing", f"quantize_{name}_{_SUFFIXES[dtype]}", *types[name], result=result)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if x.dtype not in _SUFFIXES or not x.is_cpu:
        return reference.quantize_rows(x)
    size = x.shape[-1]
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, size).contiguous()
    values = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float32)
    _function("int8", x.dtype)(rows.data_ptr(), rows.stride(0), len(rows), size, values.data_ptr(), scales.data_ptr())
    return values, scales


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, K] -> values [N, K / 2] uint8, scales [N, groups] float32 and zeros [N, groups] uint8, as
    ``reference.dequantize_int4`` takes them.

    Raises:
        ValueError: groups are not of 8, 16 or 32, or K is odd.
    """
    num_rows, num_inputs = weight.shape
    groups = -(-num_inputs // group_size)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    values = torch.empty(num_rows, num_inputs // 2, dtype=torch.uint8)
    scales = torch.empty(num_rows, groups, dtype=torch.float32)
    zeros = torch.empty(num_rows, groups, dtype=torch.uint8)
    if num_inputs % 2 or not _function("int4", weight.dtype)(
        weight.data_ptr(), weight.stride(0), num_rows, num_inputs, group_size, values.data_ptr(), scales.data_ptr(),
        zeros.data_ptr(),
    ):  # fmt: skip
        raise ValueError(f"no kernel for {num_inputs} inputs in groups of {group_size}: an even number, in 8, 16 or 32")
    return values, scales, zeros
