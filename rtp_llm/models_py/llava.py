"""LLaVA 1.5 (Liu et al., 2023): patches of a CLIP tower are projected by two linear layers into a language model."""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from rtp_llm.models_py.llama import LlamaAttention, LlamaDecoderLayer, LlamaModel
from rtp_llm.models_py.ministral3 import Ministral3Attention
from rtp_llm.models_py.mistral import MistralAttention
from rtp_llm.models_py.qwen2 import Qwen2Attention
from rtp_llm.models_py.qwen2_moe import QwenMoeDecoderLayer
from rtp_llm.models_py.qwen3 import Qwen3Attention
from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.srt.layers.image_text import ImageTextModel
from rtp_llm.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.towers.clip import CLIPVisionModel
from rtp_llm.srt.layers.towers.siglip import SiglipVisionModel
from rtp_llm.srt.multimodal.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens
from rtp_llm.srt.multimodal.estimates import Prepared
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalProcessorOutput
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOWERS: dict[str, type[nn.Module]] = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
ATTENTION: dict[str, type[nn.Module]] = {
    "llama": LlamaAttention,
    "ministral3": Ministral3Attention,
    "mistral": MistralAttention,
    "qwen2": Qwen2Attention,
    "qwen3": Qwen3Attention,
    "qwen3_moe": Qwen3Attention,
}
LAYERS: dict[str, type[nn.Module]] = {"qwen3_moe": QwenMoeDecoderLayer}  # others have Llama's

MAX_ASPECT = 200  # of an image whose shorter side is resized to the tower's, before the longer one is cropped
MAX_SIDE = 4096  # pixels of an image that is padded to a square

# As released, before transformers put all below ``model``.
RENAME = [
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.(model\.)?", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector|image_newline)\b", r"model.\1"),
]


def make_language_model(config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> nn.Module:
    """Build the language model of a configuration.

    Raises:
        ValueError: there is none for the configuration's ``model_type``.
    """
    attention_type = ATTENTION.get(config.model_type)
    if attention_type is None:
        raise ValueError(
            f"language models of type {config.model_type!r} are not supported here; have {list(ATTENTION)}"
        )
    layer_type = LAYERS.get(config.model_type, LlamaDecoderLayer)
    return LlamaModel(config, quant_config, prefix, attention_type, layer_type)


def make_vision_tower(config: "PretrainedConfig", quant_config: QuantizationConfig | None, prefix: str) -> nn.Module:
    """Build the vision tower of a configuration.

    Raises:
        ValueError: there is none for the configuration's ``model_type``.
    """
    tower_type = TOWERS.get(config.model_type)
    if tower_type is None:
        raise ValueError(f"vision towers of type {config.model_type!r} are not supported here; have {list(TOWERS)}")
    return tower_type(config, quant_config, prefix)


def num_features(config: "PretrainedConfig") -> int:
    """Return the number of rows that the language model gets for one image of the tower's size.

    Raises:
        ValueError: ``vision_feature_select_strategy`` is unknown.
    """
    vision_config = config.vision_config
    num_patches = (vision_config.image_size // vision_config.patch_size) ** 2
    return num_patches + (vision_config.model_type == "clip_vision_model") - num_skipped(config)


def num_skipped(config: "PretrainedConfig") -> int:
    """Return the number of the tower's first rows that are dropped: with "default" one, CLIP's class token."""
    strategies = {"default": 1, "full": 0}
    strategy = config.vision_feature_select_strategy
    if strategy not in strategies:
        raise ValueError(f"vision_feature_select_strategy must be one of {list(strategies)}, not {strategy!r}")
    return strategies[strategy]


class LlavaMultiModalProjector(nn.Module):
    """[..., vision size * feature layers] -> [..., hidden size of the language model]."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        layers = config.vision_feature_layer
        num_layers = 1 if isinstance(layers, int) else len(layers)
        hidden_size = config.text_config.hidden_size
        self.linear_1 = ColumnParallelLinear(
            config.vision_config.hidden_size * num_layers,
            hidden_size,
            bias=config.multimodal_projector_bias,
            quant_config=quant_config,
            prefix=add_prefix("linear_1", prefix),
        )
        self.linear_2 = RowParallelLinear(
            hidden_size,
            hidden_size,
            bias=config.multimodal_projector_bias,
            quant_config=quant_config,
            prefix=add_prefix("linear_2", prefix),
        )
        self.act = get_act_fn(config.projector_hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.linear_1(x)
        x, _ = self.linear_2(self.act(x))
        return x


class LlavaModel(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.feature_layers: Sequence[int] = (
            [config.vision_feature_layer]
            if isinstance(config.vision_feature_layer, int)
            else config.vision_feature_layer
        )
        self.num_skipped = num_skipped(config)
        self.vision_tower = make_vision_tower(config.vision_config, quant_config, add_prefix("vision_tower", prefix))
        self.multi_modal_projector = LlavaMultiModalProjector(
            config, quant_config, add_prefix("multi_modal_projector", prefix)
        )
        self.language_model = make_language_model(
            config.text_config, quant_config, add_prefix("language_model", prefix)
        )

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[n, channels, height, width] -> [n, rows, hidden size of the language model]."""
        device = next(self.vision_tower.parameters()).device
        states = self.vision_tower(pixel_values.to(device), self.feature_layers)
        return self.multi_modal_projector(torch.cat(states, dim=-1)[:, self.num_skipped :])


class LlavaForConditionalGeneration(ImageTextModel):
    rename = RENAME
    ignore = [r"^model\.vision_tower\.(vision_model\.)?head\."]  # SigLIP's pooling, which is not used
    model_type: type[LlavaModel] = LlavaModel
    model: LlavaModel

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        model = self.model_type(config, quant_config, add_prefix("model", prefix))
        super().__init__(config, model, quant_config, prefix)

    def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Encode items, whose features are [images, channels, height, width], in the tower's size."""
        return self.model.encode(torch.stack([image for item in items for image in parts_of(item)])).flatten(0, 1)


def parts_of(item: MultimodalDataItem) -> list[torch.Tensor]:
    """Return the feature of each image or video of an item. An item has one, unless a caller passes the output of
    transformers' processor for several."""
    if item.feature is None:
        raise ValueError(f"an item of kind {item.modality.value} has no feature")
    return list(item.feature)


class LlavaProcessor(BaseMultimodalProcessor):
    models = [LlavaForConditionalGeneration]
    feature_dims = 3  # of an image's feature: channels, height and width are the last

    def __init__(
        self, hf_config: "PretrainedConfig", server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.mm_tokens = MultimodalSpecialTokens(image_token_id=hf_config.image_token_id).build(_processor)

    async def process_mm_data_async(
        self, image_data: Any, audio_data: Any, input_text: str | list[int], request_obj: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        output = await self.process(image_data, audio_data, input_text, request_obj)
        for item in output.mm_items:
            self.check(item)
        return output

    def prepared_image(self, height: int, width: int) -> Prepared:
        longer, shorter = max(height, width), min(height, width)
        if self.image_processor.do_pad:
            num_pixels = min(longer, MAX_SIDE) ** 2
        else:  # it is cropped to a square after its shorter side is resized
            num_pixels = self.tile_shape[-1] ** 2 * min(longer // shorter + 1, MAX_ASPECT)
        return Prepared(num_features(self.hf_config), prod(self.tile_shape), num_pixels)

    def image_items(self, images: Sequence[Image.Image]) -> list[MultimodalDataItem]:
        self.check_length(Modality.IMAGE, len(images) * num_features(self.hf_config))
        return super().image_items([self.bounded(image) for image in images])

    @property
    def tile_shape(self) -> list[int]:
        """Channels, height and width of the tower's input."""
        config = self.hf_config.vision_config
        return [config.num_channels, config.image_size, config.image_size]

    @property
    def image_processor(self) -> Any:
        """
        Raises:
            InvalidRequest: the checkpoint has none.
        """
        image_processor = getattr(self._processor, "image_processor", None)
        if image_processor is None:
            raise InvalidRequest("images cannot be taken: the checkpoint has no preprocessor_config.json", "image_data")
        return image_processor

    def bounded(self, image: Image.Image) -> Image.Image:
        """Return the image if transformers makes no far larger one of it before it has the tower's size.

        Raises:
            InvalidRequest: it does.
        """
        settings = self.image_processor
        if settings.do_pad:
            return within(image)
        if settings.size.get("shortest_edge") and max(image.size) > MAX_ASPECT * min(image.size):
            raise InvalidRequest(
                f"an image of {image.width} x {image.height} pixels is too long: one side may be {MAX_ASPECT} times "
                "the other",
                "image_data",
            )
        return image

    def replacement(self, item: MultimodalDataItem) -> str:
        token = self.mm_tokens.token_of(item.modality)
        assert token is not None
        return token * self.num_rows(item)

    def num_rows(self, item: MultimodalDataItem) -> int:
        """Number of rows of the item's embedding."""
        if item.precomputed_embeddings is not None:
            return len(item.precomputed_embeddings)
        return self.num_feature_rows(item)

    def num_feature_rows(self, item: MultimodalDataItem) -> int:
        return len(parts_of(item)) * num_features(self.hf_config)

    def check(self, item: MultimodalDataItem) -> None:
        """
        Raises:
            InvalidRequest: the encoder cannot take the item, or the item does not fit its placeholders: the
                checkpoint's files disagree, or the caller has processed it in another way.
        """
        name, expected = f"{item.modality.value}_data", self.tile_shape
        parts = [] if item.precomputed_embeddings is not None else parts_of(item)
        for part in parts:
            if part.dim() != self.feature_dims or list(part.shape[-3:]) != expected:
                raise InvalidRequest(
                    f"the vision tower takes channels, height and width {expected}, but pixels were prepared as "
                    f"{list(part.shape)}; preprocessor_config.json and config.json must agree",
                    name,
                )
        self.check_rows(item)

    def check_rows(self, item: MultimodalDataItem) -> None:
        """Raise InvalidRequest if an item has another number of rows than placeholders."""
        if self.num_rows(item) != item.num_tokens:
            raise InvalidRequest(
                f"the prompt has {item.num_tokens} places for what has {self.num_rows(item)} embeddings",
                f"{item.modality.value}_data",
            )

    def check_length(self, modality: Modality, num_rows: int) -> None:
        """Raise InvalidRequest if the rows exceed the context, before pixels are processed."""
        limit = getattr(self.server_args, "context_length", None)
        limit = limit or self.hf_config.get_text_config().max_position_embeddings
        if num_rows > limit:
            raise InvalidRequest(
                f"the {modality.value} data take {num_rows} tokens, and the model's context has {limit}",
                f"{modality.value}_data",
            )


def within(image: Image.Image) -> Image.Image:
    """Return the image, shrunk if a side is longer than ``MAX_SIDE``: padded to a square it would fill memory."""
    if max(image.size) <= MAX_SIDE:
        return image
    smaller = image.copy()
    smaller.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    return smaller


EntryClass = LlavaForConditionalGeneration
