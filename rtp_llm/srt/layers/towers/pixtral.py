"""The vision tower of Pixtral (Agrawal et al., 2024): images of any size, a rotation by row and column."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import get_rope_config
from rtp_llm.srt.layers.towers.grid import axial_cos_sin, frame_cu_seqlens, patch_positions
from rtp_llm.srt.layers.towers.tower import hidden_states_at
from rtp_llm.srt.layers.vision import (
    CosSin,
    VisionAttention,
    VisionAttentionMetadata,
    prepare_vision_attention_metadata,
)
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NORM_EPS = 1e-5  # configurations do not have it


class PixtralAttentionLayer(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.attention = VisionAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("attention", prefix),
            proj_bias=False,
            qkv_bias=False,
        )
        self.ffn_norm = RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.feed_forward = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config,
            add_prefix("feed_forward", prefix),
        )

    def forward(self, x: torch.Tensor, cos_sin: CosSin, metadata: VisionAttentionMetadata) -> torch.Tensor:
        """[1, patches, hidden_size] -> the same."""
        attended = self.attention(self.attention_norm(x), position_embeddings=cos_sin, forward_metadata=metadata)
        x = x + attended
        return x + self.feed_forward(self.ffn_norm(x))


class PixtralTransformer(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: PixtralAttentionLayer(config, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
        )


class PixtralVisionModel(nn.Module):
    """The whole tower. A model with it maps ``gate_up_proj`` to ``gate_proj`` and ``up_proj`` in
    ``packed_modules_mapping``."""

    inv_freq: torch.Tensor

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.patch_conv = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=False,
        )
        self.ln_pre = RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.transformer = PixtralTransformer(config, quant_config, add_prefix("transformer", prefix))
        inv_freq = _inv_freq(config).to(torch.get_default_device())
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(
        self,
        pixel_values: torch.Tensor | Sequence[torch.Tensor],
        image_sizes: Sequence[tuple[int, int]] | None = None,
        hidden_layer: int | Sequence[int] = -1,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Encode images.

        Args:
            pixel_values: images [channels, height, width], normalised, in a list or padded to one tensor.
            image_sizes: (height, width) of each, without padding; None: they are not padded.
            hidden_layer: number of the hidden state, or states, as in a configuration's ``vision_feature_layer`` (-1:
                the last layer's); later layers are not computed.

        Returns:
            [patches of all images, hidden_size], row by row; a list of them for a list.
        """
        sizes = image_sizes if image_sizes is not None else [image.shape[1:] for image in pixel_values]
        images = [
            image[None, :, :height, :width].to(self.patch_conv.weight.dtype)
            for image, (height, width) in zip(pixel_values, sizes, strict=True)
        ]
        grids = [self.patch_conv(image)[0] for image in images]
        x = self.ln_pre(torch.cat([grid.flatten(1).T for grid in grids]))[None]
        shapes = [(1, *grid.shape[1:]) for grid in grids]
        metadata = prepare_vision_attention_metadata(frame_cu_seqlens(shapes), x.device)
        cos, sin = axial_cos_sin(patch_positions(shapes, device=x.device), self.inv_freq)
        cos_sin = cos.to(x.dtype), sin.to(x.dtype)
        states = hidden_states_at(
            lambda layer, x: layer(x, cos_sin, metadata), self.transformer.layers, x, hidden_layer
        )
        return states[0] if isinstance(states, torch.Tensor) else [state[0] for state in states]


def _inv_freq(config: "PretrainedConfig") -> torch.Tensor:
    """[2, head_dim / 4] float32 on the host: rows turn by the even frequencies of a RoPE, columns by the odd ones."""
    base, _, _ = get_rope_config(config)
    head_dim = config.hidden_size // config.num_attention_heads
    if head_dim % 4:
        raise ValueError(f"rotation by rows and columns needs heads of a multiple of 4 components, got {head_dim}")
    inv_freq = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    return torch.stack((inv_freq[0::2], inv_freq[1::2]))
