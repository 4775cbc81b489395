"""InternVL answers about images and videos as transformers does, and its processor prepares them as transformers'."""

import asyncio
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mm_parity import (
    VISION_CHECKS,
    ServedVision,
    VisionCase,
    check_two_ranks_vision,
    joined,
    open_vision_engine,
    serve_vision,
    vision_params,
)
from transformers.models.internvl.processing_internvl import InternVLProcessor

from rtp_llm.models_py.internvl import pixel_shuffle
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.multimodal.items import MultimodalInputs
from rtp_llm.srt.multimodal.media import VideoInfo
from tiny_models import make_tiny_vision, special_id

IMAGE, VIDEO, START, END = "<IMG_CONTEXT>", "<video>", "<img>", "</img>"
TOKENS = (IMAGE, VIDEO, START, END)
SIDE = 24  # pixels of a tile
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": [SIDE, SIDE],
    "patch_size": [4, 4],
    "attention_bias": True,
}
TILES = {"size": {"height": SIDE, "width": SIDE}, "min_patches": 1, "max_patches": 4}
QWEN2, QWEN3, LLAMA = ({"model_type": name} for name in ("qwen2", "qwen3", "llama"))
MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def make(directory: Path, text: dict[str, Any] = QWEN2, tower: Any = None, **config: Any) -> str:
    parts = {"vision_config": TOWER | (tower or {}), "text_config": text, "tie_word_embeddings": False}
    ids = {"image_token_id": special_id(TOKENS, IMAGE)}
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessor",
            "crop_to_patches": False,
            **TILES,
        },
        "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor", "size": TILES["size"]},
    }
    return make_tiny_vision("InternVLForConditionalGeneration", directory, parts | ids | config, TOKENS, files)


def feed(ids: list[int], media: MultimodalInputs) -> dict[str, Any]:
    """Tiles and frames in the order of the prompt."""
    return {"pixel_values": joined(sorted(media.mm_items, key=lambda item: item.offsets[0]))}


CASES = (
    VisionCase("internvl", make, feed, IMAGE, VIDEO),
    VisionCase(
        "internvl-6b",
        partial(
            make,
            text=LLAMA,
            tower={"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False, "use_mask_token": True},
        ),
        feed,
        IMAGE,
        VIDEO,
        options={"page_size": 4},
        slow=True,
    ),
    VisionCase(
        "internvl-tied-norm",
        partial(make, text=QWEN3, tower={"use_mean_pooling": False}, tie_word_embeddings=True, downsample_ratio=1.0),
        feed,
        IMAGE,
        VIDEO,
        slow=True,
    ),
    VisionCase(
        "internvl-moe-layer",
        partial(
            make,
            text=MOE,
            tower={"use_absolute_position_embeddings": False},
            vision_feature_layer=-2,
            projector_hidden_act="relu",
        ),
        feed,
        IMAGE,
        VIDEO,
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


class _InternVL(InternVLProcessor):
    """Whose video processor, which needs torchvision, gives back what ours made."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        pass


def test_the_processor_is_transformers(served: ServedVision) -> None:
    """Ids and pixels of every prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(served.model_dir)
    names = ("context_image_token", "video_token", "start_image_token", "end_image_token")
    for name, token in zip(names, TOKENS, strict=True):
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", special_id(TOKENS, token))
    image_processor = transformers.AutoImageProcessor.from_pretrained(served.model_dir, backend="pil")
    ratio = transformers.AutoConfig.from_pretrained(served.model_dir).downsample_ratio
    ours_of_video = served.engine.tokenizer_manager._processor._frame_processor
    video = lambda videos, **_: {  # noqa: E731
        "pixel_values_videos": ours_of_video(list(videos[0]), input_data_format="channels_last", return_tensors="pt")[
            "pixel_values"
        ][None]
    }
    theirs = _InternVL(image_processor, tokenizer, video, image_seq_length=int((SIDE / 4 * ratio) ** 2))
    for asked in served.asked[1:]:
        prompt = Prompt(asked.text, image_data=asked.images or None, video_data=asked.videos or None)
        prepared = asyncio.run(served.engine.tokenizer_manager.with_media(prompt))
        ours = feed(prepared.input_ids, MultimodalInputs.decode(prepared.media.content))
        images = [asked.images] if asked.images else None
        expected = theirs(images=images, videos=asked.videos or None, text=[asked.text], return_tensors="pt")
        assert prepared.input_ids == expected["input_ids"][0].tolist(), asked.name
        torch.testing.assert_close(ours["pixel_values"], torch.as_tensor(expected["pixel_values"]), rtol=0, atol=0)


def test_pixel_shuffle_is_transformers() -> None:
    x = torch.randn(2, 4, 6, 3)
    shuffled = transformers.InternVLModel.pixel_shuffle(None, x, 0.5)  # which turns the grid
    torch.testing.assert_close(pixel_shuffle(x, 2).flatten(1, 2), shuffled.flatten(1, 2))


def test_frames_are_from_the_middle_of_their_parts(served: ServedVision) -> None:
    processor = served.engine.tokenizer_manager._processor
    video = lambda total: VideoInfo(total, 24.0, total / 24, 10, 10)  # noqa: E731
    assert processor.sample_frames(video(80)) == [5, 15, 25, 35, 45, 55, 65, 75]
    assert processor.sample_frames(video(3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('{"downsample_ratio": 0.3}', "downsample_ratio must be 1, 1/2"),
        ('{"vision_feature_layer": [-1, -2]}', "vision_feature_layer must be one number"),
        ('{"vision_feature_select_strategy": "full"}', "must be 'default', not 'full'"),
    ],
)
def test_what_the_model_cannot_do_is_refused(tmp_path: Path, override: str, message: str) -> None:
    path = make(tmp_path)
    with pytest.raises(ModelBuildError, match=re.escape(message)):
        open_vision_engine(path, json_model_override_args=override)


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    check_two_ranks_vision(CASES[0], tmp_path)
