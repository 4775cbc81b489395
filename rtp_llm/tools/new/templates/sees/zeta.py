"""Zeta: so far a language model of Llama's form with an eye for images of one size, to be changed."""

from typing import Any

import torch
from torch import nn

from rtp_llm.models_py.llama import LlamaModel
from rtp_llm.srt.layers.image_text import ImageTextModel
from rtp_llm.srt.layers.linear import ReplicatedLinear
from rtp_llm.srt.layers.mlp import VisionMLP
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.vision import VisionAttention
from rtp_llm.srt.multimodal.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens
from rtp_llm.srt.multimodal.items import MultimodalDataItem, MultimodalProcessorOutput
from rtp_llm.srt.utils import add_prefix, make_layers


class ZetaEyeLayer(nn.Module):
    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = VisionAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(
            config.hidden_size, config.intermediate_size, "gelu", quant_config, add_prefix("mlp", prefix)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ZetaEye(nn.Module):
    """[images, 3, size, size] -> [images, patches, hidden_size]."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embed = nn.Embedding(num_patches(config), config.hidden_size)
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: ZetaEyeLayer(config, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        weight = self.patch_embed.weight
        x = self.patch_embed(pixel_values.to(weight)).flatten(2).transpose(1, 2) + self.position_embed.weight
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def num_patches(config: Any) -> int:
    return (config.image_size // config.patch_size) ** 2


class ZetaModel(nn.Module):
    """``config`` has the fields of config.json: ``text_config`` is Llama's, and ``eye_config`` what stands there."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()
        self.eye = ZetaEye(config.eye_config, quant_config, add_prefix("eye", prefix))
        self.projector = ReplicatedLinear(
            config.eye_config.hidden_size,
            config.text_config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("projector", prefix),
        )
        self.language_model = LlamaModel(config.text_config, quant_config, add_prefix("language_model", prefix))


class ZetaForConditionalGeneration(ImageTextModel):
    model: ZetaModel

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        model = ZetaModel(config, quant_config, add_prefix("model", prefix))
        super().__init__(config, model, quant_config, prefix)

    def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Return the rows of all items, [rows, hidden size of the language model], in the order of their positions."""
        pixel_values = torch.cat([torch.as_tensor(item.feature) for item in items])
        rows, _ = self.model.projector(self.model.eye(pixel_values))
        return rows.flatten(0, 1)


class ZetaProcessor(BaseMultimodalProcessor):
    """From images to the eye's pixels, by the checkpoint's image processor; in the process that has the clients."""

    models = [ZetaForConditionalGeneration]

    def __init__(self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.mm_tokens = MultimodalSpecialTokens(image_token_id=hf_config.image_token_id).build(_processor)

    def replacement(self, item: MultimodalDataItem) -> str:
        """Return what stands in the prompt for an image: its placeholder once for each of its rows."""
        assert self.mm_tokens.image_token is not None
        return self.mm_tokens.image_token * num_patches(self.hf_config.eye_config)

    async def process_mm_data_async(
        self, image_data: Any, audio_data: Any, input_text: str | list[int], request_obj: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        return await self.process(image_data, audio_data, input_text, request_obj)


EntryClass = ZetaForConditionalGeneration
