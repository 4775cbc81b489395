"""Calls of ``attention.cpp`` and its likes for other dtypes: attention over a paged cache, and writes to that cache.

See ``reference.py``.
"""

import ctypes
import functools
from ctypes import c_double, c_int64, c_void_p

import torch

from rtp_llm.srt.devices.cpu import memory
from rtp_llm.srt.devices.cpu.binding import BOOL, POINTER, Kernel, bind, library_for
from rtp_llm.srt.kernels.paged import PagedRows

# Dtypes of activations and of the cache, numbered as in attention.cpp.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float16: 3}
# A model's dtype -> the dtypes that its cache may have.
STORED = {
    torch.float32: (torch.float32, torch.bfloat16, torch.int8),
    torch.bfloat16: (torch.bfloat16, torch.int8),
    torch.float16: (torch.float16, torch.int8),
}


def _structure(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_Attention = _structure(
    "Attention",
    q=c_void_p, q_token=c_int64, q_head=c_int64,
    keys=c_void_p, key_slot=c_int64, key_head=c_int64,
    values=c_void_p, value_slot=c_int64, value_head=c_int64,
    key_scales=c_void_p, value_scales=c_void_p, out=c_void_p,
    page_table=c_void_p, table_row=c_int64, page_size=c_int64,
    rows=c_void_p, starts=c_void_p, counts=c_void_p, num_rows=c_int64,
    shared=c_void_p, members=c_void_p, num_shared=c_int64,
    visible_ends=c_void_p, sinks=c_void_p, alibi_slopes=c_void_p,
    num_heads=c_int64, num_kv_heads=c_int64, head_dim=c_int64, v_head_dim=c_int64, window=c_int64, chunk=c_int64,
    scaling=c_double, logit_cap=c_double, activations=c_int64, stored=c_int64,
)  # fmt: skip

_Write = _structure(
    "Write",
    k=c_void_p, k_token=c_int64, k_head=c_int64, v=c_void_p, v_token=c_int64, v_head=c_int64,
    keys=c_void_p, values=c_void_p, key_scales=c_void_p, value_scales=c_void_p, slots=c_void_p,
    num_tokens=c_int64, num_kv_heads=c_int64, head_dim=c_int64, v_head_dim=c_int64,
    activations=c_int64, stored=c_int64,
)  # fmt: skip


@functools.cache
def _kernel(name: str, activations: torch.dtype) -> Kernel:
    return bind(library_for("attention", activations), name, POINTER, result=BOOL)


def paged_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    rows: PagedRows,
    scaling: float,
    window: int | None = None,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    visible_ends: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """See ``reference.paged_attention``. Shared prefixes are read once.

    Nothing is copied: heads and tokens of q, keys and values may have any stride; the last dimension is contiguous.
    """
    (num_tokens, num_heads, head_dim), (num_kv_heads, v_head_dim) = q.shape, values.shape[1:]
    _check(num_heads % num_kv_heads == 0, f"{num_heads} query heads for {num_kv_heads} key heads")
    _check(keys.shape[1:] == (num_kv_heads, head_dim), f"keys of shape {tuple(keys.shape)} for {num_kv_heads} heads")
    _check(keys.dtype == values.dtype, f"keys of {keys.dtype}, values of {values.dtype}")
    _check(q.stride(2) == keys.stride(2) == values.stride(2) == 1, "the last dimension must be contiguous")
    _check(page_table.dtype == torch.int32 and page_table.stride(1) == 1, "the page table must be int32")
    _check((key_scales is None) == (keys.dtype != torch.int8), "an int8 cache has scales, and no other has")
    out = memory.empty((num_tokens, num_heads, v_head_dim), q.dtype)
    sinks = None if sinks is None else sinks.float().contiguous()
    slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
    ends = None if visible_ends is None else visible_ends.contiguous()
    arguments = _Attention(
        q.data_ptr(), q.stride(0), q.stride(1),
        keys.data_ptr(), keys.stride(0), keys.stride(1),
        values.data_ptr(), values.stride(0), values.stride(1),
        _pointer(key_scales), _pointer(value_scales), out.data_ptr(),
        page_table.data_ptr(), page_table.stride(0), page_size,
        rows.table_rows.data_ptr(), rows.starts.data_ptr(), rows.counts.data_ptr(), rows.table_rows.shape[0],
        rows.shared.data_ptr(), rows.members.data_ptr(), rows.shared.shape[0],
        _pointer(ends), _pointer(sinks), _pointer(slopes),
        num_heads, num_kv_heads, head_dim, v_head_dim, window or 0, chunk or 0,
        scaling, logit_cap, DTYPES[q.dtype], DTYPES[keys.dtype],
    )  # fmt: skip
    _check(
        _kernel("paged_attention", q.dtype)(ctypes.byref(arguments)),
        f"a cache of {keys.dtype} for queries of {q.dtype}",
    )
    return out


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """See ``reference.write_kv``. Heads and tokens of k and v may have any stride."""
    num_tokens, num_kv_heads, head_dim = k.shape
    _check(keys.shape[1:] == (num_kv_heads, head_dim), f"{tuple(k.shape)} into a cache of {tuple(keys.shape)}")
    _check(keys.is_contiguous(), "the cache must be contiguous")
    k = k if k.stride(2) == 1 else k.contiguous()
    if v is not None:
        _check(v.shape == (num_tokens, *values.shape[1:]), f"{tuple(v.shape)} into a cache of {tuple(values.shape)}")
        _check(values.is_contiguous() and v.dtype == k.dtype, "values must be as keys are")
        v = v if v.stride(2) == 1 else v.contiguous()
    slots = slots.contiguous()
    arguments = _Write(
        k.data_ptr(), k.stride(0), k.stride(1),
        _pointer(v), 0 if v is None else v.stride(0), 0 if v is None else v.stride(1),
        keys.data_ptr(), values.data_ptr(), _pointer(key_scales), _pointer(value_scales), slots.data_ptr(),
        num_tokens, num_kv_heads, head_dim, values.shape[2],
        DTYPES[k.dtype], DTYPES[keys.dtype],
    )  # fmt: skip
    _check(_kernel("write_kv", k.dtype)(ctypes.byref(arguments)), f"{k.dtype} into a cache of {keys.dtype}")


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(f"the attention kernel cannot take this: {problem}")
