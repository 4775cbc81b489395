"""Items of a prompt in the form in which vLLM's model files compute positions of three axes (M-RoPE) from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rtp_llm.srt.multimodal.items import MultimodalDataItem

__all__ = ["FeatureSpec", "feature_specs"]


@dataclass(frozen=True, slots=True)
class FeatureData:
    """An input of the encoder. ``data``: without the item's own dimension in front."""

    data: Any


@dataclass(frozen=True, slots=True)
class FeaturePlace:
    """Where an item's placeholders stand: the first one's index, and how many tokens up to the last one."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """An item. ``data``: names of the encoder's inputs beside the feature -> values."""

    modality: str
    data: dict[str, FeatureData]
    mm_position: FeaturePlace


def feature_specs(items: Sequence[MultimodalDataItem]) -> list[FeatureSpec]:
    """Return what is known of each item after its placeholders were put into the prompt."""
    return [
        FeatureSpec(
            item.modality.value,
            {name: FeatureData(_own(value)) for name, value in item.model_specific_data.items()},
            FeaturePlace(item.offsets[0][0], item.offsets[-1][1] - item.offsets[0][0] + 1),
        )
        for item in items
    ]


def _own(value: Any) -> Any:
    """A batch of one item is that item."""
    return value[0] if isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == 1 else value
