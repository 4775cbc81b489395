"""Weights of linear layers packed for the products of gemm.cpp, gemm_int8.cpp, gemm_f16.cpp and gemm_f32.cpp.

A packed weight represents a matrix [N, K]. ``apply(x, bias)`` is ``x @ weight.T + bias``; ``rows(ids)`` unpacks rows,
so that a vocabulary table that is also the head is stored once.
"""

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from rtp_llm.srt.devices.cpu import memory
from rtp_llm.srt.devices.cpu.binding import INT, INT64, POINTER, Kernel, address, bind
from rtp_llm.srt.kernels.packed import PackedWeight

PANEL = 32  # outputs that are packed together, as in gemm.cpp
# Activations within a product, numbered as in gemm_tiles.h.
GATED = {"silu_and_mul": 1, "gelu_tanh_and_mul": 2}
ACTIVATIONS = {**GATED, "gelu": 3}


@functools.cache
def _function(name: str) -> Kernel:
    output = (POINTER, INT, POINTER, INT64, INT, INT)  # bias, bias_is_float, out, out_stride, out_is_float, activation
    types = {
        "pack_bf16": (POINTER, INT64, INT64, INT64, POINTER),
        "rows_bf16": (POINTER, POINTER, INT64, INT64, INT64, POINTER),
        "gemm_bf16": (POINTER, INT64, INT64, POINTER, INT64, INT64, *output),
        "pack_f16": (POINTER, INT64, INT64, INT64, POINTER),
        "rows_f16": (POINTER, POINTER, INT64, INT64, INT64, POINTER),
        "gemm_f16": (POINTER, INT64, INT64, POINTER, INT64, INT64, *output),
        "pack_f32": (POINTER, INT64, INT64, INT64, POINTER),
        "rows_f32": (POINTER, POINTER, INT64, INT64, INT64, POINTER),
        "gemm_f32": (POINTER, INT64, INT64, POINTER, INT64, INT64, *output),
        "pack_int8": (POINTER, INT64, INT64, POINTER, POINTER),
        "rows_int8": (POINTER, POINTER, POINTER, INT64, INT64, INT64, POINTER, INT),
        "gemm_int8": (POINTER, INT, INT64, INT64, POINTER, POINTER, POINTER, INT64, INT64, *output),
    }
    kind = name.rpartition("_")[2]
    library = "gemm" if kind == "bf16" else f"gemm_{kind}"
    return bind(library, name, *types[name], result=INT if name.startswith("rows") else None)


class PanelWeight(PackedWeight):
    """Base of the packed forms: outputs are packed together in panels.

    Attributes:
        half: the dtype that rows, results and biases may have beside float32, of 16 bits but for float32 weights.
        instead_of_float16: what float16 rows become; None: such rows are no other.
    """

    half = torch.bfloat16
    instead_of_float16: torch.dtype | None = torch.float32

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.num_panels = -(-shape[0] // PANEL)

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    def apply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        activation: str = "",
    ) -> torch.Tensor:
        """[..., K] -> [..., N] in ``out_dtype`` (``half`` or float32; None: x's). With an ``activation``, for which
        ``ends_in`` must be true: equal to the kernel of that name after the product, [..., N / 2] if it is gated.
        Float16 rows of quantized weights, and their results, are converted: then the activation is rounded once."""
        if x.dtype == torch.float16 and self.instead_of_float16 is not None:
            out = self.apply(x.to(self.instead_of_float16), bias, torch.float32, activation)
            return out.to(out_dtype or torch.float16)
        inputs = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        num_outputs = self.shape[0] // 2 if activation in GATED else self.shape[0]
        out = self.empty_result(inputs, num_outputs, out_dtype or x.dtype)
        self.apply_into(inputs, out, bias, activation)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], num_outputs)

    def apply_into(
        self, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None, activation: str = ""
    ) -> None:
        num_rows, num_inputs = x.shape
        if num_inputs != self.shape[1]:
            raise ValueError(
                f"a product with a weight of {list(self.shape)} takes {self.shape[1]} inputs, not {num_inputs}"
            )
        if activation and not self.ends_in(activation):
            raise ValueError(f"a product with a weight of {list(self.shape)} cannot end in {activation!r}")
        if x.stride(1) != 1 and num_inputs > 1:
            x = x.contiguous()
        if x.dtype == torch.float16 and self.instead_of_float16 is not None:
            out.copy_(self.apply(x, bias, out.dtype, activation))
            return
        if bias is not None and bias.dtype not in (torch.float32, self.half):
            bias = bias.float()
        if num_rows:
            is_float = bias is not None and bias.dtype == torch.float32
            output = (
                address(bias), is_float, out.data_ptr(), out.stride(0), out.dtype == torch.float32,
                ACTIVATIONS[activation] if activation else 0,
            )  # fmt: skip
            self._multiply(x, output)

    def empty_result(self, x: torch.Tensor, num_outputs: int, dtype: torch.dtype) -> torch.Tensor:
        return memory.empty((len(x), num_outputs), dtype)

    def ends_in(self, activation: str) -> bool:
        """Whether a product can end in this activation, without another pass over memory."""
        return activation in ACTIVATIONS and (activation not in GATED or self.shape[0] % (2 * PANEL) == 0)

    def apply_activated(self, x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        return self.apply(x, bias, activation=activation)

    @abstractmethod
    def _multiply(self, x: torch.Tensor, output: Sequence[Any]) -> None:
        """``output``: the last arguments of every product in gemm.cpp."""


def pack_bfloat16(weight: torch.Tensor, packed: torch.Tensor) -> None:
    """Pack [N, K], whose last dimension is contiguous, into [ceil(N / PANEL), ceil(K / 2), 2 * PANEL]."""
    if weight.dtype != torch.bfloat16 or weight.stride(1) != 1:
        raise ValueError(f"expected contiguous rows in bfloat16, not {weight.dtype} of strides {weight.stride()}")
    _function("pack_bf16")(weight.data_ptr(), weight.stride(0), *weight.shape, packed.data_ptr())


def pack_float16(weight: torch.Tensor, packed: torch.Tensor) -> None:
    """Pack [N, K], whose last dimension is contiguous, into [ceil(N / PANEL), ceil(K / 2), 2 * PANEL]."""
    if weight.dtype != torch.float16 or weight.stride(1) != 1:
        raise ValueError(f"expected contiguous rows in float16, not {weight.dtype} of strides {weight.stride()}")
    _function("pack_f16")(weight.data_ptr(), weight.stride(0), *weight.shape, packed.data_ptr())


class BFloat16Panels(PanelWeight):
    """weight: [N, K] bfloat16, whose last dimension is contiguous."""

    instead_of_float16 = None

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        self.packed = memory.weights.empty(self.num_panels, -(-self.shape[1] // 2), PANEL, 2, dtype=torch.bfloat16)
        pack_bfloat16(weight, self.packed)

    def tensors(self) -> list[torch.Tensor]:
        return [self.packed]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int64 -> [..., K] bfloat16."""
        ids = ids.contiguous()
        out = torch.empty(*ids.shape, self.shape[1], dtype=torch.bfloat16)
        if not _function("rows_bf16")(self.packed.data_ptr(), ids.data_ptr(), ids.numel(), *self.shape, out.data_ptr()):
            refuse_ids(ids, self.shape[0])
        return out

    def _multiply(self, x: torch.Tensor, output: Sequence[Any]) -> None:
        if x.dtype != torch.bfloat16:
            raise ValueError(f"a bfloat16 weight multiplies bfloat16, not {x.dtype}")
        _function("gemm_bf16")(x.data_ptr(), x.stride(0), x.shape[0], self.packed.data_ptr(), *self.shape, *output)


class NumberPanels(PanelWeight):
    """weight: [N, K] of ``half``, whose last dimension is contiguous; multiplied in float32. See gemm_numbers.h."""

    instead_of_float16 = None
    suffix: str  # of its kernels' names

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        if weight.dtype != self.half or weight.stride(1) != 1:
            raise ValueError(
                f"expected contiguous rows in {self.half}, not {weight.dtype} of strides {weight.stride()}"
            )
        self.packed = memory.weights.empty(self.num_panels, -(-self.shape[1] // 2), 2, 2, PANEL // 2, dtype=self.half)
        self._function("pack")(weight.data_ptr(), weight.stride(0), *self.shape, self.packed.data_ptr())

    def _function(self, verb: str) -> Kernel:
        return _function(f"{verb}_{self.suffix}")

    def tensors(self) -> list[torch.Tensor]:
        return [self.packed]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int64 -> [..., K] of ``half``."""
        ids = ids.contiguous()
        out = torch.empty(*ids.shape, self.shape[1], dtype=self.half)
        if not self._function("rows")(self.packed.data_ptr(), ids.data_ptr(), ids.numel(), *self.shape, out.data_ptr()):
            refuse_ids(ids, self.shape[0])
        return out

    def _multiply(self, x: torch.Tensor, output: Sequence[Any]) -> None:
        if x.dtype != self.half:
            raise ValueError(f"a weight of {self.half} multiplies the same, not {x.dtype}")
        self._function("gemm")(x.data_ptr(), x.stride(0), x.shape[0], self.packed.data_ptr(), *self.shape, *output)


class Float16Panels(NumberPanels):
    """weight: [N, K] float16."""

    half = torch.float16
    suffix = "f16"


class Float32Panels(NumberPanels):
    """weight: [N, K] float32."""

    half = torch.float32
    suffix = "f32"


class Int8Panels(PanelWeight):
    """weight: [N, K] int8, times scales: [N] float32. Rows of x are quantized to int8 too, each with its scale."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        weight = weight.contiguous()
        rows, inputs = self.shape
        self.packed = memory.weights.empty(self.num_panels, -(-inputs // 4), PANEL, 4, dtype=torch.int8)
        self.totals = torch.empty(self.num_panels * PANEL, dtype=torch.int32)
        self.scales = torch.zeros(self.num_panels * PANEL, dtype=torch.float32)
        self.scales[:rows] = scales
        _function("pack_int8")(weight.data_ptr(), rows, inputs, self.packed.data_ptr(), self.totals.data_ptr())

    def tensors(self) -> list[torch.Tensor]:
        return [self.packed, self.scales, self.totals]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int64 -> [..., K] float32, weights times scales."""
        return self.rows_in(ids, torch.float32)

    def rows_in(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in (torch.float32, torch.bfloat16):
            return super().rows_in(ids, dtype)
        ids = ids.contiguous()
        out = torch.empty(*ids.shape, self.shape[1], dtype=dtype)
        if not _function("rows_int8")(
            self.packed.data_ptr(), self.scales.data_ptr(), ids.data_ptr(), ids.numel(), *self.shape, out.data_ptr(),
            dtype == torch.float32,
        ):  # fmt: skip
            refuse_ids(ids, self.shape[0])
        return out

    def _multiply(self, x: torch.Tensor, output: Sequence[Any]) -> None:
        _function("gemm_int8")(
            x.data_ptr(), x.dtype == torch.float32, x.stride(0), x.shape[0], self.packed.data_ptr(),
            self.scales.data_ptr(), self.totals.data_ptr(), *self.shape, *output,
        )  # fmt: skip


def refuse_ids(ids: torch.Tensor, num_rows: int) -> NoReturn:
    raise IndexError(f"ids must be in [0, {num_rows}), not {int(ids.min())} to {int(ids.max())}")
