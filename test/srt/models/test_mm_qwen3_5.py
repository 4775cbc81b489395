"""Qwen3.5 and Qwen3.5-MoE answer about images and videos as transformers does."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

from tiny_models import make_tiny_vision
from tiny_seeing import CONFIG, IMAGE, TOKENS, VIDEO

FULL, LINEAR = "full_attention", "linear_attention"
VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "out_hidden_size": 48,
    "num_heads": 4,
    "patch_size": 14,
    "num_position_embeddings": 25,
}
TEXT = {
    "num_hidden_layers": 3,
    "layer_types": [LINEAR, FULL, LINEAR],
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 2, 2],
        "mrope_interleaved": True,
    },
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    "patch_size": 14,
    "size": {"shortest_edge": 28 * 28, "longest_edge": 112 * 112},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
VIDEO_PREPROCESSOR = PREPROCESSOR | {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "size": {"shortest_edge": 28 * 28, "longest_edge": 6 * 56 * 56},
}


def make(directory: Path, architecture: str = "Qwen3_5ForConditionalGeneration", **text: Any) -> str:
    config = CONFIG | {"vision_config": VISION}
    config["text_config"] = config["text_config"] | TEXT | text
    files = {"preprocessor_config.json": PREPROCESSOR, "video_preprocessor_config.json": VIDEO_PREPROCESSOR}
    return make_tiny_vision(architecture, directory, config, TOKENS, files)


def make_moe(directory: Path) -> str:
    return make(directory, "Qwen3_5MoeForConditionalGeneration", **EXPERTS)


CASES = (
    VisionCase("qwen3.5", make, feed_qwen, IMAGE, VIDEO, slow=True, has_states=True),
    VisionCase("qwen3.5-moe", make_moe, feed_qwen, IMAGE, VIDEO, slow=True, has_states=True),
)


@pytest.fixture(scope="module", params=vision_params(CASES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedVision]:
    with serve_vision(request.param, tmp_path_factory.mktemp(request.param.name)) as served:
        yield served


@pytest.mark.parametrize("check", VISION_CHECKS)
def test_answers_are_the_references(served: ServedVision, check: Callable[[ServedVision], None]) -> None:
    check(served)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_two_ranks(case: VisionCase, tmp_path: Path) -> None:
    check_two_ranks_vision(case, tmp_path)
