"""Weights in GGUF's blocks, packed for the products of gemm_blocks.cpp without another bit."""

import functools
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch

from rtp_llm.srt.devices.cpu import memory
from rtp_llm.srt.devices.cpu.binding import INT, INT64, POINTER, Kernel, address, bind
from rtp_llm.srt.devices.cpu.linear import PANEL, PanelWeight, refuse_ids
from rtp_llm.srt.kernels.blocks import BLOCK_TYPES
from rtp_llm.srt.kernels.packed import PackedExperts, PackedWeight
from rtp_llm.srt.models.mapped_pages import release

BYTES_AT_ONCE = 1 << 24  # of a file that are packed, and then need not stay in memory
# Those that gemm_blocks.cpp has, by ggml's numbers.
NUMBERS = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "MXFP4": 39,
}

DTYPES = (torch.bfloat16, torch.float32)  # of rows


@functools.cache
def _function(name: str) -> Kernel:
    rows = (POINTER, INT, INT64, INT64)  # x, x_is_float, x_stride, M
    output = (POINTER, INT, POINTER, INT64, INT)  # bias, bias_is_float, out, out_stride, out_is_float
    types = {
        "pack_blocks": (INT, POINTER, INT64, INT64, POINTER),
        "rows_blocks": (INT, POINTER, POINTER, INT64, INT64, INT64, POINTER),
        "gemm_blocks": (INT, *rows, POINTER, INT64, INT64, *output, INT),  # and the gate
        "grouped_gemm_blocks": (INT, *rows, POINTER, INT64, POINTER, INT64, INT64, *output),
    }
    return bind("gemm_blocks", name, *types[name], result=INT)


class BlockPanels(PanelWeight):
    """blocks: [N, bytes per row] uint8, of a type of NUMBERS. It takes their memory, with N rounded up to whole panels.
    Rows of x are quantized to int8, each 32 inputs with their scale."""

    def __init__(self, blocks: torch.Tensor, block_type: str, num_inputs: int) -> None:
        super().__init__((blocks.shape[0], num_inputs))
        layout = BLOCK_TYPES[block_type]
        row_bytes = layout.row_bytes(num_inputs)
        if blocks.dtype != torch.uint8 or blocks.shape[1:] != (row_bytes,) or num_inputs % layout.num_values:
            raise ValueError(
                f"{num_inputs} inputs in {block_type} are rows of {row_bytes} uint8 in whole blocks of "
                f"{layout.num_values} inputs, not {blocks.dtype} {list(blocks.shape)}"
            )
        self.block_type, self.number = block_type, NUMBERS[block_type]
        self.packed = memory.weights.empty(self.num_panels, row_bytes * PANEL, dtype=torch.uint8)
        num_rows = -(-BYTES_AT_ONCE // (row_bytes * PANEL)) * PANEL
        for piece, packed in zip(blocks.split(num_rows), self.packed.split(num_rows // PANEL), strict=True):
            rows = piece.contiguous()
            _function("pack_blocks")(self.number, rows.data_ptr(), len(rows), num_inputs, packed.data_ptr())
            release(piece)

    def tensors(self) -> list[torch.Tensor]:
        return [self.packed]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int64 -> [..., K] float32, as ``dequantize_blocks`` gives it."""
        ids = ids.contiguous()
        out = torch.empty(*ids.shape, self.shape[1], dtype=torch.float32)
        if not _function("rows_blocks")(
            self.number, self.packed.data_ptr(), ids.data_ptr(), ids.numel(), *self.shape, out.data_ptr()
        ):
            refuse_ids(ids, self.shape[0])
        return out

    def _multiply(self, x: torch.Tensor, output: Sequence[Any]) -> None:
        if x.dtype not in DTYPES:
            raise ValueError(f"a weight in blocks multiplies bfloat16 or float32, not {x.dtype}")
        _function("gemm_blocks")(
            self.number, x.data_ptr(), x.dtype == torch.float32, x.stride(0), x.shape[0], self.packed.data_ptr(),
            *self.shape, *output,
        )  # fmt: skip


class BlockExperts(PackedExperts):
    """The experts' own weights, all of one shape and type, multiplied in one call."""

    def __init__(self, experts: Sequence[BlockPanels]) -> None:
        self.experts = experts
        self._pointers = torch.tensor([expert.packed.data_ptr() for expert in experts], dtype=torch.int64)

    @staticmethod
    def are_alike(experts: Sequence[PackedWeight]) -> TypeGuard[Sequence[BlockPanels]]:
        """Whether a call can multiply these."""
        panels = [expert for expert in experts if isinstance(expert, BlockPanels)]
        return len(panels) == len(experts) and len({(one.shape, one.block_type) for one in panels}) == 1

    def apply(self, x: torch.Tensor, rows_per_expert: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
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
        if len(x) and not _function("grouped_gemm_blocks")(
            self.experts[0].number, x.data_ptr(), is_float, num_inputs, len(x), rows_per_expert.data_ptr(),
            len(self.experts), self._pointers.data_ptr(), num_outputs, num_inputs, address(bias),
            bias is not None and bias.dtype == torch.float32, out.data_ptr(), num_outputs, is_float,
        ):  # fmt: skip
            raise ValueError(f"groups have {rows_per_expert.tolist()} rows, but x has {len(x)}")
        return out

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for expert in self.experts for tensor in expert.tensors()]
