"""Weights that are codes of 4 or 8 bits, packed for the products of gemm_codes.cpp: fp8, tables, integers."""

import enum
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F

from rtp_llm.srt.devices.cpu import memory
from rtp_llm.srt.devices.cpu.binding import INT, INT64, POINTER, Kernel, address, bind
from rtp_llm.srt.devices.cpu.linear import PANEL, PanelWeight, refuse_ids

LANE = 4  # outputs, and inputs, that are packed together
MULTIPLE = 8  # of inputs in a group


class Codes(enum.IntEnum):
    """What codes stand for, numbered as in gemm_codes.cpp."""

    E4M3 = 0  # float8_e4m3fn
    TABLE = 1  # 4 bits: one of 16 numbers
    INT8 = 2


@functools.cache
def _function(name: str) -> Kernel:
    output = (POINTER, INT, POINTER, INT64, INT, INT)  # bias, bias_is_float, out, out_stride, out_is_float, gate
    types = {
        "pack_codes": (POINTER, INT64, INT64, INT, POINTER),
        "gemm_codes": (
            POINTER, INT64, INT64, POINTER, INT, POINTER, POINTER, INT, INT64, INT64, INT64, *output,
        ),
    }  # fmt: skip
    return bind("gemm_codes", name, *types[name])


class CodePanels(PanelWeight):
    """codes: [N, K] uint8; the weight is what a code stands for, times the scale of its output and group of inputs.

    scales: [N, ceil(K / group_size)] float32, of groups of ``group_size`` neighbouring inputs, the last one perhaps
    shorter. ``group_size`` is a multiple of 8, or all K. table: [16] numbers of codes of 4 bits, rounded to bfloat16.
    Products are of bfloat16, with sums in float32.
    """

    instead_of_float16 = torch.bfloat16

    def __init__(
        self,
        kind: Codes,
        codes: torch.Tensor,
        scales: torch.Tensor,
        group_size: int,
        table: torch.Tensor | None = None,
    ) -> None:
        super().__init__((codes.shape[0], codes.shape[1]))
        rows, inputs = self.shape
        groups = -(-inputs // group_size)
        if scales.shape != (rows, groups) or not takes_groups(inputs, group_size):
            raise ValueError(
                f"groups must be of a multiple of {MULTIPLE} inputs, with scales of {[rows, groups]}, not of "
                f"{group_size} with {list(scales.shape)}"
            )
        self.kind = kind
        self.group_size = group_size if groups > 1 else -(-inputs // MULTIPLE) * MULTIPLE
        self.table = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn) if kind is Codes.E4M3 else table
        self.table = None if self.table is None else self.table.bfloat16().contiguous()
        padded = F.pad(codes, (0, groups * self.group_size - inputs)).contiguous()
        self.bits = 4 if kind is Codes.TABLE else 8
        steps = padded.shape[1] * self.bits // 8 // LANE
        self.packed = memory.weights.empty(self.num_panels, steps, PANEL // LANE, LANE * LANE, dtype=torch.uint8)
        _function("pack_codes")(padded.data_ptr(), rows, padded.shape[1], self.bits, self.packed.data_ptr())
        self.scales = memory.weights.copy(_panels(scales.float(), self.num_panels))

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.packed, self.scales, self.table) if tensor is not None]

    def contents(self) -> dict[str, Any]:
        return {**super().contents(), "kind": int(self.kind)}

    @classmethod
    def of_contents(cls, contents: Mapping[str, Any]) -> Self:
        return super().of_contents({**contents, "kind": Codes(contents["kind"])})

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """[...] int64 -> [..., K] float32."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.shape[0]:
            refuse_ids(ids, self.shape[0])
        panel, row = ids // PANEL, ids % PANEL
        lanes = self.packed.unflatten(-1, (2, LANE, 2))[panel, :, row // LANE, :, row % LANE]  # [..., steps, 2, 2]
        values = self._values(lanes.flatten(-2)).flatten(-2).unflatten(-1, (-1, self.group_size))
        scales = self.scales[panel, :, 0 if self.scales.shape[-1] == 1 else row]
        return (values * scales[..., None]).flatten(-2)[..., : self.shape[1]]

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        """[..., steps, 4] bytes of a row -> [..., steps, inputs of a step] float32, what the codes stand for."""
        if self.kind is Codes.TABLE and self.table is not None:
            return self.table.float()[torch.cat((codes & 15, codes >> 4), dim=-1).int()]
        return codes.view(torch.float8_e4m3fn if self.kind is Codes.E4M3 else torch.int8).float()

    def _multiply(self, x: torch.Tensor, output: Sequence[Any]) -> None:
        if x.dtype != torch.bfloat16:
            raise ValueError(f"a weight packed as codes multiplies bfloat16, not {x.dtype}")
        _function("gemm_codes")(
            x.data_ptr(), x.stride(0), x.shape[0], self.packed.data_ptr(), self.kind, address(self.table),
            self.scales.data_ptr(), self.scales.shape[-1], self.group_size, *self.shape, *output,
        )  # fmt: skip


def takes_groups(num_inputs: int, group_size: int) -> bool:
    """Whether groups of this size can be packed."""
    return group_size >= num_inputs or group_size % MULTIPLE == 0


def fp8_panels(weight: torch.Tensor, scales: torch.Tensor, group_size: int) -> CodePanels:
    """Pack [N, K] float8_e4m3fn. Kernels know no NaN: the scale of a group that has one becomes NaN instead."""
    codes = weight.view(torch.uint8)
    is_nan = (codes & 0x7F) == 0x7F
    if bool(is_nan.any()):
        groups = F.pad(is_nan, (0, scales.shape[1] * group_size - codes.shape[1])).unflatten(1, (-1, group_size))
        scales = scales.masked_fill(groups.any(dim=-1), torch.nan)
    return CodePanels(Codes.E4M3, codes, scales, group_size)


def _panels(scales: torch.Tensor, num_panels: int) -> torch.Tensor:
    """[N, groups] -> [panels, groups, PANEL], or, if the outputs of each panel share them, [panels, groups, 1]."""
    rows, groups = scales.shape
    padded = torch.cat((scales, scales[-1:].expand(num_panels * PANEL - rows, groups)))
    panels = padded.view(num_panels, PANEL, groups).transpose(1, 2)
    return panels[..., :1] if bool((panels == panels[..., :1]).all()) else panels
