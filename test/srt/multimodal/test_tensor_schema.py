"""Inputs of an encoder with the shapes of their tensors, and items as vLLM's files see them."""

from typing import Annotated, Literal

import pytest
import torch

from rtp_llm.srt.multimodal.feature_specs import feature_specs
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem
from rtp_llm.srt.multimodal.tensor_schema import TensorSchema, TensorShape


class Pixels(TensorSchema):
    type: Literal["pixels"] = "pixels"
    pixels: Annotated[
        torch.Tensor | list[torch.Tensor], TensorShape("images", 3, "height", "width", dynamic_dims={"width"})
    ]
    sizes: Annotated[torch.Tensor | None, TensorShape("images", 2)]


def test_values_are_kept_by_name() -> None:
    inputs = Pixels(pixels=torch.ones(2, 3, 4, 5), sizes=None, resolve_bindings={"height": 4})
    assert inputs["pixels"] is inputs.pixels and inputs["type"] == "pixels"
    assert inputs.get("absent", 7) == 7


def test_a_list_may_differ_where_it_is_said() -> None:
    Pixels(pixels=[torch.ones(3, 4, 5), torch.ones(3, 4, 6)], sizes=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"Pixels.pixels must be of shape \[images, 3, height, width\]"):
        Pixels(pixels=[torch.ones(3, 4, 5), torch.ones(3, 5, 5)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pixels": torch.ones(2, 3, 4)}, r"got \[2, 3, 4\]"),
        ({"pixels": torch.ones(2, 1, 4, 5)}, r"got \[2, 1, 4, 5\]"),
        ({"pixels": torch.ones(2, 3, 4, 5), "sizes": torch.ones(3, 2)}, r"with \{'images': 2\}, got \[3, 2\]"),
        ({"pixels": torch.ones(2, 3, 4, 5), "resolve_bindings": {"height": 8}}, "'height': 8"),
        ({"sizes": torch.ones(3, 2)}, "needs pixels"),
    ],
)
def test_what_does_not_fit_is_told(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pixels(**values)
    assert Pixels(validate=False, **values).type == "pixels"


def test_items_with_their_places() -> None:
    item = MultimodalDataItem(
        Modality.IMAGE, torch.ones(4, 2), [(3, 5), (7, 8)], image_grid_thw=torch.tensor([[1, 2, 4]])
    )
    [spec] = feature_specs([item])
    assert spec.modality == "image" and (spec.mm_position.offset, spec.mm_position.length) == (3, 6)
    assert spec.data["image_grid_thw"].data.tolist() == [1, 2, 4]
