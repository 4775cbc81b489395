"""Rotary positions, under the name and with the arguments that vLLM's model files have; the embeddings are in
``rotary.py``. And the rotation alone, for towers that compute their own angles.
"""

from typing import Any

import torch
from torch import nn

from rtp_llm.srt.layers import rotary
from rtp_llm.srt.layers.rotary import MRotaryEmbedding, RotaryEmbedding, set_default_rope_theta

__all__ = ["ApplyRotaryEmb", "MRotaryEmbedding", "RotaryEmbedding", "get_rope", "set_default_rope_theta"]


def get_rope(
    head_size: int,
    max_position: int,
    is_neox_style: bool = True,
    rope_parameters: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    dual_chunk_attention_config: dict[str, Any] | None = None,
    mrope_positions_factor: int = 4,
) -> RotaryEmbedding:
    """Return ``rotary.get_rope`` of the same arguments.

    ``mrope_positions_factor`` is the size of a table of angles, which are computed here: it changes nothing.

    Raises:
        ValueError: there is a ``dual_chunk_attention_config``, which attention here does not know.
    """
    if dual_chunk_attention_config is not None:
        raise ValueError("dual_chunk_attention_config is not supported: remove it from config.json to attend to all")
    return rotary.get_rope(
        head_size,
        max_position=max_position,
        is_neox_style=is_neox_style,
        dtype=dtype,
        rope_parameters=rope_parameters or {},
    )


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
