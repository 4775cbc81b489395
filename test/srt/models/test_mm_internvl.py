"""InternVL answers about pictures and videos as transformers does."""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mm_parity import (
    VISION_CHECKS,
    ServedVision,
    VisionCase,
    check_two_ranks_vision,
    frames,
    joined,
    of_kind,
    picture,
    serve_vision,
    vision_params,
)
from transformers import AutoImageProcessor
from transformers.models.internvl.processing_internvl import InternVLProcessor as TheirProcessor

from rtp_llm.models_py.internvl import pixel_shuffle
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.multimodal.items import Modality, MultimodalInputs
from tiny_models import make_tiny_vision, special_id

IMAGE, VIDEO = "<IMG_CONTEXT>", "<video>"
TOKENS = (IMAGE, VIDEO, "<img>", "</img>")
SIDE = 16  # pixels of a tile
TOWER = {
    "model_type": "internvl_vision",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": [SIDE, SIDE],
    "patch_size": [4, 4],
}
PREPROCESSOR = {
    "image_processor_type": "GotOcr2ImageProcessor",
    "size": {"height": SIDE, "width": SIDE},
    "min_patches": 1,
    "max_patches": 4,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}
VIDEO_PREPROCESSOR = {"video_processor_type": "InternVLVideoProcessor", "size": {"height": SIDE, "width": SIDE}}
SIZES = ((16, 16), (50, 20), (31, 47))


def make(directory: Path, text: str = "qwen2", tower: Any = None, **more: Any) -> str:
    config = {
        "vision_config": TOWER | (tower or {}),
        "text_config": {"model_type": text},
        "image_token_id": special_id(TOKENS, IMAGE),
        "tie_word_embeddings": False,
    }
    files = {"preprocessor_config.json": PREPROCESSOR, "video_preprocessor_config.json": VIDEO_PREPROCESSOR}
    return make_tiny_vision("InternVLForConditionalGeneration", directory, config | more, TOKENS, files)


def feed(ids: list[int], media: MultimodalInputs) -> dict[str, Any]:
    """Tiles and frames together, in the order of the prompt."""
    return {"pixel_values": joined(sorted(media.mm_items, key=lambda item: item.offsets[0]))}


OTHER_TOWER = {"use_mean_pooling": False, "attention_bias": True, "use_qk_norm": True, "norm_type": "rms_norm"}
CASES = (
    VisionCase("internvl", make, feed, IMAGE, VIDEO, sizes=SIZES),
    VisionCase(
        "internvl-other-tower",
        partial(make, text="llama", tower=OTHER_TOWER, tie_word_embeddings=True),
        feed,
        IMAGE,
        VIDEO,
        sizes=SIZES,
        slow=True,
    ),
    VisionCase(
        "internvl-layer",
        partial(make, text="qwen3", vision_feature_layer=-2),
        feed,
        IMAGE,
        options={"page_size": 4},
        sizes=SIZES,
        slow=True,
    ),
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


class Stub:
    """What transformers' processor reads of itself to expand placeholders."""

    start_image_token, end_image_token, image_token = "<img>", "</img>", IMAGE
    image_seq_length = 4


def test_prompts_are_expanded_as_transformers_does(served: ServedVision) -> None:

    manager = served.engine.tokenizer_manager
    images = [picture(*size) for size in SIZES]
    text = f"a {IMAGE} b {VIDEO}c{IMAGE}{IMAGE}"
    prompt = asyncio.run(manager.with_media(Prompt(text=text, image_data=images, video_data=[frames(3)])))
    media = MultimodalInputs.decode(prompt.media)
    tiles = [len(item.feature) for item in of_kind(media, Modality.IMAGE)]
    image_inputs = {"num_patches": tiles}
    video_inputs = {"pixel_values_videos": [torch.zeros(3, 1)]}
    pieces = text.split(IMAGE)
    expected = pieces[0]
    for i, piece in enumerate(pieces[1:]):
        expected += TheirProcessor.replace_image_token(Stub, image_inputs, i) + piece
    expected = expected.replace(VIDEO, TheirProcessor.replace_video_token(Stub, video_inputs, 0))
    assert prompt.input_ids == manager.encode(expected)
    assert tiles == [1, 4, 3]  # 1; 3 x 1 and the whole; 1 x 2 and the whole


def test_tiles_are_transformers(served: ServedVision) -> None:

    manager = served.engine.tokenizer_manager
    image = picture(50, 20)
    prompt = asyncio.run(manager.with_media(Prompt(text=IMAGE, image_data=[image])))
    [item] = MultimodalInputs.decode(prompt.media).mm_items
    theirs = AutoImageProcessor.from_pretrained(served.model_dir, backend="pil")
    expected = theirs(images=[image], crop_to_patches=True, return_tensors="pt")["pixel_values"]
    assert torch.equal(item.feature, expected)


def test_squares_of_patches_lie_side_by_side() -> None:
    grid = torch.arange(4 * 4 * 2).view(1, 4, 4, 2)
    merged = pixel_shuffle(grid, 2)
    assert merged.shape == (1, 2, 2, 8)
    assert merged[0, 0, 1].tolist() == torch.cat([grid[0, i, j] for i in (0, 1) for j in (2, 3)]).tolist()
    with pytest.raises(ValueError, match="4 x 4 patches cannot be merged by 3 x 3"):
        pixel_shuffle(grid, 3)
