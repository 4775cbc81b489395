"""Mistral Small 3.1 and Ministral 3 (Mistral AI, 2025): a Pixtral tower, with squares of patches merged into one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from rtp_llm.models_py.llava import RENAME, LlavaMultiModalProjector, LlavaProcessor, make_language_model, parts_of
from rtp_llm.srt.layers.image_text import ImageTextModel
from rtp_llm.srt.layers.linear import ReplicatedLinear
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.towers.pixtral import PixtralVisionModel
from rtp_llm.srt.multimodal.estimates import Prepared
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalProcessorOutput
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.srt.utils import add_prefix

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Sizes = Sequence[tuple[int, int]]  # (height, width) of each image


def feature_layer(config: "PretrainedConfig") -> int:
    """
    Raises:
        ValueError: there are several, but the norm after the tower is for one.
    """
    layers = config.vision_feature_layer
    if isinstance(layers, int):
        return layers
    if len(layers) != 1:
        raise ValueError(f"vision_feature_layer must be one layer, not {layers}: the projector's norm has room for one")
    return layers[0]


class Mistral3PatchMerger(nn.Module):
    """Merges ``spatial_merge_size`` squared neighbouring patches into one."""

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        hidden_size = config.vision_config.hidden_size
        self.merge_size = config.spatial_merge_size
        self.merging_layer = ReplicatedLinear(
            hidden_size * self.merge_size**2,
            hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=add_prefix("merging_layer", prefix),
        )

    def forward(self, x: torch.Tensor, grids: Sizes) -> torch.Tensor:
        """[patches of all images, d] -> [those / merge_size squared, d]; ``grids``: (rows, columns) of patches."""
        pieces = x.split([rows * columns for rows, columns in grids])
        squares = [self._squares(piece, *grid) for piece, grid in zip(pieces, grids, strict=True)]
        x, _ = self.merging_layer(torch.cat(squares))
        return x

    def _squares(self, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """[rows * columns, d] -> [squares, d * merge_size squared]; a component's values of all patches follow one
        another."""
        size = self.merge_size
        grid = patches.view(rows // size, size, columns // size, size, -1)
        return grid.permute(0, 2, 4, 1, 3).flatten(2).flatten(0, 1)


class Mistral3MultiModalProjector(LlavaMultiModalProjector):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.norm = RMSNorm(config.vision_config.hidden_size, eps=config.text_config.rms_norm_eps)
        self.patch_merger = Mistral3PatchMerger(config, quant_config, add_prefix("patch_merger", prefix))

    def merge(self, x: torch.Tensor, grids: Sizes) -> torch.Tensor:
        """[patches of all images, vision size] -> [rows, hidden size of the language model]."""
        return self(self.patch_merger(self.norm(x), grids))


class Mistral3Model(nn.Module):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.feature_layer = feature_layer(config)
        self.vision_tower = PixtralVisionModel(config.vision_config, quant_config, add_prefix("vision_tower", prefix))
        self.multi_modal_projector = Mistral3MultiModalProjector(
            config, quant_config, add_prefix("multi_modal_projector", prefix)
        )
        self.language_model = make_language_model(
            config.text_config, quant_config, add_prefix("language_model", prefix)
        )

    def encode(self, images: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        """Images [channels, height, width], possibly padded, and their sizes in pixels -> [rows, hidden_size]."""
        device = next(self.vision_tower.parameters()).device
        patches = self.vision_tower([image.to(device) for image in images], sizes, self.feature_layer)
        patch_size = self.vision_tower.patch_size
        return self.multi_modal_projector.merge(patches, [(h // patch_size, w // patch_size) for h, w in sizes])


class Mistral3ForConditionalGeneration(ImageTextModel):
    rename = RENAME
    ties_by_default = True
    model: Mistral3Model

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        if config.vision_config.model_type != "pixtral":
            raise ValueError(
                f"vision_config.model_type is {config.vision_config.model_type!r}, but Mistral 3 sees through a pixtral"
            )
        model = Mistral3Model(config, quant_config, add_prefix("model", prefix))
        super().__init__(config, model, quant_config, prefix)

    def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Encode items, whose features are [images, channels, height, width], with ``image_sizes`` [images, 2], their
        (height, width) in pixels without padding."""
        images = [image for item in items for image in parts_of(item)]
        return self.model.encode(images, [size for item in items for size in sizes_of(item)])


def sizes_of(item: MultimodalDataItem) -> list[tuple[int, int]]:
    """Return (height, width) of each image of an item, without padding."""
    return [(int(height), int(width)) for height, width in torch.as_tensor(item.image_sizes).view(-1, 2)]


class Mistral3Processor(LlavaProcessor):
    """Ends each row of an image's tokens by a token for that, the last by the one that ends the image."""

    models = [Mistral3ForConditionalGeneration]

    def __init__(
        self, hf_config: "PretrainedConfig", server_args: Any, _processor: Any, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        settings = getattr(_processor, "settings", {})
        self.break_token = settings.get("image_break_token", "[IMG_BREAK]")
        self.end_token = settings.get("image_end_token", "[IMG_END]")
        self.square_size = hf_config.vision_config.patch_size * hf_config.spatial_merge_size  # pixels of a token's side

    async def process_mm_data_async(
        self, image_data: Any, audio_data: Any, input_text: str | list[int], request_obj: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        output = await super().process_mm_data_async(image_data, audio_data, input_text, request_obj)
        output.im_end_id = self.tokenizer.convert_tokens_to_ids(self.end_token)
        return output

    @property
    def image_options(self) -> dict[str, Any]:
        return {"patch_size": self.square_size}

    def prepared_image(self, height: int, width: int) -> Prepared:
        longest = self.image_processor.size.get("longest_edge") or max(height, width)
        shrink = max(max(height, width) / longest, 1)
        rows, columns = (max(int(side / shrink) - 1, 0) // self.square_size + 1 for side in (height, width))
        return Prepared(rows * columns, 3 * rows * columns * self.square_size**2)

    def image_items(self, images: Sequence[Image.Image]) -> list[MultimodalDataItem]:
        items: list[MultimodalDataItem] = []
        for image in images:
            items.append(self.image_item(self.bounded(image)))
            self.check_length(Modality.IMAGE, sum(self.num_feature_rows(item) for item in items))
        return items

    def bounded(self, image: Image.Image) -> Image.Image:
        """Return the image, if its shorter side keeps a pixel when the longer one is shrunk to the limit.

        Raises:
            InvalidRequest: it does not.
        """
        longest = self.image_processor.size.get("longest_edge")
        if longest and min(image.size) * longest < max(image.size):
            raise InvalidRequest(
                f"an image of {image.width} x {image.height} pixels is too long: one side may be {longest} times the "
                "other",
                "image_data",
            )
        return image

    def replacement(self, item: MultimodalDataItem) -> str:
        return "".join(self._image_text(*size) for size in sizes_of(item))

    def num_feature_rows(self, item: MultimodalDataItem) -> int:
        return sum((height // self.square_size) * (width // self.square_size) for height, width in sizes_of(item))

    def check(self, item: MultimodalDataItem) -> None:
        if item.precomputed_embeddings is None:
            for image, size in zip(parts_of(item), sizes_of(item), strict=True):
                self._check_size(list(image.shape), size)
        self.check_rows(item)

    def _check_size(self, shape: list[int], size: tuple[int, int]) -> None:
        fits = len(shape) == 3 and all(0 < part <= whole for part, whole in zip(size, shape[1:], strict=True))
        if not fits or any(part % self.square_size for part in size):
            raise InvalidRequest(
                f"an image was prepared as {shape}, of which {list(size)} is no padding; the model takes heights and "
                f"widths that are multiples of {self.square_size}",
                "image_data",
            )

    def _image_text(self, height: int, width: int) -> str:
        assert self.mm_tokens.image_token is not None
        row = self.mm_tokens.image_token * (width // self.square_size)
        return self.break_token.join([row] * (height // self.square_size)) + self.end_token


EntryClass = Mistral3ForConditionalGeneration
