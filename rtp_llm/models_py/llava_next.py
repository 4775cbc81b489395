"""LLaVA-NeXT (Liu et al., 2024): LLaVA that also cuts an image into tiles, as many as suit its size and shape."""

from collections.abc import Iterator, Sequence
from math import isqrt, prod, sqrt
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from rtp_llm.models_py.llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
    num_features,
    parts_of,
)
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.weights import default_weight_loader, make_parameter
from rtp_llm.srt.multimodal.estimates import Prepared
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SLACK = 1.1  # an image is shrunk only if its sides are longer than the limit by more than this factor


class TileGrid(NamedTuple):
    """The layout of an image in its tiles. Sizes except the first two count features."""

    tile_rows: int
    tile_columns: int
    margin_rows: int  # at the top and at the bottom, where the tiles show padding
    margin_columns: int  # at the left and at the right
    height: int  # without margins, as the language model gets it
    width: int

    @property
    def num_tiles(self) -> int:
        return self.tile_rows * self.tile_columns


def tile_grid(image_size: Sequence[int], config: "PretrainedConfig", max_tiles: int | None = None) -> TileGrid:
    """Return the grid of an image: the smallest of those in ``image_grid_pinpoints`` that keep most of its pixels.

    Args:
        image_size: (height, width) in pixels.
        max_tiles: an image with more features than this number of tiles is shrunk to about as many; None: no limit.
    """
    tile_size, side = config.vision_config.image_size, features_per_side(config)
    best_height, best_width = select_best_resolution(tuple(image_size), config.image_grid_pinpoints)
    tile_rows, tile_columns = best_height // tile_size, best_width // tile_size
    height, width = tile_rows * side, tile_columns * side
    image_height, image_width = image_size
    margin_rows = margin_columns = 0
    if image_width / image_height > width / height:
        margin_rows = (height - _scaled(image_height, width / image_width)) // 2
    else:
        margin_columns = (width - _scaled(image_width, height / image_height)) // 2
    height, width = height - 2 * margin_rows, width - 2 * margin_columns
    if max_tiles is not None:
        height, width = _limited(height, width, max_tiles * side**2)
    return TileGrid(tile_rows, tile_columns, margin_rows, margin_columns, height, width)


def _scaled(size: int, factor: float) -> int:
    return int(round(size * factor, 7))  # 23.9999999999 counts as 24


def _limited(height: int, width: int, area: int) -> tuple[int, int]:
    ratio = sqrt(height * width / area)
    return (int(height // ratio), int(width // ratio)) if ratio > SLACK else (height, width)


def features_per_side(config: "PretrainedConfig") -> int:
    """Number of features along each side of a tile."""
    return isqrt(num_features(config))


def check_tiles(config: "PretrainedConfig") -> None:
    """
    Raises:
        ValueError: a tile's features do not form a square, or a resolution is not a multiple of the tile size.
    """
    vision_config = config.vision_config
    side = vision_config.image_size // vision_config.patch_size
    if num_features(config) != side * side:
        raise ValueError(
            f"a tile must have {side} x {side} features, but with vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r} a {vision_config.model_type} gives {num_features(config)}"
        )
    pinpoints, tile_size = config.image_grid_pinpoints or [()], vision_config.image_size
    wrong = [point for point in pinpoints if not point or any(size <= 0 or size % tile_size for size in point)]
    if wrong:
        raise ValueError(
            f"image_grid_pinpoints must be heights and widths that are multiples of the tile size {tile_size}, not "
            f"{wrong[0]}"
        )


class LlavaNextModel(LlavaModel):
    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        check_tiles(config)
        self.config = config
        self.max_tiles: int | None = None
        self.image_newline = make_parameter(torch.zeros(config.text_config.hidden_size), default_weight_loader)

    def pack(self, features: torch.Tensor, image_size: Sequence[int]) -> torch.Tensor:
        """
        Args:
            features: [1 + tiles, side ** 2, hidden_size], the whole image first; without tiles it is alone.
            image_size: (height, width) in pixels.

        Returns:
            [rows, hidden_size]: the whole image, then the tiles' features row by row, each row ended by a newline.
        """
        base, tiles = features[0], features[1:]
        if not len(tiles):
            return torch.cat((base, self.image_newline[None]))
        grid = tile_grid(image_size, self.config, self.max_tiles)
        image = _put_together(tiles, grid)
        if image.shape[:2] != (grid.height, grid.width):
            pixels = image.permute(2, 0, 1)[None]
            image = F.interpolate(pixels, (grid.height, grid.width), mode="bilinear")[0].permute(1, 2, 0)
        newlines = self.image_newline.expand(grid.height, 1, -1)
        return torch.cat((base, torch.cat((image, newlines), dim=1).flatten(0, 1)))


def _put_together(tiles: torch.Tensor, grid: TileGrid) -> torch.Tensor:
    """[tiles, side ** 2, d] -> [height, width, d], without margins."""
    side = isqrt(tiles.shape[1])
    tiles = tiles.unflatten(0, (grid.tile_rows, grid.tile_columns)).unflatten(2, (side, side))
    image = tiles.transpose(1, 2).flatten(0, 1).flatten(1, 2)
    height, width, _ = image.shape
    return image[grid.margin_rows : height - grid.margin_rows, grid.margin_columns : width - grid.margin_columns]


def tiles_of(item: MultimodalDataItem, config: "PretrainedConfig") -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Yield each image's tiles [1 + tiles, channels, height, width], the whole image first (alone, if it has none), and
    its (height, width) in pixels.

    An item is one image, or several as transformers' image processors return them, padded to equally many tiles.
    """
    for tiles, size in zip(parts_of(item), item.image_sizes.view(-1, 2).tolist(), strict=True):
        count = 1 if len(tiles) == 1 else 1 + tile_grid(size, config).num_tiles
        if count > len(tiles):
            raise ValueError(f"an image of {size} pixels has {count - 1} tiles, but {len(tiles) - 1} came")
        yield tiles[:count], size


class LlavaNextForConditionalGeneration(LlavaForConditionalGeneration):
    model_type: type[LlavaNextModel] = LlavaNextModel
    model: LlavaNextModel

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        self.config = config

    def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Encode items, whose features are [images, 1 + tiles, channels, height, width], see ``tiles_of``, with
        ``image_sizes`` [images, 2], the (height, width) of images in pixels."""
        tiles, sizes = zip(*(image for item in items for image in tiles_of(item, self.config)), strict=True)
        features = self.model.encode(torch.cat(tiles)).split([len(some) for some in tiles])
        return torch.cat([self.model.pack(some, size) for some, size in zip(features, sizes, strict=True)])


class LlavaNextProcessor(LlavaProcessor):
    models = [LlavaNextForConditionalGeneration]
    feature_dims = 4  # tiles, channels, height and width
    max_tiles: int | None = None

    def prepared_image(self, height: int, width: int) -> Prepared:
        num_tiles = tile_grid((height, width), self.hf_config, self.max_tiles).num_tiles
        return Prepared(self.num_image_rows((height, width)), (1 + num_tiles) * prod(self.tile_shape))

    def image_items(self, images: Sequence[Image.Image]) -> list[MultimodalDataItem]:
        rows = (self.num_image_rows((image.height, image.width)) for image in images)
        self.check_length(Modality.IMAGE, sum(rows))
        return [self.image_item(image) for image in images]

    def num_image_rows(self, image_size: Sequence[int]) -> int:
        """Number of rows in the embedding of an image that is seen in tiles."""
        grid = tile_grid(image_size, self.hf_config, self.max_tiles)
        return num_features(self.hf_config) + grid.height * (grid.width + 1)

    def num_feature_rows(self, item: MultimodalDataItem) -> int:
        return sum(
            num_features(self.hf_config) + 1 if len(tiles) == 1 else self.num_image_rows(size)
            for tiles, size in tiles_of(item, self.hf_config)
        )


EntryClass = LlavaNextForConditionalGeneration
