"""The vision tower of SigLIP (Zhai et al., 2023): CLIP's without a class token. A part of other models."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.layers.norm import LayerNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.towers.clip import CLIPEncoder, CLIPVisionEmbeddings
from rtp_llm.srt.layers.towers.tower import sources_below
from rtp_llm.srt.layers.vision import Sources
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class SiglipVisionEmbeddings(CLIPVisionEmbeddings):
    has_class_token = False


class SiglipVisionModel(nn.Module):
    """The whole tower. Names in checkpoints may begin with ``vision_model.``.

    There is no pooling head (``vision_use_head``), since no model reads it: a model whose checkpoints have it lists
    ``r"\\.head\\."`` in ``ignore``.
    """

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = CLIPEncoder(config, quant_config, add_prefix("encoder", prefix))
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @property
    def weight_sources(self) -> Sources:
        return sources_below("vision_model", self)

    def forward(
        self, pixel_values: torch.Tensor, hidden_layer: int | Sequence[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Encode images.

        Args:
            pixel_values: [n, channels, height, width], normalised.
            hidden_layer: number of the hidden state, or states, as in a configuration's ``vision_feature_layer`` (-1:
                the last layer's); later layers are not computed. None: the last, after the norm that follows it.

        Returns:
            [n, patches, hidden_size]; a list of them for a list.
        """
        embedded = self.embeddings(pixel_values)
        if hidden_layer is None:
            return self.post_layernorm(self.encoder(embedded, -1))
        return self.encoder(embedded, hidden_layer)
