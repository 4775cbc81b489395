"""Qwen2.5-VL (Bai et al., 2025): Qwen2-VL with attention within windows in most layers of its tower.

The temporal positions of videos are proportional to seconds.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.models_py.qwen2_vl import (
    Grids,
    PatchEmbed,
    PatchMerger,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLProcessor,
    vision_inv_freq,
)
from rtp_llm.srt.layers.mlp import GatedMLP
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.towers.grid import axial_cos_sin, frame_cu_seqlens, patch_positions
from rtp_llm.srt.layers.vision import (
    CosSin,
    VisionAttention,
    VisionAttentionMetadata,
    prepare_vision_attention_metadata,
)
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem
from rtp_llm.srt.multimodal.media import VideoFrames
from rtp_llm.srt.multimodal.qwen_media import grid_of
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class VisionBlock(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, eps=1e-6)
        self.norm2 = RMSNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(
            config.hidden_size,
            config.num_heads,
            config.hidden_size,
            use_qkv_parallel=True,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
            bias=True,
        )

    def forward(self, x: torch.Tensor, metadata: VisionAttentionMetadata, positions: CosSin) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), position_embeddings=positions, forward_metadata=metadata)
        return x + self.mlp(self.norm2(x))


class Qwen2_5_VisionTransformer(nn.Module):
    """Qwen2-VL's tower, with attention within windows of a frame in most layers; patches are ordered by windows."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.merge_size = config.spatial_merge_size
        self.window = config.window_size // config.patch_size // self.merge_size
        if self.window < 1:
            raise ValueError(
                f"window_size {config.window_size} is less than a merged square of {self.merge_size} x "
                f"{self.merge_size} patches of {config.patch_size} pixels"
            )
        self.full_layers = set(config.fullatt_block_indexes)
        self.patch_embed = PatchEmbed(config, config.hidden_size)
        self.inv_freq = vision_inv_freq(config, config.hidden_size // config.num_heads)
        self.blocks = make_layers(
            config.depth,
            lambda idx, prefix: VisionBlock(config, quant_config, prefix),
            prefix=add_prefix("blocks", prefix),
        )
        self.merger = PatchMerger(
            config.out_hidden_size,
            config.hidden_size,
            self.merge_size,
            RMSNorm(config.hidden_size, eps=1e-6),
            quant_config,
            add_prefix("merger", prefix),
        )

    def forward(self, patches: torch.Tensor, grids: Grids) -> torch.Tensor:
        """See ``Qwen2VisionTransformer``."""
        device, square = patches.device, self.merge_size**2
        order, cu_window_seqlens = window_order(grids, self.merge_size, self.window)
        patch_order = (order[:, None] * square + torch.arange(square)).flatten().to(device)
        x = self.patch_embed(patches[patch_order])
        positions = axial_cos_sin(patch_positions(grids, self.merge_size, device)[patch_order], self.inv_freq)
        frames = prepare_vision_attention_metadata(frame_cu_seqlens(grids), device)
        windows = prepare_vision_attention_metadata(cu_window_seqlens, device)
        for i, block in enumerate(self.blocks):
            x = block(x, frames if i in self.full_layers else windows, positions)
        return self.merger(x)[order.argsort().to(device)]


def window_order(grids: Grids, merge_size: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort merged squares by windows of ``window`` x ``window`` of them; at a frame's edge a window is smaller.

    Returns:
        [merged squares] int64: the square at each place.
        [windows + 1] int32: bounds of the windows, in patches.
    """
    windows = []
    num_windows = 0
    for num_frames, num_rows, num_columns in grids:
        rows = torch.arange(num_rows // merge_size, device="cpu") // window
        columns = torch.arange(num_columns // merge_size, device="cpu") // window
        per_row, per_column = int(columns[-1]) + 1, int(rows[-1]) + 1
        frames = torch.arange(num_frames, device="cpu") * per_row * per_column
        windows.append((frames[:, None, None] + rows[:, None] * per_row + columns).flatten() + num_windows)
        num_windows += num_frames * per_row * per_column
    window_of = torch.cat(windows)
    ends = (window_of.bincount() * merge_size**2).cumsum(0)
    bounds = torch.cat((torch.zeros(1, dtype=ends.dtype, device="cpu"), ends))
    return window_of.argsort(stable=True), bounds.to(torch.int32)


class Qwen2_5_VLModel(Qwen2VLModel):
    vision_type = Qwen2_5_VisionTransformer


class Qwen2_5_VLForConditionalGeneration(Qwen2VLForConditionalGeneration):
    model_type = Qwen2_5_VLModel


class Qwen2_5_VLProcessor(Qwen2VLProcessor):
    """Adds the seconds between the frames of a video's grid, for its temporal positions."""

    models = [Qwen2_5_VLForConditionalGeneration]

    def video_item(self, video: VideoFrames) -> MultimodalDataItem:
        item = super().video_item(video)
        seconds = self.video.temporal_patch_size * video.duration / len(video.frames)
        item.second_per_grid_ts = torch.tensor([seconds])
        return item

    def position_grids(self, item: MultimodalDataItem) -> list[tuple[tuple[int, int, int], torch.Tensor | float]]:
        if item.modality is Modality.IMAGE:
            return [(grid_of(item), 1.0)]
        seconds = torch.as_tensor(item.model_specific_data.get("second_per_grid_ts", 1.0)).flatten()[0]
        return [(grid_of(item), self.hf_config.vision_config.tokens_per_second * seconds)]


EntryClass = Qwen2_5_VLForConditionalGeneration
