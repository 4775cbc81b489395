"""Qwen2-VL answers about images and videos as transformers does."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mm_parity import (
    VISION_CHECKS,
    ServedVision,
    VisionCase,
    check_two_ranks_vision,
    joined,
    of_kind,
    serve_vision,
    token_types,
    vision_params,
)

from rtp_llm.srt.multimodal.items import Modality, MultimodalInputs
from tiny_seeing import IMAGE, VIDEO, make_seeing


def feed(ids: list[int], media: MultimodalInputs) -> dict[str, Any]:
    images, videos = of_kind(media, Modality.IMAGE), of_kind(media, Modality.VIDEO)
    return {
        "pixel_values": joined(images),
        "image_grid_thw": joined(images, "image_grid_thw"),
        "pixel_values_videos": joined(videos),
        "video_grid_thw": joined(videos, "video_grid_thw"),
        "mm_token_type_ids": token_types(ids, media),
    }


CASES = (
    VisionCase("qwen2-vl", make_seeing, feed, IMAGE, VIDEO),
    VisionCase("qwen2-vl-tied", lambda d: make_seeing(d, tie_word_embeddings=True), feed, IMAGE, VIDEO, slow=True),
    VisionCase("qwen2-vl-pages", make_seeing, feed, IMAGE, VIDEO, options={"page_size": 4}, slow=True),
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
