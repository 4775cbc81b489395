"""Norms, gated activations and rotations in C++. Other dtypes or devices go to plain torch (``reference``).

A kernel reads rows with strides: queries and keys are slices of a projection's output, and are not copied.
"""

import functools
from typing import Any

import torch

from rtp_llm.srt.devices.cpu import memory
from rtp_llm.srt.devices.cpu.binding import FLOAT, INT, INT64, POINTER, Kernel, bind, library_for
from rtp_llm.srt.kernels import reference

_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_NORM = (*(POINTER,) * 6, *(INT64,) * 6, FLOAT)
_GATED = (POINTER, POINTER, INT64, INT64, INT64)
_HEADS = (POINTER, POINTER, *(INT64,) * 5)
_ANGLES = (POINTER, POINTER, INT64, INT64, INT64, INT)
_ARGTYPES: dict[str, tuple[Any, ...]] = {
    "rms_norm": _NORM,
    "gemma_rms_norm": _NORM,
    "layer_norm": _NORM,
    "silu_and_mul": _GATED,
    "gelu_and_mul": _GATED,
    "gelu_tanh_and_mul": _GATED,
    "swiglu_oai_and_mul": (*_GATED, FLOAT, FLOAT),
    "rms_norm_rotary": (*_HEADS, *_HEADS, POINTER, POINTER, FLOAT, *_ANGLES),
    "gemma_rms_norm_rotary": (*_HEADS, *_HEADS, POINTER, POINTER, FLOAT, *_ANGLES),
    "rotary": (*_HEADS, *_HEADS, *_ANGLES),
}


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Kernel:
    return bind(library_for("elementwise", dtype), f"{name}_{_SUFFIXES[dtype]}", *_ARGTYPES[name])


def _fits(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether all are on the CPU and of one dtype that kernels support."""
    dtype = x.dtype
    if dtype not in _SUFFIXES or not x.is_cpu:
        return False
    return all(other is None or (other.dtype is dtype and other.is_cpu) for other in others)


# Norms


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _norm("rms_norm", x, weight, None, eps) if _fits(x, weight) else reference.rms_norm(x, weight, eps)


def gemma_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if not _fits(x, weight):
        return reference.gemma_rms_norm(x, weight, eps)
    return _norm("gemma_rms_norm", x, weight, None, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    if not _fits(x, weight, bias):
        return reference.layer_norm(x, weight, bias, eps)
    return _norm("layer_norm", x, weight, bias, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _fits(x, residual, weight) or x.shape != residual.shape:
        return reference.add_rms_norm(x, residual, weight, eps)
    return _add_norm("rms_norm", x, residual, weight, None, eps)


def add_gemma_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _fits(x, residual, weight) or x.shape != residual.shape:
        return reference.add_gemma_rms_norm(x, residual, weight, eps)
    return _add_norm("gemma_rms_norm", x, residual, weight, None, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _fits(x, residual, weight, bias) or x.shape != residual.shape:
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    return _add_norm("layer_norm", x, residual, weight, bias, eps)


def _norm(name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    size = _norm_size(x, weight)
    if x.stride(-1) != 1 or x.dim() not in (2, 3):
        x = x.contiguous()
        outer, inner, strides = x.numel() // size, 1, (size, size)
    elif x.dim() == 3:
        outer, inner, strides = x.shape[0], x.shape[1], (x.stride(0), x.stride(1))
    else:
        outer, inner, strides = x.shape[0], 1, (x.stride(0), 0)
    y = memory.empty(x.shape, x.dtype)
    bias_at = None if bias is None else bias.data_ptr()
    _function(name, x.dtype)(
        x.data_ptr(), None, weight.data_ptr(), bias_at, y.data_ptr(), None, outer, inner, *strides, 0, size, eps
    )
    return y


def _add_norm(
    name: str, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    size = _norm_size(x, weight)
    x, residual = x.contiguous(), residual.contiguous()
    y, added = memory.empty(x.shape, x.dtype), memory.empty(x.shape, x.dtype)
    bias_at = None if bias is None else bias.data_ptr()
    _function(name, x.dtype)(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), bias_at, y.data_ptr(), added.data_ptr(),
        x.numel() // size, 1, size, size, size, size, eps,
    )  # fmt: skip
    return y, added


def _norm_size(x: torch.Tensor, weight: torch.Tensor) -> int:
    size = x.shape[-1]
    if weight.shape != (size,) or not weight.is_contiguous():
        raise ValueError(f"the weight of a norm of {list(x.shape)} must be [{size}], not {list(weight.shape)}")
    return size


# Gated activations


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return _gated("silu_and_mul", x) if _fits(x) else reference.silu_and_mul(x)


def gelu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return _gated("gelu_and_mul", x) if _fits(x) else reference.gelu_and_mul(x)


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    return _gated("gelu_tanh_and_mul", x) if _fits(x) else reference.gelu_tanh_and_mul(x)


def swiglu_oai_and_mul(x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    if not _fits(x):
        return reference.swiglu_oai_and_mul(x, alpha, limit)
    return _gated("swiglu_oai_and_mul", x, alpha, limit)


def _gated(name: str, x: torch.Tensor, *constants: float) -> torch.Tensor:
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"a gated activation needs as many gates as values, but x is {list(x.shape)}")
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, width).contiguous()
    y = memory.empty((*x.shape[:-1], width // 2), x.dtype)
    _function(name, x.dtype)(rows.data_ptr(), y.data_ptr(), rows.shape[0], width // 2, rows.stride(0), *constants)
    return y


# Rotary positions


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox_style: bool) -> torch.Tensor:
    return rotary_pair(x, x[:, :0], cos, sin, is_neox_style)[0]


def rotary_pair(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox_style: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _fits(q, k, cos, sin) or q.stride(2) != 1 or k.stride(2) != 1:
        return reference.rotary_pair(q, k, cos, sin, is_neox_style)
    q_out, k_out = memory.empty(q.shape, q.dtype), memory.empty(k.shape, k.dtype)
    _rotate("rotary", q, q_out, k, k_out, cos, sin, is_neox_style)
    return q_out, k_out


def norm_rotary_pair(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox_style: bool,
    is_gemma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _fits(q, k, *weights, cos, sin) or q.stride(2) != 1 or k.stride(2) != 1:
        return reference.norm_rotary_pair(q, k, weights, eps, cos, sin, is_neox_style, is_gemma)
    q_out, k_out = memory.empty(q.shape, q.dtype), memory.empty(k.shape, k.dtype)
    for x, weight in zip((q, k), weights, strict=True):
        _norm_size(x, weight)
    norms = weights[0].data_ptr(), weights[1].data_ptr(), eps
    name = "gemma_rms_norm_rotary" if is_gemma else "rms_norm_rotary"
    _rotate(name, q, q_out, k, k_out, cos, sin, is_neox_style, norms)
    return q_out, k_out


def rotary_pair_(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox_style: bool) -> None:
    """``rotary_pair`` in place, without a fallback.

    Raises:
        ValueError: kernels do not support the dtype or device, or a head's components are not contiguous.
    """
    if not _fits(q, k, cos, sin) or q.stride(2) != 1 or k.stride(2) != 1:
        raise ValueError(f"cannot rotate {q.dtype} queries and {k.dtype} keys by {cos.dtype} cosines in place")
    _rotate("rotary", q, q, k, k, cos, sin, is_neox_style)


def _rotate(
    name: str,
    q: torch.Tensor,
    q_out: torch.Tensor,
    k: torch.Tensor,
    k_out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox_style: bool,
    norms: tuple[int, int, float] | tuple[()] = (),
) -> None:
    num_tokens, half = cos.shape
    head_size = q.shape[2]
    if q.shape[0] != num_tokens or k.shape[0] != num_tokens or k.shape[2] != head_size or 2 * half > head_size:
        raise ValueError(
            f"cosines {list(cos.shape)} do not go with queries {list(q.shape)} and keys {list(k.shape)}, "
            f"[tokens, heads, head size]"
        )
    _function(name, q.dtype)(
        *_heads(q, q_out), *_heads(k, k_out), *norms, cos.contiguous().data_ptr(), sin.contiguous().data_ptr(),
        num_tokens, half, head_size, is_neox_style,
    )  # fmt: skip


def _heads(x: torch.Tensor, y: torch.Tensor) -> tuple[int, ...]:
    return x.data_ptr(), y.data_ptr(), x.shape[1], x.stride(0), x.stride(1), y.stride(0), y.stride(1)
