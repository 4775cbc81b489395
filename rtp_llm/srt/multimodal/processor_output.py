"""From the output of transformers' processors, or a caller's in their form, to a prompt's items."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem
from rtp_llm.srt.sampling_params import InvalidRequest

PROCESSOR_OUTPUT = "processor_output"
PRECOMPUTED_EMBEDDING = "precomputed_embedding"


# Names in the output of transformers' processors, by the kind of media that they belong to.
MODALITY_OF_OUTPUT = {
    **dict.fromkeys(
        (
            "pixel_values", "image_grid_thw", "image_sizes", "image_grid_hws", "image_attention_mask", "tgt_size",
            "tgt_sizes", "aspect_ratio_ids", "aspect_ratio_mask", "num_patches", "patch_pixel_values", "num_crops",
            "batch_num_images", "pixel_attention_mask", "image_position_ids",
        ),
        Modality.IMAGE,
    ),
    **dict.fromkeys(
        ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "video_sizes", "video_grid_hws"),
        Modality.VIDEO,
    ),
    **dict.fromkeys(
        ("audio_features", "input_features", "audio_feature_lens", "audio_attention_mask", "feature_attention_mask"),
        Modality.AUDIO,
    ),
}  # fmt: skip


FEATURES = frozenset({"pixel_values", "pixel_values_videos", "audio_features", "input_features"})
GRIDS = ("image_grid_thw", "video_grid_thw")


def one_item(modality: Modality, output: Mapping[str, Any]) -> MultimodalDataItem:
    """Return an item from an image or video processor's output for a single medium."""
    item = MultimodalDataItem(modality)
    for name, value in output.items():
        _set_output(item, name, value)
    return item


def bundled_items(output: Mapping[str, Any]) -> list[MultimodalDataItem]:
    """Return one item for each kind of media in the output of transformers' processor."""
    items: dict[Modality, MultimodalDataItem] = {}
    for name, value in output.items():
        modality = MODALITY_OF_OUTPUT.get(name)
        if modality is not None and value is not None:
            _set_output(items.setdefault(modality, MultimodalDataItem(modality)), name, value)
    return list(items.values())


def _set_output(item: MultimodalDataItem, name: str, value: Any) -> None:
    if name in FEATURES:
        item.feature = _host(value)
    else:
        setattr(item, name, _host(value))


def _host(value: Any) -> Any:
    """Convert arrays of any library to tensors, lists of them to lists of tensors."""
    if isinstance(value, (list, tuple)):
        return [_host(item) for item in value]
    return torch.as_tensor(value) if hasattr(value, "__array__") else value


def split_item(item: MultimodalDataItem, count: int) -> list[MultimodalDataItem]:
    """Split an item of ``count`` images or videos into single ones: by their grids, else along the first dimension.
    An item that cannot be split is returned as it is."""
    if count <= 1 or item.feature is None:
        return [item]
    sizes = rows_of_each(item)
    if sizes is not None and isinstance(item.feature, torch.Tensor) and sum(sizes) == len(item.feature):
        features: Sequence[Any] = item.feature.split(sizes)
    elif len(item.feature) == count:
        features = [item.feature[i : i + 1] for i in range(count)]
    else:
        return [item]
    return [
        MultimodalDataItem(
            item.modality,
            feature,
            model_specific_data={name: _part(value, i, count) for name, value in item.model_specific_data.items()},
        )
        for i, feature in enumerate(features)
    ]


def rows_of_each(item: MultimodalDataItem) -> list[int] | None:
    """Return the patches of each image or video from their grids; None without grids."""
    for name in GRIDS:
        if name in item.model_specific_data:
            grid = torch.as_tensor(item.model_specific_data[name])
            return grid.reshape(-1, grid.shape[-1]).prod(-1).tolist()
    return None


def _part(value: Any, i: int, count: int) -> Any:
    """Return item ``i``'s part of a value of all items."""
    if isinstance(value, torch.Tensor):
        return value[i : i + 1] if value.dim() and len(value) == count else value
    return value[i : i + 1] if isinstance(value, (list, tuple)) and len(value) == count else value


def is_preformatted(source: Any) -> bool:
    return isinstance(source, Mapping) and "format" in source


def preformatted_items(modality: Modality, source: Mapping[str, Any], hf_config: Any) -> list[MultimodalDataItem]:
    """Return the items of a caller's dict: ``{"format": "processor_output", ...}`` with the output of transformers'
    processor, or ``{"format": "precomputed_embedding", "feature": [n, hidden]}`` with the data for positions.

    Raises:
        InvalidRequest: the format is unknown, or its feature is missing or of a wrong shape.
    """
    name = f"{modality.value}_data"
    rest = {key: _host(value) for key, value in source.items() if key not in ("format", "input_ids", "attention_mask")}
    if source["format"] == PRECOMPUTED_EMBEDDING:
        feature = torch.as_tensor(rest.pop("feature", ()), dtype=torch.float32)
        hidden_size = hf_config.get_text_config().hidden_size
        if feature.dim() != 2 or not len(feature) or feature.shape[1] % hidden_size:
            raise InvalidRequest(
                f"feature must be [rows, {hidden_size}], an embedding for each position, not {list(feature.shape)}",
                name,
            )
        rest = {key: value for key, value in rest.items() if key not in FEATURES}
        return [MultimodalDataItem(modality, precomputed_embeddings=feature, model_specific_data=rest)]
    if source["format"] != PROCESSOR_OUTPUT:
        raise InvalidRequest(
            f"format must be {PROCESSOR_OUTPUT} or {PRECOMPUTED_EMBEDDING}, not {str(source['format'])[:40]!r}", name
        )
    item = MultimodalDataItem(modality)
    for key, value in rest.items():
        if key == "feature":
            item.feature = value
        elif MODALITY_OF_OUTPUT.get(key, modality) is modality:
            _set_output(item, key, value)
    if item.feature is None:
        raise InvalidRequest(f"{PROCESSOR_OUTPUT} has no feature such as pixel_values", name)
    return split_item(item, len(rows_of_each(item) or [0]))
