"""Gemma 4 (Google DeepMind, 2026), with images: a tower for images of any shape, whose squares of patches are averaged.

The tower of sounds, which some checkpoints have, is left out: prompts with sounds are refused.
"""

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from rtp_llm.models_py.gemma4 import (
    Gemma4ForCausalLM,
    Gemma4Model,
    Gemma4RMSNorm,
    norm_without_weight,
    unused_by_shared_layers,
)
from rtp_llm.srt.distributed.parallel_state import divide, get_tp_group
from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.srt.layers.encoder_attention import MMEncoderAttention
from rtp_llm.srt.layers.image_text import ImageTextModel
from rtp_llm.srt.layers.linear import ColumnParallelLinear, LinearBase, ReplicatedLinear, RowParallelLinear
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.towers.grid import axial_cos_sin, axial_inv_freq, frame_cu_seqlens
from rtp_llm.srt.layers.vision import CosSin
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter
from rtp_llm.srt.multimodal.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens
from rtp_llm.srt.multimodal.estimates import Prepared
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalProcessorOutput
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.srt.utils import add_prefix, make_layers

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import ForwardBatch

MOST_TOKENS = 1120  # of an image, in any of the sizes that the image processor may be set to


class ClippedLinear(nn.Module):
    """A linear layer whose inputs and outputs are kept within bounds, which checkpoints have in some sizes."""

    input_min: torch.Tensor
    input_max: torch.Tensor
    output_min: torch.Tensor
    output_max: torch.Tensor

    def __init__(self, linear: LinearBase, is_clipped: bool) -> None:
        super().__init__()
        self.linear, self.is_clipped = linear, is_clipped
        if is_clipped:
            for side in ("input", "output"):
                self.register_buffer(f"{side}_min", torch.tensor(float("-inf")))
                self.register_buffer(f"{side}_max", torch.tensor(float("inf")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_clipped:
            return self.linear(x)[0]
        x, _ = self.linear(x.clamp(self.input_min, self.input_max))
        return x.clamp(self.output_min, self.output_max)


def make_clipped(
    kind: type[ColumnParallelLinear] | type[RowParallelLinear],
    config: "PretrainedConfig",
    sizes: tuple[int, int],
    quant_config: QuantizationConfig | None,
    prefix: str,
) -> ClippedLinear:
    """Make a layer of a tower. ``sizes``: of input and output, on all ranks."""
    linear = kind(*sizes, bias=False, quant_config=quant_config, prefix=add_prefix("linear", prefix))
    return ClippedLinear(linear, config.use_clipped_linears)


def rotate_by_place(x: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
    """[T, heads, head_dim] -> the same: the first half of each head turns by the patch's column, the second by its row.

    Pairs are a quarter of the head apart; ``cos_sin``: [T, head_dim / 2] each, a quarter for each half.
    """
    cos, sin = (table.float().unflatten(-1, (1, 2, -1)) for table in cos_sin)
    first, second = x.float().unflatten(-1, (2, 2, -1)).unbind(-2)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-3).to(x.dtype)


class Gemma4VisionAttention(nn.Module):
    """Attention of patches to all of their image, with normed queries, keys and values; scores are not scaled."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        ranks, name = get_tp_group().world_size, prefix or type(self).__name__
        num_heads = divide(config.num_attention_heads, ranks, f"{name}: number of attention heads")
        num_kv_heads = divide(config.num_key_value_heads, ranks, f"{name}: number of key/value heads")
        hidden_size = config.hidden_size
        q_size, kv_size = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        for projection, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
            sizes, place = (hidden_size, size), add_prefix(projection, prefix)
            self.add_module(projection, make_clipped(ColumnParallelLinear, config, sizes, quant_config, place))
        place = add_prefix("o_proj", prefix)
        self.o_proj = make_clipped(RowParallelLinear, config, (q_size, hidden_size), quant_config, place)
        self.q_norm = Gemma4RMSNorm(self.head_dim, self.eps)
        self.k_norm = Gemma4RMSNorm(self.head_dim, self.eps)
        self.attn = MMEncoderAttention(num_heads, self.head_dim, scale=1.0, num_kv_heads=num_kv_heads)

    def forward(self, x: torch.Tensor, cos_sin: CosSin, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> the same; ``cu_seqlens``: bounds of images."""
        q, k, v = (
            self.get_submodule(name)(x).unflatten(-1, (-1, self.head_dim)) for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rotate_by_place(self.q_norm(q), cos_sin), rotate_by_place(self.k_norm(k), cos_sin)
        attended = self.attn(q[None], k[None], norm_without_weight(v, self.eps)[None], cu_seqlens)
        return self.o_proj(attended[0].flatten(1))


class Gemma4VisionMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        wide, narrow = config.intermediate_size, config.hidden_size
        for name in ("gate_proj", "up_proj"):
            place = add_prefix(name, prefix)
            self.add_module(name, make_clipped(ColumnParallelLinear, config, (narrow, wide), quant_config, place))
        place = add_prefix("down_proj", prefix)
        self.down_proj = make_clipped(RowParallelLinear, config, (wide, narrow), quant_config, place)
        self.act_fn = get_act_fn(config.hidden_activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (self.get_submodule(name)(x) for name in ("gate_proj", "up_proj"))
        return self.down_proj(self.act_fn(gate) * up)


class Gemma4VisionLayer(nn.Module):
    """Attention and feed-forward, each between two norms and added."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.self_attn = Gemma4VisionAttention(config, quant_config, add_prefix("self_attn", prefix))
        self.mlp = Gemma4VisionMLP(config, quant_config, add_prefix("mlp", prefix))
        norm_args = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Gemma4RMSNorm(*norm_args)
        self.post_attention_layernorm = Gemma4RMSNorm(*norm_args)
        self.pre_feedforward_layernorm = Gemma4RMSNorm(*norm_args)
        self.post_feedforward_layernorm = Gemma4RMSNorm(*norm_args)

    def forward(self, x: torch.Tensor, cos_sin: CosSin, cu_seqlens: torch.Tensor) -> torch.Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos_sin, cu_seqlens))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma4PatchEmbedder(nn.Module):
    """Projects patches, and adds the learned positions of their columns and of their rows."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.input_proj = ReplicatedLinear(
            3 * config.patch_size**2,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("input_proj", prefix),
        )
        table = torch.empty(2, config.position_embedding_size, config.hidden_size)
        self.position_embedding_table = make_parameter(table, default_weight_loader)

    def forward(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[T, values of a patch] from 0 to 1, and [T, 2] columns and rows -> [T, hidden_size]."""
        columns, rows = self.position_embedding_table
        x, _ = self.input_proj((2 * (patches - 0.5)).to(columns.dtype))
        return x + (F.embedding(positions[:, 0], columns) + F.embedding(positions[:, 1], rows))


class Gemma4VisionEncoder(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.layers = make_layers(
            config.num_hidden_layers,
            lambda idx, prefix: Gemma4VisionLayer(config, quant_config, prefix),
            prefix=add_prefix("layers", prefix),
        )


class Gemma4VisionModel(nn.Module):
    """The tower: patches of images -> a row for each square of ``pooling_kernel_size`` squared patches."""

    std_bias: torch.Tensor
    std_scale: torch.Tensor

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        rope_type = config.rope_parameters["rope_type"]
        if rope_type != "axial":
            raise ValueError(f"rope_type of vision_config is {rope_type!r}, but Gemma 4's tower has 'axial' alone")
        self.kernel_size, self.factor = config.pooling_kernel_size, config.hidden_size**0.5
        self.inv_freq = axial_inv_freq(config.head_dim, config.rope_parameters["rope_theta"])
        self.patch_embedder = Gemma4PatchEmbedder(config, quant_config, add_prefix("patch_embedder", prefix))
        self.encoder = Gemma4VisionEncoder(config, quant_config, add_prefix("encoder", prefix))
        self.standardizes = config.standardize
        if self.standardizes:
            self.register_buffer("std_bias", torch.empty(config.hidden_size))
            self.register_buffer("std_scale", torch.empty(config.hidden_size))

    def forward(self, images: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Encode images, given the patches [T, values of a patch] of each, row by row, and their positions [T, 2].

        Returns:
            [rows of all images, hidden_size].
        """
        device = self.patch_embedder.position_embedding_table.device
        patches, positions = (torch.cat(parts).to(device) for parts in zip(*images, strict=True))
        grids = [grid_of(positions) for _, positions in images]
        cu_seqlens = frame_cu_seqlens([(1, *grid) for grid in grids])
        cos_sin = axial_cos_sin(positions, self.inv_freq)
        x = self.patch_embedder(patches, positions)
        for layer in self.encoder.layers:
            x = layer(x, cos_sin, cu_seqlens)
        averages = self.averages(x, grids).float() * self.factor
        if self.standardizes:
            averages = (averages - self.std_bias.float()) * self.std_scale.float()
        return averages.to(x.dtype)

    def averages(self, x: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """[patches, hidden_size] -> [squares, hidden_size]."""
        size, parts = self.kernel_size, x.split([rows * columns for rows, columns in grids])
        return torch.cat(
            [
                part.float().unflatten(0, (rows // size, size, columns // size, size)).mean(dim=(1, 3)).flatten(0, 1)
                for part, (rows, columns) in zip(parts, grids, strict=True)
            ]
        ).to(x.dtype)


def grid_of(positions: torch.Tensor) -> tuple[int, int]:
    """Return the rows and columns of an image, from the columns and rows [T, 2] of its patches."""
    last_column, last_row = positions.amax(dim=0).tolist()
    return last_row + 1, last_column + 1


class Gemma4MultimodalEmbedder(nn.Module):
    """Norms rows of a tower, and projects them to the language model's size."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.eps = config.vision_config.rms_norm_eps
        self.embedding_projection = ReplicatedLinear(
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("embedding_projection", prefix),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.embedding_projection(norm_without_weight(x, self.eps))
        return x


class Gemma4SeeingModel(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.vision_tower = Gemma4VisionModel(config.vision_config, quant_config, add_prefix("vision_tower", prefix))
        self.embed_vision = Gemma4MultimodalEmbedder(config, quant_config, add_prefix("embed_vision", prefix))
        self.language_model = Gemma4Model(config.text_config, quant_config, add_prefix("language_model", prefix))


class Gemma4ForConditionalGeneration(ImageTextModel):
    packed_modules_mapping = Gemma4ForCausalLM.packed_modules_mapping
    model: Gemma4SeeingModel

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        if config.vision_config is None:
            raise ValueError("vision_config is null: without a tower for images, the architecture is Gemma4ForCausalLM")
        model = Gemma4SeeingModel(config, quant_config, add_prefix("model", prefix))
        super().__init__(config, model, quant_config, prefix)
        text_config = config.text_config
        self.ignore = [r"^model\.(audio_tower|embed_audio)\."]
        self.ignore += unused_by_shared_layers(text_config, r"model\.language_model")
        self.max_media_block = MOST_TOKENS if text_config.use_bidirectional_attention == "vision" else 0
        self.media_ids = [config.image_token_id, config.video_token_id, config.audio_token_id]
        self.pad_token_id = text_config.pad_token_id

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: "ForwardBatch", **options: Any
    ) -> LogitsProcessorOutput:
        """Where media are, each layer has the padding's embedding beside theirs."""
        is_media = torch.zeros_like(input_ids, dtype=torch.bool)
        for token_id in self.media_ids:
            is_media = is_media | (input_ids == token_id)
        ids = input_ids.masked_fill(is_media, self.pad_token_id)
        return super().forward(ids, positions, forward_batch, token_ids=ids, **options)

    def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        images = [image for item in items for image in images_of(item)]
        return self.model.embed_vision(self.model.vision_tower(images))


def images_of(item: MultimodalDataItem) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return patches [T, values of a patch] and their columns and rows [T, 2] of each image of an item.

    An item has one, unless a caller passes the output of transformers' processor: that has several, padded with patches
    at column and row -1.

    Raises:
        InvalidRequest: there is no place for each patch.
    """
    patches, places = item.feature, item.model_specific_data.get("image_position_ids")
    if not isinstance(patches, torch.Tensor) or not isinstance(places, torch.Tensor):
        raise InvalidRequest("images that are processed already need pixel_values and image_position_ids", "image_data")
    if patches.dim() != 3 or places.shape != (*patches.shape[:2], 2):
        raise InvalidRequest(
            f"pixel_values {list(patches.shape)} need image_position_ids [images, patches, 2], not "
            f"{list(places.shape)}",
            "image_data",
        )
    is_patch = (places >= 0).all(dim=-1)
    return [(patches[i][is_patch[i]], places[i][is_patch[i]].long()) for i in range(len(patches))]


def squares(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """Return rows and columns of squares of ``side`` pixels that an image is resized to: about as many as ``most``, at
    its aspect, but at least one of each."""
    factor = sqrt(most * side**2 / (height * width))
    rows, columns = int(factor * height / side), int(factor * width / side)
    if rows == 0:
        return 1, min(width // height, most)
    if columns == 0:
        return min(height // width, most), 1
    return rows, columns


class Gemma4Processor(BaseMultimodalProcessor):
    """Puts a token of its own before and after those of an image."""

    models = [Gemma4ForConditionalGeneration]

    def __init__(
        self, hf_config: "PretrainedConfig", server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.mm_tokens = MultimodalSpecialTokens(image_token_id=hf_config.image_token_id).build(_processor)
        self.vision = hf_config.vision_config
        self.begin, self.end = self.tokenizer.convert_ids_to_tokens([hf_config.boi_token_id, hf_config.eoi_token_id])

    async def process_mm_data_async(
        self, image_data: Any, audio_data: Any, input_text: str | list[int], request_obj: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        if audio_data:
            raise InvalidRequest("sounds are not supported: this model takes text and images", "audio_data")
        output = await self.process(image_data, audio_data, input_text, request_obj)
        output.im_start_id, output.im_end_id = self.hf_config.boi_token_id, self.hf_config.eoi_token_id
        return output

    def prepared_image(self, height: int, width: int) -> Prepared:
        settings = self.hf_image_processor
        side, most = settings.patch_size * settings.pooling_kernel_size, settings.max_soft_tokens
        rows, columns = squares(height, width, side, most)
        # All images are padded to as many patches while they are prepared.
        return Prepared(rows * columns, 3 * most * side**2, rows * columns * side**2)

    def image_item(self, image: "Image.Image") -> MultimodalDataItem:
        ((patches, places),) = images_of(super().image_item(image))
        return MultimodalDataItem(Modality.IMAGE, patches[None], image_position_ids=places[None])

    def replacement(self, item: MultimodalDataItem) -> str:
        token = self.mm_tokens.image_token or ""
        if item.precomputed_embeddings is not None:
            return f"{self.begin}{token * len(item.precomputed_embeddings)}{self.end}"
        return "".join(f"{self.begin}{token * self.num_rows(*image)}{self.end}" for image in images_of(item))

    def num_rows(self, patches: torch.Tensor, places: torch.Tensor) -> int:
        """Return the number of rows of an image's embedding.

        Raises:
            InvalidRequest: the tower cannot take it.
        """
        size, values = self.vision.pooling_kernel_size, 3 * self.vision.patch_size**2
        rows, columns = grid_of(places) if len(places) else (0, 0)
        in_order = torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy"), dim=-1)
        if not len(places) or rows % size or columns % size or not torch.equal(places, in_order.flatten(0, 1)):
            raise InvalidRequest(
                f"an image's patches must be a whole grid, row by row, of multiples of {size} rows and columns; "
                f"image_position_ids have {len(places)} patches for {rows} x {columns}",
                "image_data",
            )
        if patches.shape[1] != values or max(rows, columns) > self.vision.position_embedding_size:
            raise InvalidRequest(
                f"the vision tower takes patches of {values} values, at most {self.vision.position_embedding_size} in "
                f"a row, but an image was prepared as {rows} x {columns} of {patches.shape[1]}; the settings of the "
                "image processor and config.json must agree",
                "image_data",
            )
        return rows * columns // size**2


EntryClass = Gemma4ForConditionalGeneration
