"""Qwen2-VL (Wang et al., 2024): Qwen2 with images of any size and videos, and multimodal rotary positions."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from rtp_llm.models_py.llama import LlamaDecoderLayer, LlamaModel
from rtp_llm.models_py.qwen2 import Qwen2Attention
from rtp_llm.srt.layers.image_text import ImageTextModel
from rtp_llm.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.mlp import VisionMLP
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import RotaryEmbedding, get_rope, get_rope_config
from rtp_llm.srt.layers.towers.grid import axial_cos_sin, axial_inv_freq, frame_cu_seqlens, patch_positions
from rtp_llm.srt.layers.vision import (
    CosSin,
    VisionAttention,
    VisionAttentionMetadata,
    prepare_vision_attention_metadata,
)
from rtp_llm.srt.multimodal.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens
from rtp_llm.srt.multimodal.estimates import Prepared
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalProcessorOutput
from rtp_llm.srt.multimodal.media import VideoFrames, VideoInfo
from rtp_llm.srt.multimodal.qwen_media import (
    Segment,
    VideoSettings,
    check_aspect,
    fit_size,
    grid_of,
    mrope_positions,
    patchify,
)
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Grids = Sequence[Sequence[int]]  # (frames, rows, columns) of each image or video, in patches


class PatchEmbed(nn.Module):
    """[patches, channels * frames * height * width] -> [patches, embed_dim]: a convolution whose stride is its size."""

    def __init__(self, config: "PretrainedConfig", embed_dim: int, bias: bool = False) -> None:
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, embed_dim, kernel_size=size, stride=size, bias=bias)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class VisionBlock(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = VisionAttention(
            config.embed_dim,
            config.num_heads,
            config.embed_dim,
            use_qkv_parallel=True,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )
        self.mlp = VisionMLP(
            config.embed_dim,
            int(config.embed_dim * config.mlp_ratio),
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
        )

    def forward(self, x: torch.Tensor, metadata: VisionAttentionMetadata, positions: CosSin) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), position_embeddings=positions, forward_metadata=metadata)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Merges ``spatial_merge_size`` squared neighbouring patches into one token of the language model."""

    def __init__(
        self,
        hidden_size: int,
        embed_dim: int,
        merge_size: int,
        norm: nn.Module,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.merged_size = embed_dim * merge_size**2
        self.ln_q = norm
        self.mlp = nn.ModuleList(
            [
                ColumnParallelLinear(
                    self.merged_size, self.merged_size, quant_config=quant_config, prefix=add_prefix("mlp.0", prefix)
                ),
                nn.GELU(),
                RowParallelLinear(
                    self.merged_size, hidden_size, quant_config=quant_config, prefix=add_prefix("mlp.2", prefix)
                ),
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, activation, last = self.mlp
        x, _ = first(self.ln_q(x).view(-1, self.merged_size))
        x, _ = last(activation(x))
        return x


class Qwen2VisionTransformer(nn.Module):
    """The vision tower: patches of images or videos -> rows for the language model. A frame sees only itself."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.merge_size = config.spatial_merge_size
        self.patch_embed = PatchEmbed(config, config.embed_dim)
        self.inv_freq = vision_inv_freq(config, config.embed_dim // config.num_heads)
        self.blocks = make_layers(
            config.depth,
            lambda idx, prefix: VisionBlock(config, quant_config, prefix),
            prefix=add_prefix("blocks", prefix),
        )
        self.merger = PatchMerger(
            config.hidden_size,
            config.embed_dim,
            self.merge_size,
            nn.LayerNorm(config.embed_dim, eps=1e-6),
            quant_config,
            add_prefix("merger", prefix),
        )

    def forward(self, patches: torch.Tensor, grids: Grids) -> torch.Tensor:
        """
        Args:
            patches: [patches of all, values of a patch], those of a merged square together.
            grids: of each image or video.

        Returns:
            [patches / merge_size squared, hidden_size].
        """
        x = self.patch_embed(patches)
        positions = axial_cos_sin(patch_positions(grids, self.merge_size, x.device), self.inv_freq)
        metadata = prepare_vision_attention_metadata(frame_cu_seqlens(grids), x.device)
        for block in self.blocks:
            x = block(x, metadata, positions)
        return self.merger(x)


def vision_inv_freq(config: "PretrainedConfig", head_dim: int) -> torch.Tensor:
    """[head_dim / 4], see ``axial_inv_freq``."""
    rope_theta, _, _ = get_rope_config(config)
    return axial_inv_freq(head_dim, rope_theta)


def make_mrope(
    config: "PretrainedConfig",
    head_dim: int,
    mrope_section: Sequence[int],
    interleaved: bool = False,
    is_partial: bool = False,
) -> RotaryEmbedding:
    """Make the rotary embedding.

    Args:
        mrope_section: the default, if the configuration has none.
        is_partial: whether ``partial_rotary_factor`` is heeded; else whole heads are rotated.
    """
    rope_theta, rope_scaling, partial_rotary_factor = get_rope_config(config)
    return get_rope(
        head_dim,
        max_position=config.max_position_embeddings,
        base=rope_theta,
        rope_scaling={"mrope_section": mrope_section} | (rope_scaling or {}) | {"mrope_interleaved": interleaved},
        partial_rotary_factor=partial_rotary_factor if is_partial else 1.0,
    )


class Qwen2VLAttention(Qwen2Attention):
    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> RotaryEmbedding:
        return make_mrope(config, self.head_dim, (16, 24, 24))


class Qwen2VLModel(nn.Module):
    vision_type: type[nn.Module] = Qwen2VisionTransformer
    language_type: type[LlamaModel] = LlamaModel
    attention_type: type[nn.Module] = Qwen2VLAttention
    layer_type: type[nn.Module] = LlamaDecoderLayer

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.visual = self.vision_type(config.vision_config, quant_config, add_prefix("visual", prefix))
        self.language_model = self.language_type(
            config.text_config,
            quant_config,
            add_prefix("language_model", prefix),
            self.attention_type,
            self.layer_type,
        )


class Qwen2VLForConditionalGeneration(ImageTextModel):
    # As released, before transformers put both towers below ``model``.
    rename = [(r"^visual\.", "model.visual."), (r"^model\.(?!visual\.|language_model\.)", "model.language_model.")]
    model_type: type[nn.Module] = Qwen2VLModel

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        model = self.model_type(config, quant_config, add_prefix("model", prefix))
        super().__init__(config, model, quant_config, prefix)

    def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        return self._encode(items, [item.image_grid_thw for item in items])

    def get_video_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        return self._encode(items, [item.video_grid_thw for item in items])

    def _encode(self, items: list[MultimodalDataItem], grids: list[torch.Tensor]) -> torch.Tensor:
        visual = self.model.get_submodule("visual")
        device = next(visual.parameters()).device
        patches = torch.cat([torch.as_tensor(item.feature) for item in items]).to(device)
        return visual(patches, [grid for item_grids in grids for grid in item_grids.view(-1, 3).tolist()])


class Qwen2VLProcessor(BaseMultimodalProcessor):
    """Prepares images by transformers' image processor, and videos as its video processor does, which needs
    torchvision; ``video_defaults`` are for settings that the checkpoint does not have."""

    models = [Qwen2VLForConditionalGeneration]
    video_defaults: ClassVar[Mapping[str, Any]] = {
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},  # pixels of a frame, not edges
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_video_tokens": 128_000,
    }

    def __init__(self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.mm_tokens = MultimodalSpecialTokens(
            image_token_id=hf_config.image_token_id, video_token_id=hf_config.video_token_id
        ).build(_processor)
        self.merge_size = hf_config.vision_config.spatial_merge_size
        self.video = VideoSettings(self.video_defaults, getattr(_processor, "video_settings", {}), hf_config)

    async def process_mm_data_async(
        self, image_data: Any, audio_data: Any, input_text: str | list[int], request_obj: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        output = await self.process(image_data, audio_data, input_text, request_obj)
        output.im_start_id = self.hf_config.vision_start_token_id
        output.im_end_id = self.hf_config.vision_end_token_id
        for item in output.mm_items:
            self._check_rows(item)
        segments = [segment for item in output.mm_items for segment in self._segments(item)]
        positions, delta = mrope_positions(len(output.input_ids), segments, self.merge_size)
        output.mrope_positions, output.mrope_position_delta = positions, delta
        return output

    def replacement(self, item: MultimodalDataItem) -> str:
        is_image = item.modality is Modality.IMAGE
        token = self.mm_tokens.image_token if is_image else self.mm_tokens.video_token
        assert token is not None
        num_frames, num_rows, num_columns = grid_of(item)
        return token * (num_frames * num_rows * num_columns // self.merge_size**2)

    def prepared_image(self, height: int, width: int) -> Prepared:
        check_aspect(height, width, "image_data")
        return self._prepared_patches(self.hf_image_processor.get_number_of_image_patches(height, width))

    def prepared_video(self, num_frames: int, height: int, width: int) -> Prepared:
        num_times, num_rows, num_columns = self.video.grid(num_frames, *self.frame_size(num_frames, height, width))
        return self._prepared_patches(num_times * num_rows * num_columns)

    def _prepared_patches(self, num_patches: int) -> Prepared:
        return Prepared(num_patches // self.merge_size**2, num_patches * self._patch_values)

    def image_item(self, image: Image.Image) -> MultimodalDataItem:
        check_aspect(image.height, image.width, "image_data")
        return super().image_item(image)

    def sample_frames(self, video: VideoInfo) -> Sequence[int]:
        """Take evenly spaced frames, from the first on; their number is a multiple of a patch's frames."""
        step = self.video.temporal_patch_size
        wanted = self.video.num_frames(video)
        if self.video.fixed_num_frames is not None:
            wanted = round(wanted / step) * step
        count = max(int(min(wanted, video.total_frames)) // step * step, 1)
        return [int(i * video.total_frames / count) for i in range(count)]

    def video_item(self, video: VideoFrames) -> MultimodalDataItem:
        num_frames, height, width = video.frames.shape[:3]
        size = self.frame_size(num_frames, height, width)
        self._check_length(self.video.grid(num_frames, *size))
        frames = self.video.prepared(video.frames, size)
        patches, grid = patchify(frames, self.video.patch_size, self.video.merge_size, self.video.temporal_patch_size)
        return MultimodalDataItem(Modality.VIDEO, patches, video_grid_thw=torch.tensor([grid]))

    def frame_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Return height and width that a video's frames are resized to."""
        video = self.video
        max_pixels = video.max_pixels
        if video.caps_pixels:
            share = int(video.max_video_tokens * video.factor**2 * 0.9) * video.temporal_patch_size // num_frames
            max_pixels = max(min(max_pixels, share), int(video.min_pixels * 1.05))
        check_aspect(height, width, "video_data")
        return fit_size(height, width, video.factor, video.min_pixels, max_pixels)

    def _check_length(self, grid: tuple[int, int, int]) -> None:
        """Raise InvalidRequest if a grid has too many tokens, before pixels are processed."""
        num_tokens = grid[0] * grid[1] * grid[2] // self.merge_size**2
        limit = getattr(self.server_args, "context_length", None)
        limit = limit or self.hf_config.get_text_config().max_position_embeddings
        if num_tokens > limit:
            raise InvalidRequest(
                f"the video takes {num_tokens} tokens, and the model's context has {limit}: choose fewer frames (fps, "
                "max_frames)",
                "video_data",
            )

    def _check_rows(self, item: MultimodalDataItem) -> None:
        """Raise InvalidRequest if features that the caller has made do not fit their grid."""
        num_frames, num_rows, num_columns = grid_of(item)
        name = item.modality.value
        if num_rows % self.merge_size or num_columns % self.merge_size:
            raise InvalidRequest(
                f"rows and columns of {name}_grid_thw must be multiples of {self.merge_size}, not {num_rows} and "
                f"{num_columns}",
                f"{name}_data",
            )
        num_patches = num_frames * num_rows * num_columns
        expected = [num_patches, self._patch_values]
        given = item.feature
        if item.precomputed_embeddings is not None:
            expected, given = [num_patches // self.merge_size**2, self._embedding_size], item.precomputed_embeddings
        shape = list(given.shape) if isinstance(given, torch.Tensor) else None
        if shape != expected:
            raise InvalidRequest(
                f"for the grid ({num_frames}, {num_rows}, {num_columns}) the {name} must be {expected}, not {shape}",
                f"{name}_data",
            )

    @property
    def _patch_values(self) -> int:
        vision = self.hf_config.vision_config
        return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    @property
    def _embedding_size(self) -> int:
        """Size of a token's embedding: the first layer's input, and the values that are added after other layers."""
        num_views = len(getattr(self.hf_config.vision_config, "deepstack_visual_indexes", ()))
        return self.hf_config.get_text_config().hidden_size * (1 + num_views)

    def _segments(self, item: MultimodalDataItem) -> list[Segment]:
        """Return the places of an item's tokens, with the grid and interval of their positions.

        Raises:
            InvalidRequest: a caller's own placeholders do not fit the grid.
        """
        positions = item.positions
        grids = self.position_grids(item)
        segments = []
        start = 0
        for grid, interval in grids:
            end = start + grid[0] * grid[1] * grid[2] // self.merge_size**2
            if end > len(positions) or positions[end - 1] - positions[start] != end - 1 - start:
                break
            segments.append(Segment(positions[start], grid, interval))
            start = end
        if start != len(positions) or len(segments) != len(grids):
            name = item.modality.value
            raise InvalidRequest(
                f"the prompt's {len(positions)} tokens for a {name} do not fit its grid {grid_of(item)}", f"{name}_data"
            )
        return segments

    def position_grids(self, item: MultimodalDataItem) -> list[tuple[tuple[int, int, int], torch.Tensor | float]]:
        """Return the grid and interval of each of an item's segments."""
        return [(grid_of(item), 1.0)]


EntryClass = Qwen2VLForConditionalGeneration
