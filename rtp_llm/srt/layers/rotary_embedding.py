"""Rotary positions, under the name that vLLM's model files import (``get_rope`` is in ``rotary.py``); and the rotation
alone, for towers that compute their own angles.
"""

import torch
from torch import nn

from rtp_llm.srt.layers.rotary import MRotaryEmbedding, RotaryEmbedding, get_rope, set_default_rope_theta

__all__ = ["ApplyRotaryEmb", "MRotaryEmbedding", "RotaryEmbedding", "get_rope", "set_default_rope_theta"]


class ApplyRotaryEmb(nn.Module):
    """Rotates by given angles: ``rotated = apply_rotary_emb(x, cos, sin)``.

    Args:
        is_neox_style: pairs are (i, i + half); False: (2i, 2i + 1).
        enable_fp32_compute: compute in float32 and round once.
    """

    def __init__(self, is_neox_style: bool = True, enable_fp32_compute: bool = False) -> None:
        super().__init__()
        self.is_neox_style = is_neox_style
        self.enable_fp32_compute = enable_fp32_compute

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[..., T, heads, head_size], with angles of [T, head_size / 2], to the same shape and dtype."""
        wide = x.float() if self.enable_fp32_compute else x
        cos, sin = cos.to(wide.dtype)[:, None], sin.to(wide.dtype)[:, None]
        first, second = wide.chunk(2, dim=-1) if self.is_neox_style else (wide[..., ::2], wide[..., 1::2])
        halves = first * cos - second * sin, second * cos + first * sin
        rotated = torch.cat(halves, dim=-1) if self.is_neox_style else torch.stack(halves, dim=-1).flatten(-2)
        return rotated.to(x.dtype)
