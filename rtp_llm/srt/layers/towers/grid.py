"""Grids of patches: their positions, their rotation, and learned positions for grids of any size."""

from collections.abc import Iterable, Sequence
from math import isqrt

import torch
import torch.nn.functional as F

from rtp_llm.srt.layers.vision import CosSin


def patch_positions(
    grids: Iterable[Sequence[int]], merge_size: int = 1, device: torch.device | str | None = None
) -> torch.Tensor:
    """[patches, 2] int64, (row, column) of every patch of several images or videos.

    Args:
        grids: (frames, rows, columns) of each, in patches.
        merge_size: patches of a square of ``merge_size ** 2``, which are merged after the tower, are neighbours
            (Qwen2-VL, 2024); 1: row by row.

    Raises:
        ValueError: rows or columns are not a multiple of ``merge_size``.
    """
    return torch.cat([_grid_positions([int(size) for size in grid], merge_size, device) for grid in grids])


def _grid_positions(grid: Sequence[int], merge_size: int, device: torch.device | str | None) -> torch.Tensor:
    num_frames, num_rows, num_columns = grid
    if num_rows % merge_size or num_columns % merge_size:
        raise ValueError(
            f"a grid of {num_rows} x {num_columns} patches cannot be merged by {merge_size} x {merge_size}"
        )
    rows = torch.arange(num_rows, device=device)[:, None].expand(-1, num_columns)
    columns = torch.arange(num_columns, device=device).expand(num_rows, -1)
    squares = torch.stack((rows, columns), dim=-1).unflatten(1, (-1, merge_size)).unflatten(0, (-1, merge_size))
    return squares.transpose(1, 2).reshape(-1, 2).repeat(num_frames, 1)


def frame_cu_seqlens(grids: Iterable[Sequence[int]]) -> torch.Tensor:
    """[frames of all + 1] int32 on the host: each frame of (frames, rows, columns) grids is a segment."""
    lengths = [rows * columns for frames, rows, columns in (map(int, grid) for grid in grids) for _ in range(frames)]
    return torch.tensor([0, *lengths], device="cpu").cumsum(0, dtype=torch.int32)


def axial_cos_sin(positions: torch.Tensor, inv_freq: torch.Tensor) -> CosSin:
    """(cos, sin), each [patches, head_dim / 2] float32: the first half turns by the row, the second by the column.

    Args:
        positions: [patches, 2], from ``patch_positions``.
        inv_freq: [head_dim / 4], or [2, head_dim / 4] where rows and columns differ; float32, radians per patch.
    """
    angles = (positions[:, :, None].float() * inv_freq.to(positions.device)).flatten(1)
    return angles.cos(), angles.sin()


def axial_inv_freq(head_dim: int, base: float = 10000.0) -> torch.Tensor:
    """[head_dim / 4] float32 on the host: Qwen2-VL's frequencies of a row or column (2024), for ``axial_cos_sin``."""
    if head_dim % 4:
        raise ValueError(f"rotation by rows and columns needs heads of a multiple of 4 components, got {head_dim}")
    size = head_dim // 2
    return 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)


def interpolate_grid(
    table: torch.Tensor, num_rows: int, num_columns: int, mode: str = "bicubic", align_corners: bool = False
) -> torch.Tensor:
    """Interpolate learned positions of a square grid, [side ** 2, d] -> [num_rows * num_columns, d] (ViT, 2021).

    ``mode`` and ``align_corners`` are those of ``torch.nn.functional.interpolate``.
    """
    side = isqrt(len(table))
    if side * side != len(table):
        raise ValueError(f"{len(table)} learned positions are not those of a square grid")
    if (num_rows, num_columns) == (side, side):
        return table
    grid = table.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=(num_rows, num_columns), mode=mode, align_corners=align_corners)
    return grid[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)
