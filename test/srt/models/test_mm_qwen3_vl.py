"""Qwen3-VL and Qwen3-VL-MoE answer about images and videos as transformers does."""

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
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLConfig

from rtp_llm.models_py.qwen3_vl import Qwen3VisionTransformer
from tiny_models import make_tiny_vision
from tiny_seeing import CONFIG, IMAGE, TOKENS, VIDEO

VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 40,
    "out_hidden_size": 48,
    "num_heads": 4,
    "patch_size": 14,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2],
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
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}


def make(
    directory: Path,
    architecture: str = "Qwen3VLForConditionalGeneration",
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **config: Any,
) -> str:
    config = CONFIG | {"vision_config": VISION | (vision or {})} | config
    config["text_config"] = config["text_config"] | (text or {})
    files = {"preprocessor_config.json": PREPROCESSOR, "video_preprocessor_config.json": VIDEO_PREPROCESSOR}
    return make_tiny_vision(architecture, directory, config, TOKENS, files)


def make_moe(directory: Path, **text: Any) -> str:
    return make(directory, "Qwen3VLMoeForConditionalGeneration", text=EXPERTS | text)


def make_moe_as_published(directory: Path) -> str:
    """Experts' matrices are transposed."""
    model_dir = make_moe(directory)
    file = Path(model_dir, "model.safetensors")
    weights = load_file(file)
    experts = [name for name in weights if ".experts." in name]
    assert experts
    weights |= {name: weights[name].transpose(1, 2).contiguous() for name in experts}
    save_file(weights, file, {"format": "pt"})
    return model_dir


CASES = (
    VisionCase("qwen3-vl", make, feed_qwen, IMAGE, VIDEO),
    VisionCase(
        "qwen3-vl-tied-no-deepstack",
        lambda d: make(d, vision={"deepstack_visual_indexes": []}, tie_word_embeddings=True),
        feed_qwen,
        IMAGE,
        VIDEO,
        slow=True,
    ),
    VisionCase(
        "qwen3-vl-more-views-than-layers",
        lambda d: make(d, vision={"deepstack_visual_indexes": [0, 1, 2, 3]}),
        feed_qwen,
        IMAGE,
        VIDEO,
        slow=True,
    ),
    VisionCase("qwen3-vl-moe", make_moe, feed_qwen, IMAGE, VIDEO, slow=True),
    VisionCase("qwen3-vl-moe-as-published", make_moe_as_published, feed_qwen, IMAGE, VIDEO, slow=True),
)


@pytest.fixture(scope="module", params=vision_params(CASES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedVision]:
    with serve_vision(request.param, tmp_path_factory.mktemp(request.param.name)) as served:
        yield served


@pytest.mark.parametrize("check", VISION_CHECKS)
def test_answers_are_the_references(served: ServedVision, check: Callable[[ServedVision], None]) -> None:
    check(served)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-vl", "qwen3-vl-moe"])
def test_two_ranks(name: str, tmp_path: Path) -> None:
    check_two_ranks_vision(next(case for case in CASES if case.name == name), tmp_path)


@pytest.mark.parametrize("layers", [[0, 4], [2, 1], [1, 1], [-1]])
def test_views_of_layers_that_are_not_there_are_refused(layers: list[int]) -> None:
    config = Qwen3VLConfig(vision_config=VISION | {"deepstack_visual_indexes": layers}).vision_config
    with pytest.raises(ValueError, match=r"deepstack_visual_indexes .* must rise, within the 4 layers"):
        Qwen3VisionTransformer(config)
