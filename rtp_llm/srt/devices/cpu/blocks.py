"""Weights in blocks, packed for the products of gemm_blocks.cpp without another bit: GGUF's, and groups of 4 bits."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F

from rtp_llm.srt.devices.cpu import memory
from rtp_llm.srt.devices.cpu.binding import INT, INT64, POINTER, Kernel, address, bind
from rtp_llm.srt.devices.cpu.linear import PANEL, PanelWeight, refuse_ids
from rtp_llm.srt.kernels.blocks import BLOCK_TYPES
from rtp_llm.srt.kernels.packed import ExpertsOfWeights, PackedWeight
from rtp_llm.srt.models.mapped_pages import release

BYTES_AT_ONCE = 1 << 24  # of a file that are packed, and then need not stay in memory


class Layout(NamedTuple):
    """A type of blocks of gemm_blocks.cpp: its number there, and the inputs and bytes of a block."""

    number: int
    num_values: int
    num_bytes: int


# GGUF's, by ggml's numbers.
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
LAYOUTS = {
    name: Layout(number, BLOCK_TYPES[name].num_values, BLOCK_TYPES[name].num_bytes) for name, number in NUMBERS.items()
} | {  # our own, by the inputs of a group; Q4_0 is that of 32 without zeros
    "INT4_16_ZEROS": Layout(1000, 32, 22),
    "INT4_32_ZEROS": Layout(1001, 32, 19),
    "INT4_128": Layout(1002, 128, 66),
    "INT4_128_ZEROS": Layout(1003, 128, 67),
}

DTYPES = (torch.bfloat16, torch.float32)  # of rows
NOTHING = 1e-12  # a scale


@functools.cache
def _function(name: str) -> Kernel:
    rows = (POINTER, INT, INT64, INT64)  # x, x_is_float, x_stride, M
    output = (POINTER, INT, POINTER, INT64, INT)  # bias, bias_is_float, out, out_stride, out_is_float
    types = {
        "pack_blocks": (INT, POINTER, INT64, INT64, POINTER),
        "rows_blocks": (INT, POINTER, POINTER, INT64, INT64, INT64, POINTER, INT),
        "gemm_blocks": (INT, *rows, POINTER, INT64, INT64, *output, INT),  # and the gate
        "grouped_gemm_blocks": (INT, *rows, POINTER, INT64, POINTER, INT64, INT64, *output),
    }
    return bind("gemm_blocks", name, *types[name], result=INT)


class BlockPanels(PanelWeight):
    """blocks: [N, bytes per row] uint8, of a type of LAYOUTS. It takes their memory, with N rounded up to whole panels.
    Rows of x are quantized to int8, each 32 inputs with their scale. The last block may have more inputs than there
    are."""

    def __init__(self, blocks: torch.Tensor, block_type: str, num_inputs: int) -> None:
        super().__init__((blocks.shape[0], num_inputs))
        layout = LAYOUTS[block_type]
        num_blocks = -(-num_inputs // layout.num_values)
        row_bytes, self._padded = num_blocks * layout.num_bytes, num_blocks * layout.num_values
        if blocks.dtype != torch.uint8 or blocks.shape[1:] != (row_bytes,):
            raise ValueError(
                f"{num_inputs} inputs in {block_type} are rows of {row_bytes} uint8 in blocks of {layout.num_values} "
                f"inputs, not {blocks.dtype} {list(blocks.shape)}"
            )
        self.block_type, self.number = block_type, layout.number
        self.packed = memory.weights.empty(self.num_panels, row_bytes * PANEL, dtype=torch.uint8)
        num_rows = -(-BYTES_AT_ONCE // (row_bytes * PANEL)) * PANEL
        for piece, packed in zip(blocks.split(num_rows), self.packed.split(num_rows // PANEL), strict=True):
            rows = piece.contiguous()
            _function("pack_blocks")(self.number, rows.data_ptr(), len(rows), self._padded, packed.data_ptr())
            release(piece)

    def tensors(self) -> list[torch.Tensor]:
        return [self.packed]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int64 -> [..., K] float32, as ``dequantize_blocks`` gives it."""
        return self.rows_in(ids, torch.float32)

    def rows_in(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in DTYPES:
            return super().rows_in(ids, dtype)
        ids = ids.contiguous()
        out = torch.empty(*ids.shape, self._padded, dtype=dtype)
        if not _function("rows_blocks")(
            self.number, self.packed.data_ptr(), ids.data_ptr(), ids.numel(), self.shape[0], self._padded,
            out.data_ptr(), dtype == torch.float32,
        ):  # fmt: skip
            refuse_ids(ids, self.shape[0])
        return out[..., : self.shape[1]]

    def _multiply(self, x: torch.Tensor, output: Sequence[Any]) -> None:
        if x.dtype not in DTYPES:
            raise ValueError(f"a weight in blocks multiplies bfloat16 or float32, not {x.dtype}")
        _function("gemm_blocks")(
            self.number, x.data_ptr(), x.dtype == torch.float32, x.stride(0), x.shape[0], self.packed.data_ptr(),
            *self.shape, *output,
        )  # fmt: skip


def int4_panels(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int
) -> BlockPanels | None:
    """Pack what ``reference.dequantize_int4`` takes; None: groups or scales are not of a kind that blocks can have.

    Groups are of 16 inputs or a multiple of 32, or one is for all. Scales are kept in float16.
    """
    num_inputs = 2 * weight.shape[1]
    size = group_size if group_size < num_inputs else -(-num_inputs // 32) * 32
    in_block = next((block for block in (128, 32, 16) if size % block == 0), 0)
    if in_block == 0 or (in_block == 16 and size != 16) or not _fit_float16(scales):
        return None
    if zeros is None and in_block == 16:
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    name = f"INT4_{in_block}{'' if zeros is None else '_ZEROS'}"
    block_type = name if name in LAYOUTS else "Q4_0"
    num_values = LAYOUTS[block_type].num_values
    num_blocks = -(-num_inputs // num_values)

    def by_block(table: torch.Tensor) -> torch.Tensor:
        """[N, groups] -> [N, blocks, groups of a block]."""
        table = table.repeat_interleave(size // in_block, dim=1)[:, : -(-num_inputs // in_block)]
        padded = F.pad(table, (0, num_blocks * num_values // in_block - table.shape[1]))
        return padded.unflatten(1, (num_blocks, -1)).contiguous()

    levels = F.pad(weight, (0, num_blocks * num_values // 2 - weight.shape[1])).view(len(weight), num_blocks, -1, 2, 8)
    low, high = levels.unbind(-2)  # the first 16 inputs of 32, and the others; two in a byte
    halves = torch.stack(((low & 15) | high << 4, (low >> 4) | (high & 240)), dim=-1).flatten(2)
    heads = [by_block(scales.half()).view(torch.uint8), *([] if zeros is None else [by_block(zeros)])]
    return BlockPanels(torch.cat((*heads, halves), dim=-1).flatten(1), block_type, num_inputs)


def _fit_float16(scales: torch.Tensor) -> bool:
    """Whether rounding changes none by more than 1/1024 of its output's largest, or its output is nothing."""
    largest = scales.abs().amax(dim=1, keepdim=True)
    return not bool(((scales.half().float() - scales).abs() > largest / 1024 + NOTHING).any())


class BlockExperts(ExpertsOfWeights):
    """The experts' own weights, all of one shape and type, multiplied in one call."""

    experts: Sequence[BlockPanels]

    def __init__(self, experts: Sequence[BlockPanels]) -> None:
        super().__init__(experts)
        self._pointers = torch.tensor([expert.packed.data_ptr() for expert in experts], dtype=torch.int64)

    @staticmethod
    def are_alike(experts: Sequence[PackedWeight]) -> TypeGuard[Sequence[BlockPanels]]:
        """Whether a call can multiply these."""
        panels = [expert for expert in experts if isinstance(expert, BlockPanels)]
        return len(panels) == len(experts) and len({(one.shape, one.block_type) for one in panels}) == 1

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
        if len(x) and not _function("grouped_gemm_blocks")(
            self.experts[0].number, x.data_ptr(), is_float, num_inputs, len(x), rows_per_expert.data_ptr(),
            len(self.experts), self._pointers.data_ptr(), num_outputs, num_inputs, address(bias),
            bias is not None and bias.dtype == torch.float32, out.data_ptr(), num_outputs, is_float,
        ):  # fmt: skip
            raise ValueError(f"groups have {rows_per_expert.tolist()} rows, but x has {len(x)}")
        return out
