"""InternVL 3 and 3.5 (Zhu et al., 2025): images in tiles of one size, with squares of patches merged to one."""

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn
from transformers.image_processing_backends import PilBackend

from rtp_llm.models_py.llava import RENAME, LlavaProcessor, make_language_model, parts_of
from rtp_llm.models_py.llava_onevision import VIDEO_SETTINGS
from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.srt.layers.image_text import ImageTextModel
from rtp_llm.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.mlp import VisionMLP
from rtp_llm.srt.layers.norm import LayerNorm, RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.towers.grid import interpolate_grid
from rtp_llm.srt.layers.towers.tower import hidden_states_at
from rtp_llm.srt.layers.vision import VisionAttention
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter
from rtp_llm.srt.multimodal.base_processor import MultimodalSpecialTokens
from rtp_llm.srt.multimodal.estimates import Prepared
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalProcessorOutput
from rtp_llm.srt.multimodal.media import VideoFrames, VideoInfo
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NORMS: dict[str, type[nn.Module]] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}
NUM_FRAMES = 8  # of a video, if the checkpoint does not set it


class InternVLVisionPatchEmbeddings(nn.Module):
    def __init__(self, config: "PretrainedConfig") -> None:
        super().__init__()
        patch_size = tuple(config.patch_size)
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[n, channels, height, width] -> [n, d, rows, columns]."""
        return self.projection(pixel_values.to(self.projection.weight.dtype))


class InternVLVisionEmbeddings(nn.Module):
    """A learned class token and patches by a convolution, plus learned positions."""

    def __init__(self, config: "PretrainedConfig") -> None:
        super().__init__()
        self.cls_token = make_parameter(torch.zeros(1, 1, config.hidden_size), default_weight_loader)
        self.patch_embeddings = InternVLVisionPatchEmbeddings(config)
        self.has_positions = config.use_absolute_position_embeddings
        if self.has_positions:
            num_rows, num_columns = patches_per_side(config)
            self.position_embeddings = make_parameter(
                torch.zeros(1, 1 + num_rows * num_columns, config.hidden_size), default_weight_loader
            )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[n, channels, height, width] -> [n, 1 + patches, d]. Positions are interpolated for other sizes."""
        patches = self.patch_embeddings(pixel_values)
        num_rows, num_columns = patches.shape[2:]
        x = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches.flatten(2).transpose(1, 2)), dim=1)
        if not self.has_positions:
            return x
        positions = self.position_embeddings[0]
        return x + torch.cat((positions[:1], interpolate_grid(positions[1:], num_rows, num_columns)))


def patches_per_side(config: "PretrainedConfig") -> tuple[int, int]:
    """Number of patches in each direction, of an image of the tower's size."""
    height, width = config.image_size
    patch_height, patch_width = config.patch_size
    return height // patch_height, width // patch_width


class InternVLVisionLayer(nn.Module):
    """Attention and feed-forward, each after a norm and times a learned factor, each added."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        if config.norm_type not in NORMS:
            raise ValueError(f"vision_config.norm_type must be one of {list(NORMS)}, not {config.norm_type!r}")
        norm_type = NORMS[config.norm_type]
        self.attention = VisionAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("attention", prefix),
            qkv_bias=config.attention_bias,
            qk_normalization=config.use_qk_norm,
        )
        self.mlp = VisionMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, quant_config, add_prefix("mlp", prefix)
        )
        self.layernorm_before = norm_type(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = norm_type(config.hidden_size, eps=config.layer_norm_eps)
        self.lambda_1 = make_parameter(torch.ones(config.hidden_size), default_weight_loader)
        self.lambda_2 = make_parameter(torch.ones(config.hidden_size), default_weight_loader)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.lambda_1 * self.attention(self.layernorm_before(x))
        return x + self.lambda_2 * self.mlp(self.layernorm_after(x))


class InternVLVisionEncoder(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.layer = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: InternVLVisionLayer(config, quant_config, prefix),
            prefix=add_prefix("layer", prefix),
        )

    def forward(self, x: torch.Tensor, wanted: int) -> torch.Tensor:
        states = hidden_states_at(lambda layer, x: layer(x), self.layer, x, [wanted])
        return states[0]


class InternVLVisionModel(nn.Module):
    """A vision transformer with factors that scale each block (InternViT; Chen et al., 2023)."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.embeddings = InternVLVisionEmbeddings(config)
        self.encoder = InternVLVisionEncoder(config, quant_config, add_prefix("encoder", prefix))
        self.layernorm = (
            nn.Identity() if config.use_mean_pooling else LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        )

    def forward(self, pixel_values: torch.Tensor, hidden_layer: int) -> torch.Tensor:
        """[n, channels, height, width] -> [n, 1 + patches, d]: the hidden state of number ``hidden_layer``; -1: the
        last, normed if the tower ends in a norm."""
        x = self.encoder(self.embeddings(pixel_values), hidden_layer)
        return self.layernorm(x) if hidden_layer == -1 else x


class InternVLMultiModalProjector(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        merged_size = config.vision_config.hidden_size * merge_size(config) ** 2
        hidden_size = config.text_config.hidden_size
        self.layer_norm = LayerNorm(merged_size)
        self.linear_1 = ColumnParallelLinear(
            merged_size, hidden_size, quant_config=quant_config, prefix=add_prefix("linear_1", prefix)
        )
        self.linear_2 = RowParallelLinear(
            hidden_size, hidden_size, quant_config=quant_config, prefix=add_prefix("linear_2", prefix)
        )
        self.act = get_act_fn(config.projector_hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.linear_1(self.layer_norm(x))
        x, _ = self.linear_2(self.act(x))
        return x


def merge_size(config: "PretrainedConfig") -> int:
    """Return the side of the squares of patches that are merged into one row.

    Raises:
        ValueError: ``downsample_ratio`` is not one over a whole number.
    """
    size = round(1 / config.downsample_ratio)
    if size < 1 or size * config.downsample_ratio != 1:
        raise ValueError(f"downsample_ratio must be 1, 1/2, 1/4, ..., not {config.downsample_ratio}")
    return size


def pixel_shuffle(x: torch.Tensor, size: int) -> torch.Tensor:
    """[n, rows, columns, d] -> [n, rows / size, columns / size, size * size * d], a square's patches row by row: the
    inverse of the sub-pixel convolution of Shi et al. (2016)."""
    squares = x.unflatten(1, (-1, size)).unflatten(3, (-1, size))
    return squares.transpose(2, 3).flatten(3)


class InternVLModel(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        check_features(config)
        self.feature_layer = config.vision_feature_layer
        self.patch_size = tuple(config.vision_config.patch_size)
        self.merge_size = merge_size(config)
        self.vision_tower = InternVLVisionModel(config.vision_config, quant_config, add_prefix("vision_tower", prefix))
        self.multi_modal_projector = InternVLMultiModalProjector(
            config, quant_config, add_prefix("multi_modal_projector", prefix)
        )
        self.language_model = make_language_model(
            config.text_config, quant_config, add_prefix("language_model", prefix)
        )

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """[n, channels, height, width] -> [n, rows, hidden size of the language model]."""
        device = next(self.vision_tower.parameters()).device
        patches = self.vision_tower(tiles.to(device), self.feature_layer)[:, 1:]
        grid = patches.unflatten(1, (tiles.shape[2] // self.patch_size[0], tiles.shape[3] // self.patch_size[1]))
        return self.multi_modal_projector(pixel_shuffle(grid, self.merge_size).flatten(1, 2))


def check_features(config: "PretrainedConfig") -> None:
    """
    Raises:
        ValueError: the configuration asks for features of several layers, or with the class token.
    """
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"vision_feature_layer must be one number, not {config.vision_feature_layer}")
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy must be 'default', not {config.vision_feature_select_strategy!r}: with "
            "the token of the whole image, features are no grid"
        )
    if config.vision_config.model_type != "internvl_vision":
        raise ValueError(
            f"vision_config.model_type is {config.vision_config.model_type!r}, but InternVL sees through an "
            "internvl_vision"
        )


class InternVLForConditionalGeneration(ImageTextModel):
    rename = RENAME
    ignore = [r"^model\.vision_tower\.embeddings\.mask_token$"]  # of training
    ties_by_default = True
    model: InternVLModel

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        model = InternVLModel(config, quant_config, add_prefix("model", prefix))
        super().__init__(config, model, quant_config, prefix)

    def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Encode items, whose features are [tiles, channels, height, width]."""
        return self._encode(items)

    def get_video_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Encode items, whose features are [frames, channels, height, width]."""
        return self._encode(items)

    def _encode(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        return self.model.encode(torch.stack([tile for item in items for tile in parts_of(item)])).flatten(0, 1)


class InternVLProcessor(LlavaProcessor):
    """Cuts an image into as many tiles as suit its shape, and adds the whole image; a frame of a video is only whole.
    Both have the same placeholder."""

    models = [InternVLForConditionalGeneration]

    def __init__(
        self, hf_config: "PretrainedConfig", server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.start_token = getattr(self.tokenizer, "start_image_token", None) or "<img>"
        self.end_token = getattr(self.tokenizer, "end_image_token", None) or "</img>"
        self.mm_tokens = MultimodalSpecialTokens(
            image_token_id=hf_config.image_token_id,
            video_token=getattr(self.tokenizer, "video_token", None) or "<video>",
            video_token_id=hf_config.image_token_id,
        ).build(_processor)
        num_rows, num_columns = patches_per_side(hf_config.vision_config)
        self.rows_per_tile = num_rows * num_columns // merge_size(hf_config) ** 2

    async def process_mm_data_async(
        self, image_data: Any, audio_data: Any, input_text: str | list[int], request_obj: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        output = await super().process_mm_data_async(image_data, audio_data, input_text, request_obj)
        output.im_start_id = self.tokenizer.convert_tokens_to_ids(self.start_token)
        output.im_end_id = self.tokenizer.convert_tokens_to_ids(self.end_token)
        return output

    @property
    def image_options(self) -> dict[str, Any]:
        return {"crop_to_patches": True}  # as in transformers' processor, whatever preprocessor_config.json has

    @property
    def tile_shape(self) -> list[int]:
        return [self.hf_config.vision_config.num_channels, *self.hf_config.vision_config.image_size]

    def prepared_image(self, height: int, width: int) -> Prepared:
        return self._prepared_tiles(self.image_processor.get_number_of_image_patches(height, width, self.image_options))

    def prepared_video(self, num_frames: int, height: int, width: int) -> Prepared:
        return self._prepared_tiles(num_frames)

    def _prepared_tiles(self, num_tiles: int) -> Prepared:
        return Prepared(num_tiles * self.rows_per_tile, num_tiles * prod(self.tile_shape))

    def image_items(self, images: Sequence[Image.Image]) -> list[MultimodalDataItem]:
        count = self.image_processor.get_number_of_image_patches
        num_tiles = sum(count(image.height, image.width, self.image_options) for image in images)
        self.check_length(Modality.IMAGE, num_tiles * self.rows_per_tile)
        return [self.image_item(image) for image in images]

    def video_item(self, video: VideoFrames) -> MultimodalDataItem:
        self.check_length(Modality.VIDEO, len(video.frames) * self.rows_per_tile)
        output = self._frame_processor(list(video.frames), input_data_format="channels_last", return_tensors="pt")
        return MultimodalDataItem(Modality.VIDEO, output["pixel_values"])

    @cached_property
    def _frame_processor(self) -> PilBackend:
        """The image processor that prepares frames: transformers' own video processor needs torchvision."""
        settings = VIDEO_SETTINGS | self._video_settings
        return PilBackend(**{name: settings[name] for name in VIDEO_SETTINGS})

    @property
    def _video_settings(self) -> dict[str, Any]:
        return getattr(self._processor, "video_settings", {})

    def sample_frames(self, video: VideoInfo) -> Sequence[int]:
        """Take evenly spaced frames, each from the middle of its part of the video, unless ``initial_shift`` is set."""
        settings = self._video_settings
        num_frames = settings.get("num_frames")
        if num_frames is None and settings.get("fps") is not None:
            num_frames = int(video.duration * settings["fps"])
        num_frames = max(1, min(NUM_FRAMES if num_frames is None else num_frames, video.total_frames))
        step = video.total_frames / num_frames
        shift = settings.get("initial_shift", True)
        start = step / 2 if shift is True else float(shift or 0)
        return [min(int(start + i * step), video.total_frames - 1) for i in range(num_frames)]

    def num_feature_rows(self, item: MultimodalDataItem) -> int:
        return len(parts_of(item)) * self.rows_per_tile

    def replacement(self, item: MultimodalDataItem) -> str:
        num_tiles = len(parts_of(item))
        if item.modality is Modality.IMAGE:
            return self._wrapped(num_tiles)
        return "\n".join(f"Frame{i}: {self._wrapped(1)}" for i in range(1, num_tiles + 1))

    def _wrapped(self, num_tiles: int) -> str:
        assert self.mm_tokens.image_token is not None
        return self.start_token + self.mm_tokens.image_token * (num_tiles * self.rows_per_tile) + self.end_token


EntryClass = InternVLForConditionalGeneration
