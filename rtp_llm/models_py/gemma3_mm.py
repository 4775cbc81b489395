"""Gemma 3 (Gemma Team, 2025), with images: a SigLIP tower, and tokens of an image that see each other both ways."""

from collections.abc import Sequence
from math import isqrt, prod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.models_py.gemma2 import Gemma2DecoderLayer, Gemma2Model
from rtp_llm.models_py.gemma3 import Gemma3Attention
from rtp_llm.models_py.llava import RENAME, LlavaProcessor, make_vision_tower, parts_of
from rtp_llm.srt.layers.image_text import ImageTextModel
from rtp_llm.srt.layers.norm import GemmaRMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter
from rtp_llm.srt.multimodal.base_processor import MultimodalSpecialTokens
from rtp_llm.srt.multimodal.estimates import Prepared
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalProcessorOutput
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PretrainedConfig


class Gemma3MultiModalProjector(nn.Module):
    """Averages squares of patches to ``mm_tokens_per_image`` rows, and projects them to the language model's size.

    Raises:
        ValueError: the patches cannot be averaged to so many rows.
    """

    def __init__(self, config: "PretrainedConfig") -> None:
        super().__init__()
        vision_config = config.vision_config
        self.patches_per_side = vision_config.image_size // vision_config.patch_size
        tokens_per_side = isqrt(config.mm_tokens_per_image)
        if tokens_per_side**2 != config.mm_tokens_per_image or self.patches_per_side % tokens_per_side:
            raise ValueError(
                f"{self.patches_per_side} x {self.patches_per_side} patches cannot be averaged to "
                f"mm_tokens_per_image={config.mm_tokens_per_image}: it must be the square of a divisor of "
                f"{self.patches_per_side}"
            )
        self.kernel_size = self.patches_per_side // tokens_per_side
        self.mm_soft_emb_norm = GemmaRMSNorm(vision_config.hidden_size, eps=vision_config.layer_norm_eps)
        self.mm_input_projection_weight = make_parameter(
            torch.zeros(vision_config.hidden_size, config.text_config.hidden_size), default_weight_loader
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, patches, vision size] -> [n, mm_tokens_per_image, hidden size of the language model]."""
        grid = x.transpose(1, 2).unflatten(2, (self.patches_per_side, self.patches_per_side))
        pooled = F.avg_pool2d(grid, self.kernel_size).flatten(2).transpose(1, 2)
        return self.mm_soft_emb_norm(pooled) @ self.mm_input_projection_weight


class Gemma3Model(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.vision_tower = make_vision_tower(config.vision_config, quant_config, add_prefix("vision_tower", prefix))
        self.multi_modal_projector = Gemma3MultiModalProjector(config)
        self.language_model = Gemma2Model(
            config.text_config,
            quant_config,
            add_prefix("language_model", prefix),
            attention_type=Gemma3Attention,
            layer_type=Gemma2DecoderLayer,
        )

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[n, channels, height, width] -> [n, mm_tokens_per_image, hidden size of the language model]."""
        device = next(self.vision_tower.parameters()).device
        return self.multi_modal_projector(self.vision_tower(pixel_values.to(device)))


class Gemma3ForConditionalGeneration(ImageTextModel):
    rename = RENAME
    ignore = [r"^model\.vision_tower\.(vision_model\.)?head\."]  # SigLIP's pooling, which is not used
    model: Gemma3Model

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        if config.vision_config.model_type != "siglip_vision_model":
            raise ValueError(
                f"vision_config.model_type is {config.vision_config.model_type!r}, but Gemma 3 sees through a "
                "siglip_vision_model"
            )
        soft_cap = config.text_config.final_logit_softcapping
        if soft_cap is not None:
            raise ValueError(
                f"final_logit_softcapping is {soft_cap}, but Gemma 3 with images does not cap logits: set it to null"
            )
        model = Gemma3Model(config, quant_config, add_prefix("model", prefix))
        super().__init__(config, model, quant_config, prefix)
        self.max_media_block = int(config.mm_tokens_per_image)

    def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Encode items, whose features are [1 + crops, channels, height, width], in the tower's size."""
        return self.model.encode(torch.stack([image for item in items for image in parts_of(item)])).flatten(0, 1)


class Gemma3Processor(LlavaProcessor):
    """Marks an image in a chat by the token that begins one. With ``do_pan_and_scan`` in preprocessor_config.json, an
    image that is far from square is followed by crops of itself."""

    models = [Gemma3ForConditionalGeneration]

    def __init__(
        self, hf_config: "PretrainedConfig", server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        begin, end, soft = self.tokenizer.convert_ids_to_tokens(
            [hf_config.boi_token_index, hf_config.eoi_token_index, hf_config.image_token_index]
        )
        self.mm_tokens = MultimodalSpecialTokens(image_token=begin, image_token_id=hf_config.image_token_index).build(
            _processor
        )
        self.image_text = f"\n\n{begin}{soft * hf_config.mm_tokens_per_image}{end}\n\n"

    async def process_mm_data_async(
        self, image_data: Any, audio_data: Any, input_text: str | list[int], request_obj: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        output = await super().process_mm_data_async(image_data, audio_data, input_text, request_obj)
        output.im_start_id = self.hf_config.boi_token_index
        output.im_end_id = self.hf_config.eoi_token_index
        return output

    @property
    def image_options(self) -> dict[str, Any]:
        """Options that published checkpoints do not set, with the defaults of transformers' processor."""
        settings = getattr(self._processor, "image_settings", {})
        defaults = {
            "do_convert_rgb": True,
            "do_pan_and_scan": False,
            "pan_and_scan_min_crop_size": 256,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        }
        return {name: value if settings.get(name) is None else settings[name] for name, value in defaults.items()}

    def prepared_image(self, height: int, width: int) -> Prepared:
        options = self.image_options
        num_pictures = 1 + options["do_pan_and_scan"] * options["pan_and_scan_max_num_crops"]
        return Prepared(self.hf_config.mm_tokens_per_image, num_pictures * prod(self.tile_shape))

    def image_items(self, images: Sequence["Image.Image"]) -> list[MultimodalDataItem]:
        self.check_length(Modality.IMAGE, len(images) * self.hf_config.mm_tokens_per_image)
        return [self.image_item(image) for image in images]

    def num_feature_rows(self, item: MultimodalDataItem) -> int:
        return len(parts_of(item)) * self.hf_config.mm_tokens_per_image

    def replacement(self, item: MultimodalDataItem) -> str:
        num_crops = len(parts_of(item)) - 1
        if not num_crops:
            return self.image_text
        crops = " ".join([self.image_text] * num_crops)
        return f"Here is the original image {self.image_text} and here are some crops to help you see better {crops}"


EntryClass = Gemma3ForConditionalGeneration
