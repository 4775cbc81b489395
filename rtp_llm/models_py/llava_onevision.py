"""LLaVA-OneVision (Li et al., 2024): LLaVA-NeXT with a limit of tiles, for several images and for videos."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from rtp_llm.models_py.llava import num_features, parts_of, within
from rtp_llm.models_py.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
    features_per_side,
)
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.multimodal.base_processor import MultimodalSpecialTokens
from rtp_llm.srt.multimodal.estimates import Prepared
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem
from rtp_llm.srt.multimodal.media import VideoFrames, VideoInfo, uniform_indices
from rtp_llm.srt.multimodal.processor_output import one_item, split_item

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_FRAMES = 32  # of a video, as in the model's training

# Preparation of frames, for settings that the checkpoint does not have.
VIDEO_SETTINGS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": 384, "width": 384},
    "default_to_square": False,
    "resample": PILImageResampling.BICUBIC,
    "do_center_crop": None,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": OPENAI_CLIP_MEAN,
    "image_std": OPENAI_CLIP_STD,
}


def max_tiles(config: "PretrainedConfig") -> int:
    """Return the number of tiles whose features an image may have, besides those of the whole image.

    Raises:
        ValueError: ``vision_aspect_ratio`` names no such number.
    """
    limit = re.fullmatch(r"anyres_max_([1-9]\d*)", config.vision_aspect_ratio)
    if limit is None:
        raise ValueError(f"vision_aspect_ratio must be anyres_max_ and a number, not {config.vision_aspect_ratio!r}")
    return int(limit[1])


def pooled_side(config: "PretrainedConfig") -> int:
    """Number of features of a video's frame, in each direction."""
    return ceil(features_per_side(config) / 2)


class LlavaOnevisionModel(LlavaNextModel):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.max_tiles = max_tiles(config)

    def pack_video(self, features: torch.Tensor) -> torch.Tensor:
        """[frames, side ** 2, hidden_size] -> [rows, hidden_size]: frames with half as many features in each direction,
        and a newline after the last."""
        side, pooled = features_per_side(self.config), pooled_side(self.config)
        frames = features.transpose(1, 2).unflatten(2, (side, side))
        frames = F.interpolate(frames, (pooled, pooled), mode="bilinear")
        return torch.cat((frames.flatten(2).transpose(1, 2).flatten(0, 1), self.image_newline[None]))


class LlavaOnevisionForConditionalGeneration(LlavaNextForConditionalGeneration):
    model_type: type[LlavaOnevisionModel] = LlavaOnevisionModel
    model: LlavaOnevisionModel

    def get_video_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Encode items, whose features are [videos, frames, channels, height, width], in the tower's size."""
        videos = [video for item in items for video in parts_of(item)]
        features = self.model.encode(torch.cat(videos)).split([len(video) for video in videos])
        return torch.cat([self.model.pack_video(video) for video in features])


class LlavaOnevisionProcessor(LlavaNextProcessor):
    """Cuts an image into tiles only if it is the only one in its prompt, as transformers does."""

    models = [LlavaOnevisionForConditionalGeneration]

    def __init__(
        self, hf_config: "PretrainedConfig", server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.max_tiles = max_tiles(hf_config)
        self.mm_tokens = MultimodalSpecialTokens(
            image_token_id=hf_config.image_token_id, video_token_id=hf_config.video_token_id
        ).build(_processor)

    def prepared_image(self, height: int, width: int) -> Prepared:
        """Return the prepared size of an image; one of several has fewer tokens."""
        return replace(super().prepared_image(height, width), num_tokens=num_features(self.hf_config) + 1)

    def prepared_video(self, num_frames: int, height: int, width: int) -> Prepared:
        return Prepared(self.num_video_rows(num_frames), num_frames * prod(self.tile_shape))

    def image_items(self, images: Sequence[Image.Image]) -> list[MultimodalDataItem]:
        if len(images) == 1:
            return super().image_items(images)
        self.check_length(Modality.IMAGE, len(images) * (num_features(self.hf_config) + 1))
        chat = [within(image) for image in images]
        output = self.image_processor(images=[chat], return_tensors="pt")
        output.pop("batch_num_images")  # the number is known
        return split_item(one_item(Modality.IMAGE, output), len(images))

    def video_item(self, video: VideoFrames) -> MultimodalDataItem:
        self.check_length(Modality.VIDEO, self.num_video_rows(len(video.frames)))
        frames = self._video_processor(list(video.frames), input_data_format="channels_last", return_tensors="pt")
        return MultimodalDataItem(Modality.VIDEO, frames["pixel_values"][None])

    def num_video_rows(self, num_frames: int) -> int:
        return num_frames * pooled_side(self.hf_config) ** 2 + 1

    def num_feature_rows(self, item: MultimodalDataItem) -> int:
        if item.modality is Modality.IMAGE:
            return super().num_feature_rows(item)
        return sum(self.num_video_rows(len(video)) for video in parts_of(item))

    @cached_property
    def _video_processor(self) -> PilBackend:
        """The image processor that prepares frames: transformers' own video processor needs torchvision."""
        settings = VIDEO_SETTINGS | getattr(self._processor, "video_settings", {})
        return PilBackend(**{name: settings[name] for name in VIDEO_SETTINGS})

    def sample_frames(self, video: VideoInfo) -> Sequence[int]:
        return uniform_indices(video, max_frames=MAX_FRAMES)


EntryClass = LlavaOnevisionForConditionalGeneration
