"""Mixtures of experts in 16 bits and int8: a sort of rows by expert, one product for all, and the weighted sum."""

import functools
from collections.abc import Sequence
from typing import TypeGuard

import torch

from rtp_llm.srt.devices.cpu import memory
from rtp_llm.srt.devices.cpu.binding import INT, INT64, POINTER, Kernel, address, bind
from rtp_llm.srt.devices.cpu.linear import PANEL, Int8Panels, pack_bfloat16, pack_float16
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kernels.packed import ExpertsOfWeights, PackedExperts, PackedWeight

DTYPES = (torch.bfloat16, torch.float32)  # of rows that int8 multiplies, and of its biases
HALVES = {torch.bfloat16: "bf16", torch.float16: "f16"}  # of experts that are not quantized, with names of kernels


@functools.cache
def _function(name: str) -> Kernel:
    types = {
        "group_rows": (POINTER, INT64, INT64, POINTER, POINTER, POINTER),
        "gather_rows": (POINTER, INT64, POINTER, INT64, INT64, INT64, POINTER),
        "sum_rows": (POINTER, POINTER, POINTER, INT64, INT64, INT64, POINTER),
    }
    kernel = name.removesuffix("_bf16").removesuffix("_f16")
    return bind("moe", name, *types[kernel], result=INT if name == "group_rows" else None)


@functools.cache
def _grouped_gemm(name: str) -> Kernel:
    rows = (INT64, INT64, POINTER, INT64)  # x_stride, M, rows_per_group, groups
    plain = (POINTER, *rows, POINTER, INT64, INT64, POINTER, POINTER, INT64)
    of_bytes = (POINTER, INT, *rows, *(POINTER,) * 3, INT64, INT64, POINTER, INT, POINTER, INT64, INT)
    types = of_bytes if name == "int8" else plain
    return bind("gemm" if name == "bf16" else f"gemm_{name}", f"grouped_gemm_{name}", *types, result=INT)


class ExpertPanels(PackedExperts):
    """weight: [groups, N, K] bfloat16 or float16, a linear layer for each group of rows, each packed as in
    ``BFloat16Panels`` or ``Float16Panels``."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.num_groups, *shape = weight.shape
        self.shape, self.dtype = (shape[0], shape[1]), weight.dtype
        panels, units = -(-self.shape[0] // PANEL), -(-self.shape[1] // 2)
        self.packed = memory.weights.empty(self.num_groups, panels, units, 2 * PANEL, dtype=self.dtype)
        pack = pack_float16 if self.dtype == torch.float16 else pack_bfloat16
        for matrix, packed in zip(weight, self.packed, strict=True):
            pack(matrix, packed)

    def tensors(self) -> list[torch.Tensor]:
        return [self.packed]

    def apply(self, x: torch.Tensor, rows_per_expert: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As ``reference.grouped_linear``, for rows in the dtype of the weights."""
        if x.dtype != self.dtype or x.shape[1] != self.shape[1] or len(rows_per_expert) != self.num_groups:
            name = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"experts {[self.num_groups, *self.shape]} take {name} [rows, {self.shape[1]}] in {self.num_groups} "
                f"groups, not {x.dtype} {list(x.shape)} in {len(rows_per_expert)}"
            )
        x, bias = x.contiguous(), None if bias is None else bias.to(self.dtype).contiguous()
        out = memory.empty((x.shape[0], self.shape[0]), self.dtype)
        if not _grouped_gemm(HALVES[self.dtype])(
            x.data_ptr(), x.shape[1], x.shape[0], rows_per_expert.data_ptr(), self.num_groups, self.packed.data_ptr(),
            *self.shape, address(bias), out.data_ptr(), out.shape[1],
        ):  # fmt: skip
            raise ValueError(f"groups have {rows_per_expert.tolist()} rows, but x has {len(x)}")
        return out


class Int8Experts(ExpertsOfWeights):
    """The experts' own weights, all of one shape, multiplied in one call."""

    experts: Sequence[Int8Panels]

    def __init__(self, experts: Sequence[Int8Panels]) -> None:
        super().__init__(experts)
        pointers = [[tensor.data_ptr() for tensor in expert.tensors()] for expert in experts]
        self._packed, self._scales, self._totals = torch.tensor(pointers).t().contiguous()

    @staticmethod
    def are_alike(experts: Sequence[PackedWeight]) -> TypeGuard[Sequence[Int8Panels]]:
        """Whether a call can multiply these."""
        panels = [expert for expert in experts if isinstance(expert, Int8Panels)]
        return len(panels) == len(experts) and len({one.shape for one in panels}) == 1

    def apply(self, x: torch.Tensor, rows_per_expert: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype == torch.float16:
            return self.apply(x.float(), rows_per_expert, bias).half()
        num_outputs, num_inputs = self.experts[0].shape
        if x.dtype not in DTYPES or x.shape[1] != num_inputs or len(rows_per_expert) != len(self.experts):
            raise ValueError(
                f"experts {[len(self.experts), num_outputs, num_inputs]} take bfloat16 or float32 [rows, {num_inputs}] "
                f"in {len(self.experts)} groups, not {x.dtype} {list(x.shape)} in {len(rows_per_expert)}"
            )
        x = x.contiguous()
        if bias is not None:
            bias = (bias if bias.dtype in DTYPES else bias.float()).contiguous()
        out = memory.empty((len(x), num_outputs), x.dtype)
        is_float = x.dtype == torch.float32
        if len(x) and not _grouped_gemm("int8")(
            x.data_ptr(), is_float, num_inputs, len(x), rows_per_expert.data_ptr(), len(self.experts),
            self._packed.data_ptr(), self._scales.data_ptr(), self._totals.data_ptr(), num_outputs, num_inputs,
            address(bias), bias is not None and bias.dtype == torch.float32, out.data_ptr(), num_outputs, is_float,
        ):  # fmt: skip
            raise ValueError(f"groups have {rows_per_expert.tolist()} rows, but x has {len(x)}")
        return out


def group_rows(ids: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``reference.group_rows``.

    Raises:
        IndexError: an id is not in [0, num_groups).
    """
    if ids.dtype != torch.int64 or not ids.is_cpu:
        return reference.group_rows(ids, num_groups)
    ids = ids.contiguous()
    counts, order, places = torch.empty(num_groups, dtype=torch.int64), torch.empty_like(ids), torch.empty_like(ids)
    pointers = counts.data_ptr(), order.data_ptr(), places.data_ptr()
    if not _function("group_rows")(ids.data_ptr(), len(ids), num_groups, *pointers):
        raise IndexError(f"experts must be in [0, {num_groups}), not {int(ids.min())} to {int(ids.max())}")
    return counts, order, places


def gather_rows(x: torch.Tensor, order: torch.Tensor, repeats: int) -> torch.Tensor:
    if not x.is_cpu or x.stride(1) != 1:
        return reference.gather_rows(x, order, repeats)
    rows = memory.empty((len(order), x.shape[1]), x.dtype)
    size = x.element_size()
    _function("gather_rows")(
        x.data_ptr(), x.stride(0) * size, order.data_ptr(), len(order), repeats, x.shape[1] * size, rows.data_ptr()
    )
    return rows


def sum_rows(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if rows.dtype not in HALVES or not rows.is_cpu:
        return reference.sum_rows(rows, places, weights)
    rows, weights = rows.contiguous(), weights.float().contiguous()
    num_tokens, top_k = weights.shape
    out = memory.empty((num_tokens, rows.shape[1]), rows.dtype)
    _function(f"sum_rows_{HALVES[rows.dtype]}")(
        rows.data_ptr(), places.data_ptr(), weights.data_ptr(), num_tokens, top_k, rows.shape[1], out.data_ptr()
    )
    return out
