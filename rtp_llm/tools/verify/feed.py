"""From our processor's items to the arguments of a transformers model.

Both sides get the same pixels, so that differences are the model's. Transformers' own processors need packages that
may be missing, and round pixels differently.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalInputs
from rtp_llm.tools.reference import Extras

FEATURES = {
    Modality.IMAGE: "pixel_values",
    Modality.VIDEO: "pixel_values_videos",
    Modality.AUDIO: "input_features",
}
PADDING = {"image_position_ids": -1}  # what stands where there is no patch; other arguments are zero there
TYPES = {Modality.IMAGE: 1, Modality.VIDEO: 2, Modality.AUDIO: 3}  # of a prompt's tokens; 0 is text


def extras_for(model: Any, ids: Sequence[int], media: MultimodalInputs) -> Extras:
    """Return the arguments beside ``input_ids`` of a transformers model's forward, if it has them: features, the items'
    ``model_specific_data`` by name, the kinds of tokens, and the number of images.
    """
    known = inspect.signature(model.forward).parameters
    extras: Extras = {}
    for modality, feature_name in FEATURES.items():
        items = [item for item in media.mm_items if item.modality is modality]
        if items:
            extras[feature_name] = joined([item.feature for item in items])
            for name in _common_names(items):
                extras[name] = joined([item.model_specific_data[name] for item in items], PADDING.get(name, 0))
    types = _token_types(ids, media)
    extras |= {"mm_token_type_ids": types, "token_type_ids": types}
    extras["batch_num_images"] = torch.tensor([sum(item.modality is Modality.IMAGE for item in media.mm_items)])
    return {name: _placed(value, model) for name, value in extras.items() if name in known and value is not None}


def _common_names(items: Sequence[MultimodalDataItem]) -> list[str]:
    return [name for name in items[0].model_specific_data if all(name in item.model_specific_data for item in items)]


def joined(values: Sequence[Any], padding: int = 0) -> Any:
    """Join all items' values: tensors into one, filled up with ``padding`` if sizes differ; numbers into a tensor,
    other values into a list; None stays None."""
    if any(value is None for value in values):
        return None
    values = [part for value in values for part in (value if isinstance(value, list) else [value])]
    if all(isinstance(value, (int, float)) for value in values):
        return torch.tensor(values)
    if not all(isinstance(value, torch.Tensor) for value in values) or len({value.dim() for value in values}) > 1:
        return values
    sizes = [max(value.shape[axis] for value in values) for axis in range(1, values[0].dim())]
    return torch.cat([_filled(value, sizes, padding) for value in values])


def _filled(value: torch.Tensor, sizes: Sequence[int], padding: int) -> torch.Tensor:
    """Append ``padding``, up to these sizes of all axes but the first."""
    missing = [size - have for size, have in zip(sizes, value.shape[1:], strict=True)]
    return torch.nn.functional.pad(value, [pad for num in reversed(missing) for pad in (0, num)], value=padding)


def _token_types(ids: Sequence[int], media: MultimodalInputs) -> torch.Tensor:
    """Return the kinds of the tokens, [1, tokens]."""
    types = torch.zeros(1, len(ids), dtype=torch.int64)
    for item in media.mm_items:
        types[0, item.positions] = TYPES[item.modality]
    return types


def _placed(value: Any, model: Any) -> Any:
    if isinstance(value, list):
        return [_placed(part, model) for part in value]
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
