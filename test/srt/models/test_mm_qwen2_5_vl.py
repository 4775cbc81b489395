"""Qwen2.5-VL answers about images and videos as transformers does."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mm_parity import (
    VISION_CHECKS,
    ServedVision,
    VisionCase,
    check_two_ranks_vision,
    feed_qwen,
    joined,
    of_kind,
    serve_vision,
    vision_params,
)
from transformers import Qwen2_5_VLConfig
from transformers.vision_utils import get_vision_window_index

from rtp_llm.models_py.qwen2_5_vl import Qwen2_5_VisionTransformer, window_order
from rtp_llm.srt.multimodal.items import Modality, MultimodalInputs
from tiny_models import make_tiny_vision
from tiny_seeing import CONFIG, IMAGE, PREPROCESSOR, TOKENS, VIDEO

VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "out_hidden_size": 48,
    "num_heads": 4,
    "patch_size": 14,
    "window_size": 56,  # two merged squares
    "fullatt_block_indexes": [1],
}


def make(directory: Path, vision: dict[str, Any] | None = None, **config: Any) -> str:
    config = CONFIG | {"vision_config": VISION | (vision or {})} | config
    files = {"preprocessor_config.json": PREPROCESSOR}
    return make_tiny_vision("Qwen2_5_VLForConditionalGeneration", directory, config, TOKENS, files)


def feed(ids: list[int], media: MultimodalInputs) -> dict[str, Any]:
    seconds = joined(of_kind(media, Modality.VIDEO), "second_per_grid_ts")
    return feed_qwen(ids, media) | {"second_per_grid_ts": seconds}


SLIDING = CONFIG["text_config"] | {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
CASES = (
    VisionCase("qwen2.5-vl", make, feed, IMAGE, VIDEO),
    # Bare frames are 1/24 s apart, so that their times differ by a token only at many per second.
    VisionCase("qwen2.5-vl-times", lambda d: make(d, {"tokens_per_second": 50}), feed, IMAGE, VIDEO, slow=True),
    VisionCase(
        "qwen2.5-vl-tied-windows",
        lambda d: make(d, {"window_size": 28, "fullatt_block_indexes": []}, tie_word_embeddings=True),
        feed,
        IMAGE,
        VIDEO,
        slow=True,
    ),
    VisionCase("qwen2.5-vl-sliding", lambda d: make(d, text_config=SLIDING), feed, IMAGE, VIDEO, slow=True),
)


@pytest.fixture(scope="module", params=vision_params(CASES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedVision]:
    with serve_vision(request.param, tmp_path_factory.mktemp(request.param.name)) as served:
        yield served


@pytest.mark.parametrize("check", VISION_CHECKS)
def test_answers_are_the_references(served: ServedVision, check: Callable[[ServedVision], None]) -> None:
    check(served)


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    check_two_ranks_vision(CASES[0], tmp_path)


@pytest.mark.parametrize("merge_size, window", [(2, 2), (2, 3), (1, 4), (3, 1)])
def test_windows_are_transformers(merge_size: int, window: int) -> None:
    sizes = [(1, 1, 1), (1, 5, 2), (3, 4, 7), (2, 6, 6), (1, 2, 9)]
    grids = [(frames, rows * merge_size, columns * merge_size) for frames, rows, columns in sizes]
    order, bounds = window_order(grids, merge_size, window)
    expected = get_vision_window_index(
        torch.tensor(grids), merge_size, window_size=window * merge_size * 14, patch_size=14
    )
    assert torch.equal(order, expected[0])
    assert torch.equal(bounds, expected[1])


def test_a_window_smaller_than_a_square_is_refused() -> None:
    config = Qwen2_5_VLConfig(vision_config=VISION | {"window_size": 27}).vision_config
    with pytest.raises(ValueError, match="window_size 27 is less than a merged square of 2 x 2 patches of 14 pixels"):
        Qwen2_5_VisionTransformer(config)
