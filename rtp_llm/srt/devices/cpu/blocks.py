"""Weights in GGUF's blocks, packed for the products of gemm_blocks.cpp without another bit."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from rtp_llm.srt.devices.cpu import memory
from rtp_llm.srt.devices.cpu.binding import INT, INT64, POINTER, Kernel, bind
from rtp_llm.srt.devices.cpu.linear import PANEL, PanelWeight, refuse_ids
from rtp_llm.srt.kernels.blocks import BLOCK_TYPES
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


@functools.cache
def _function(name: str) -> Kernel:
    output = (POINTER, INT, POINTER, INT64, INT, INT)  # bias, bias_is_float, out, out_stride, out_is_float, gate
    types = {
        "pack_blocks": (INT, POINTER, INT64, INT64, POINTER),
        "rows_blocks": (INT, POINTER, POINTER, INT64, INT64, INT64, POINTER),
        "gemm_blocks": (INT, POINTER, INT, INT64, INT64, POINTER, INT64, INT64, *output),
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
        self.block_type, self._number = block_type, NUMBERS[block_type]
        self.packed = memory.weights.empty(self.num_panels, row_bytes * PANEL, dtype=torch.uint8)
        num_rows = -(-BYTES_AT_ONCE // (row_bytes * PANEL)) * PANEL
        for piece, packed in zip(blocks.split(num_rows), self.packed.split(num_rows // PANEL), strict=True):
            rows = piece.contiguous()
            _function("pack_blocks")(self._number, rows.data_ptr(), len(rows), num_inputs, packed.data_ptr())
            release(piece)

    def tensors(self) -> list[torch.Tensor]:
        return [self.packed]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int64 -> [..., K] float32, as ``dequantize_blocks`` gives it."""
        ids = ids.contiguous()
        out = torch.empty(*ids.shape, self.shape[1], dtype=torch.float32)
        if not _function("rows_blocks")(
            self._number, self.packed.data_ptr(), ids.data_ptr(), ids.numel(), *self.shape, out.data_ptr()
        ):
            refuse_ids(ids, self.shape[0])
        return out

    def _multiply(self, x: torch.Tensor, output: Sequence[Any]) -> None:
        if x.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"a weight in blocks multiplies bfloat16 or float32, not {x.dtype}")
        _function("gemm_blocks")(
            self._number, x.data_ptr(), x.dtype == torch.float32, x.stride(0), x.shape[0], self.packed.data_ptr(),
            *self.shape, *output,
        )  # fmt: skip
