"""The vision tower of CLIP (Radford et al., 2021). A part of other models."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.layers.mlp import VisionMLP
from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.towers.grid import interpolate_grid
from rtp_llm.srt.layers.towers.tower import hidden_states_at, sources_below
from rtp_llm.srt.layers.vision import Sources, VisionAttention
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class CLIPVisionEmbeddings(nn.Module):
    """Patches by a convolution, plus learned positions; the first token is the learned class token."""

    has_class_token = True

    def __init__(self, config: "PretrainedConfig") -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=not self.has_class_token,
        )
        if self.has_class_token:
            self.class_embedding = make_parameter(torch.zeros(config.hidden_size), default_weight_loader)
        num_positions = (config.image_size // config.patch_size) ** 2 + self.has_class_token
        self.position_embedding = nn.Embedding(num_positions, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[n, channels, height, width] -> [n, tokens, hidden_size]. Positions are interpolated for other sizes."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        positions = self.position_embedding.weight
        num_extra = int(self.has_class_token)
        grid = interpolate_grid(positions[num_extra:], *patches.shape[2:])
        patches = patches.flatten(2).transpose(1, 2) + grid
        if not self.has_class_token:
            return patches
        first = (self.class_embedding + positions[0]).expand(len(patches), 1, -1)
        return torch.cat((first, patches), dim=1)


class CLIPEncoderLayer(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("self_attn", prefix),
        )
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, quant_config, add_prefix("mlp", prefix)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: CLIPEncoderLayer(config, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
        )

    def forward(self, x: torch.Tensor, wanted: int | Sequence[int]) -> torch.Tensor | list[torch.Tensor]:
        return hidden_states_at(lambda layer, x: layer(x), self.layers, x, wanted)


class CLIPVisionModel(nn.Module):
    """The whole tower. Names in checkpoints may begin with ``vision_model.``."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelt as in checkpoints
        self.encoder = CLIPEncoder(config, quant_config, add_prefix("encoder", prefix))
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # only for the class token

    @property
    def weight_sources(self) -> Sources:
        return sources_below("vision_model", self)

    def forward(
        self, pixel_values: torch.Tensor, hidden_layer: int | Sequence[int] = -1
    ) -> torch.Tensor | list[torch.Tensor]:
        """Encode images.

        Args:
            pixel_values: [n, channels, height, width], normalised.
            hidden_layer: number of the hidden state, or states, as in a configuration's ``vision_feature_layer`` (-1:
                the last layer's); later layers are not computed.

        Returns:
            [n, 1 + patches, hidden_size], the class token first; a list of them for a list.
        """
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)), hidden_layer)
