"""Any checkpoint in 4 bits: 32 neighbours along a weight's inputs share a scale. In narrow layers fewer do, and each
group has a zero as well.

No data is needed: of a few candidates, the scale and zero with the least squared error of the group are taken.
"""

import torch
import torch.nn.functional as F

from rtp_llm.srt.device.choice import built_for
from rtp_llm.srt.kernels.packed import PackedWeight
from rtp_llm.srt.layers.quantization.on_load import OnLoadConfig, quantize_int8, row_blocks

# Least number of a layer's inputs -> group size: the fewer inputs, the less their errors cancel.
GROUP_SIZES = {256: 32, 128: 16, 0: 8}
# Groups of this size or more all have zero 8: products are a fifth faster without terms for zeros. Scales may be
# negative, so that the extreme that is farther from 0 is level -8.
SYMMETRIC_FROM = 32
# Factors by which a group's range is narrowed: an extreme gets a larger error, and the others smaller ones.
NARROWED = (1.0, 0.94, 0.88, 0.82)


class Int4Config(OnLoadConfig):
    def get_name(self) -> str:
        return "int4"

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        if weight.shape[1] % 2:  # two values share a byte
            return built_for().pack_int8(*quantize_int8(weight))
        group_size = next(size for least, size in GROUP_SIZES.items() if weight.shape[1] >= least)
        quantize = built_for().find("quantize_int4", weight.dtype) or quantize_int4
        values, scales, zeros = quantize(weight, group_size)
        return built_for().pack_int4(values, scales, zeros, group_size)


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, K] -> the inputs of ``reference.dequantize_int4``: [N, K / 2] uint8, scales and zeros [N, groups].

    The last group is shorter where ``group_size`` does not divide K, which must be even. Scales are numbers of
    bfloat16, so that keeping them in 16 bits loses nothing.
    """
    num_rows, num_inputs = weight.shape
    num_groups = -(-num_inputs // group_size)
    values = torch.empty(num_rows, num_inputs // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(num_rows, num_groups, dtype=torch.float32, device=weight.device)
    zeros = torch.empty(num_rows, num_groups, dtype=torch.uint8, device=weight.device)
    for rows in row_blocks(weight):
        grouped = in_groups(weight[rows].float(), group_size)
        scales[rows], zero = best_grid(grouped)
        zeros[rows] = zero.to(torch.uint8)
        levels = to_levels(grouped, scales[rows], zero).flatten(1)[:, :num_inputs]
        values[rows] = levels[:, 0::2] | levels[:, 1::2] << 4
    return values, scales, zeros


def in_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """[N, K] -> [N, groups, group_size]; the last group is padded with zeros, which do not change its best grid."""
    return F.pad(weight, (0, -weight.shape[1] % group_size)).unflatten(1, (-1, group_size))


def best_grid(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, groups, size] float32 -> scales and zeros [N, groups], both float32; zeros are in 0 .. 15.

    A zero maps the group's range, extended to 0, to 0 .. 15; in large groups it is 8. For each width, weights w are
    rounded to levels d, counted from the zero; then the best scale is ``sum(w d) / sum(d d)``, and the squared error
    with it is ``sum(w w) - sum(w d)² / sum(d d)``.
    """
    low, high = grouped.amin(dim=-1).clamp(max=0), grouped.amax(dim=-1).clamp(min=0)
    if grouped.shape[-1] >= SYMMETRIC_FROM:
        width = torch.where(high > -low, -high, -low).mul_(15 / 8)
        width = torch.where(width == 0, 1e-30, width)
        zeros = torch.full_like(width, 8)
    else:
        width = (high - low).clamp(min=1e-30)  # in a group of zeros, any divisor will do
        zeros = (-15 * low / width).round()
    best = torch.full_like(width, -1.0)
    scales = torch.zeros_like(width)
    for narrowed in NARROWED:
        levels = (grouped * (15 / narrowed / width)[..., None]).round_()
        levels.clamp_(-zeros[..., None], 15 - zeros[..., None])
        # in float64 the order of additions does not matter: kernels give the same scales
        products = (grouped * levels).sum(dim=-1, dtype=torch.float64).float()
        squares = levels.square().sum(dim=-1)
        explained = products.square() / squares.clamp(min=1)
        scales = torch.where(explained > best, products / squares.clamp(min=1), scales)
        best = torch.maximum(best, explained)
    return torch.where(best.isfinite(), scales, torch.nan).bfloat16().float(), zeros.nan_to_num(0)


def to_levels(grouped: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """[N, groups, size] uint8: 0 .. 15."""
    steps = torch.where(scales == 0, 1.0, scales)[..., None]
    return (grouped / steps + zeros[..., None]).round_().clamp_(0, 15).nan_to_num_(0).to(torch.uint8)
