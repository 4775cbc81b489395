"""Qwen2-VL answers about images and videos as transformers does."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mm_parity import (
    VISION_CHECKS,
    ServedVision,
    VisionCase,
    check_two_ranks_vision,
    feed_qwen,
    serve_vision,
    vision_params,
)

from tiny_seeing import IMAGE, VIDEO, make_seeing

CASES = (
    VisionCase("qwen2-vl", make_seeing, feed_qwen, IMAGE, VIDEO),
    VisionCase("qwen2-vl-tied", lambda d: make_seeing(d, tie_word_embeddings=True), feed_qwen, IMAGE, VIDEO, slow=True),
    VisionCase("qwen2-vl-pages", make_seeing, feed_qwen, IMAGE, VIDEO, options={"page_size": 4}, slow=True),
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
