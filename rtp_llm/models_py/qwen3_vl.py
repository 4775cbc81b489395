"""Qwen3-VL (Bai et al., 2025): Qwen3 with a tower, inner layers of which are added after the first language layers.

The latter is DeepStack (Meng et al., 2024).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from rtp_llm.models_py.llama import LlamaModel
from rtp_llm.models_py.qwen2_vl import (
    Grids,
    PatchEmbed,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLProcessor,
    make_mrope,
    vision_inv_freq,
)
from rtp_llm.models_py.qwen3 import Qwen3Attention
from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.rotary import RotaryEmbedding
from rtp_llm.srt.layers.towers.grid import axial_cos_sin, frame_cu_seqlens, interpolate_grid, patch_positions
from rtp_llm.srt.layers.vision import (
    CosSin,
    VisionAttention,
    VisionAttentionMetadata,
    prepare_vision_attention_metadata,
)
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem
from rtp_llm.srt.multimodal.media import VideoFrames, VideoInfo
from rtp_llm.srt.multimodal.qwen_media import check_aspect, fit_size, grid_of, patch_times
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch


class VisionMLP(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        output_size: int,
        hidden_act: str,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.linear_fc1 = ColumnParallelLinear(
            hidden_size, intermediate_size, quant_config=quant_config, prefix=add_prefix("linear_fc1", prefix)
        )
        self.linear_fc2 = RowParallelLinear(
            intermediate_size, output_size, quant_config=quant_config, prefix=add_prefix("linear_fc2", prefix)
        )
        self.act_fn = get_act_fn(hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.linear_fc1(x)
        x, _ = self.linear_fc2(self.act_fn(x))
        return x


class PatchMerger(VisionMLP):
    """Merges ``spatial_merge_size`` squared neighbouring patches into one token of the language model.

    ``norms_merged``: the norm is over a merged square, not over each patch.
    """

    def __init__(
        self,
        config: "PretrainedConfig",
        norms_merged: bool,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        merged_size = config.hidden_size * config.spatial_merge_size**2
        super().__init__(merged_size, merged_size, config.out_hidden_size, "gelu", quant_config, prefix)
        self.norm = nn.LayerNorm(merged_size if norms_merged else config.hidden_size, eps=1e-6)
        self.merged_size = merged_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x.view(-1, *self.norm.normalized_shape))
        return super().forward(x.view(-1, self.merged_size))


class VisionBlock(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(
            config.hidden_size,
            config.num_heads,
            config.hidden_size,
            use_qkv_parallel=True,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )
        self.mlp = VisionMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
        )

    def forward(self, x: torch.Tensor, metadata: VisionAttentionMetadata, positions: CosSin) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), position_embeddings=positions, forward_metadata=metadata)
        return x + self.mlp(self.norm2(x))


class Qwen3VisionTransformer(nn.Module):
    """Qwen2-VL's tower, with learned positions besides the rotation. It also returns the hidden states of layers
    ``deepstack_visual_indexes``, if there are any, each through its own merger."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.merge_size = config.spatial_merge_size
        self.deepstack_layers = list(getattr(config, "deepstack_visual_indexes", ()))
        _check_deepstack(self.deepstack_layers, config.depth)
        self.patch_embed = PatchEmbed(config, config.hidden_size, bias=True)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.inv_freq = vision_inv_freq(config, config.hidden_size // config.num_heads)
        self.blocks = make_layers(
            config.depth,
            lambda idx, prefix: VisionBlock(config, quant_config, prefix),
            prefix=add_prefix("blocks", prefix),
        )
        self.merger = PatchMerger(config, False, quant_config, add_prefix("merger", prefix))
        self.deepstack_merger_list = make_layers(
            len(self.deepstack_layers),
            lambda idx, prefix: PatchMerger(config, True, quant_config, prefix),
            prefix=add_prefix("deepstack_merger_list", prefix),
        )

    def forward(self, patches: torch.Tensor, grids: Grids) -> torch.Tensor:
        """As in ``Qwen2VisionTransformer``, but [patches / merge_size squared, out_hidden_size * (1 + k)]: those of k
        inner layers follow."""
        x = self.patch_embed(patches)
        x = x + self._learned_positions(grids, x.device).to(x.dtype)
        positions = axial_cos_sin(patch_positions(grids, self.merge_size, x.device), self.inv_freq)
        metadata = prepare_vision_attention_metadata(frame_cu_seqlens(grids), x.device)
        seen = {}
        for i, block in enumerate(self.blocks):
            x = block(x, metadata, positions)
            if i in self.deepstack_layers:
                seen[i] = x
        views = zip(self.deepstack_merger_list, self.deepstack_layers, strict=True)
        return torch.cat([self.merger(x), *[merger(seen[i]) for merger, i in views]], dim=-1)

    def _learned_positions(self, grids: Grids, device: torch.device) -> torch.Tensor:
        """[patches, hidden_size]: the square table of positions, interpolated to each image's grid, corners aligned."""
        table = self.pos_embed.weight
        found = []
        for grid in grids:
            _, num_rows, num_columns = grid
            stretched = interpolate_grid(table, num_rows, num_columns, mode="bilinear", align_corners=True)
            rows, columns = patch_positions([grid], self.merge_size, device).unbind(1)
            found.append(stretched[rows * num_columns + columns])
        return torch.cat(found)


def _check_deepstack(layers: list[int], depth: int) -> None:
    if sorted(set(layers)) != layers or any(not 0 <= layer < depth for layer in layers):
        raise ValueError(f"deepstack_visual_indexes {layers} must rise, within the {depth} layers of the tower")


class Qwen3VLAttention(Qwen3Attention):
    def make_rope(self, config: "PretrainedConfig", layer_id: int) -> RotaryEmbedding:
        return make_mrope(config, self.head_dim, (24, 20, 20), interleaved=True)


class Qwen3VLTextModel(LlamaModel):
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: "ForwardBatch",
        input_embeds: torch.Tensor | None = None,
        input_deepstack_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``input_deepstack_embeds``: [T, hidden_size * k], a part of it added after each of the first k layers."""
        hidden_states = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        hidden_size, additions = hidden_states.shape[-1], []
        if input_deepstack_embeds is not None:
            num_additions = input_deepstack_embeds.shape[-1] // hidden_size
            additions = list(input_deepstack_embeds.unflatten(-1, (num_additions, hidden_size)).unbind(1))
        residual = None
        for i, layer in enumerate(self.layers):
            hidden_states, residual = layer(positions, hidden_states, forward_batch, residual)
            if i < len(additions):
                hidden_states = hidden_states + additions[i]
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class Qwen3VLModel(Qwen2VLModel):
    vision_type = Qwen3VisionTransformer
    language_type = Qwen3VLTextModel
    attention_type = Qwen3VLAttention


class Qwen3VLForConditionalGeneration(Qwen2VLForConditionalGeneration):
    model_type = Qwen3VLModel
    use_deepstack = {Modality.IMAGE: True, Modality.VIDEO: True}


class Qwen3VLProcessor(Qwen2VLProcessor):
    """Places each frame of a video separately in the prompt, after its time as text. A video's bounds of pixels are for
    all frames together."""

    models = [Qwen3VLForConditionalGeneration]
    video_defaults = {
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "max_video_tokens": 768,  # of a frame
    }

    def replacement(self, item: MultimodalDataItem) -> str:
        if item.modality is Modality.IMAGE:
            return super().replacement(item)
        num_times, num_rows, num_columns = grid_of(item)
        timestamps = item.model_specific_data.get("timestamps", ())
        if len(timestamps) != num_times:
            raise InvalidRequest(f"timestamps must be {num_times} numbers of seconds, not {timestamps}", "video_data")
        start, end = self.tokenizer.convert_ids_to_tokens(
            [self.hf_config.vision_start_token_id, self.hf_config.vision_end_token_id]
        )
        frame = f"{start}{(self.mm_tokens.video_token or '') * (num_rows * num_columns // self.merge_size**2)}{end}"
        return "".join(f"<{seconds:.1f} seconds>{frame}" for seconds in timestamps)

    def sample_frames(self, video: VideoInfo) -> Sequence[int]:
        """Take evenly spaced frames, from the first to the last."""
        count = max(int(min(self.video.num_frames(video), video.total_frames)), 1)
        return np.linspace(0, video.total_frames - 1, count).round().astype(int).tolist()

    def video_item(self, video: VideoFrames) -> MultimodalDataItem:
        item = super().video_item(video)
        item.timestamps = patch_times(video.indices, video.fps, self.video.temporal_patch_size)
        return item

    def frame_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        video = self.video
        max_pixels = video.max_pixels
        if video.caps_pixels:
            share = min(video.max_video_tokens * video.factor**2, max_pixels // num_frames)
            max_pixels = max(share, int(video.min_pixels * 1.05)) * num_frames
        check_aspect(height, width, "video_data")
        if min(height, width) < video.factor:
            scale = max(video.factor / height, video.factor / width)
            height, width = int(height * scale), int(width * scale)
        step = video.temporal_patch_size
        num_rounded = max(round(num_frames / step), 1) * step
        return fit_size(height, width, video.factor, video.min_pixels, max_pixels, num_frames, num_rounded)

    def position_grids(self, item: MultimodalDataItem) -> list[tuple[tuple[int, int, int], torch.Tensor | float]]:
        num_times, num_rows, num_columns = grid_of(item)
        return [((1, num_rows, num_columns), 1.0)] * num_times


EntryClass = Qwen3VLForConditionalGeneration
