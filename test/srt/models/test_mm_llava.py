"""LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision answer about images and videos as transformers does."""

import asyncio
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from mm_parity import (
    NEW_TOKENS,
    VISION_CHECKS,
    ServedVision,
    VisionCase,
    check_two_ranks_vision,
    draw_image,
    frames,
    joined,
    of_kind,
    serve_vision,
    vision_params,
)
from PIL import Image
from safetensors.torch import save_file
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from rtp_llm.models_py.llava_next import LlavaNextModel, features_per_side, tile_grid
from rtp_llm.models_py.llava_onevision import max_tiles
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.models.registry import ModelRegistry
from rtp_llm.srt.multimodal.items import Modality, MultimodalInputs
from rtp_llm.srt.sampling_params import InvalidRequest
from tiny_models import assert_same_ids, make_tiny_vision, special_id

IMAGE, VIDEO = "<image>", "<video>"
TOKENS = (IMAGE, VIDEO)
IDS = {"image_token_index": special_id(TOKENS, IMAGE)}
VIDEO_IDS = {"video_token_index": special_id(TOKENS, VIDEO)}
SIDE = 20  # pixels of a tile
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 4,
}
CLIP = TOWER | {"model_type": "clip_vision_model"}
SIGLIP = TOWER | {"model_type": "siglip_vision_model"}
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
COLOURS = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
CROPPED = COLOURS | {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
RESIZED = COLOURS | {"size": {"height": SIDE, "width": SIDE}}
SIZES = ((37, 31), (90, 23), (60, 60))


def make_llava(
    directory: Path, tower: dict[str, Any], text: dict[str, Any], preprocessor: Any = None, **more: Any
) -> str:
    config = {"vision_config": tower, "text_config": text, **IDS} | more
    preprocessor = preprocessor or {"image_processor_type": "CLIPImageProcessor", **CROPPED}
    files = {"preprocessor_config.json": preprocessor}
    return make_tiny_vision("LlavaForConditionalGeneration", directory, config, TOKENS, files)


def make_next(directory: Path, text: dict[str, Any], **more: Any) -> str:
    config = {"vision_config": CLIP, "text_config": text, "image_grid_pinpoints": PINPOINTS, **IDS} | more
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS, **CROPPED
        }
    }  # fmt: skip
    return make_tiny_vision("LlavaNextForConditionalGeneration", directory, config, TOKENS, files)


def make_onevision(directory: Path, tower: dict[str, Any], text: dict[str, Any], max_tiles: int, **more: Any) -> str:
    sizes = {"image_grid_pinpoints": PINPOINTS, "vision_aspect_ratio": f"anyres_max_{max_tiles}"}
    config = {"vision_config": tower, "text_config": text, **sizes, **IDS, **VIDEO_IDS} | more
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": PINPOINTS, **RESIZED
        },
        "video_preprocessor_config.json": {"video_processor_type": "LlavaOnevisionVideoProcessor", **RESIZED},
    }  # fmt: skip
    return make_tiny_vision("LlavaOnevisionForConditionalGeneration", directory, config, TOKENS, files)


def feed(ids: list[int], media: MultimodalInputs) -> dict[str, Any]:
    return {"pixel_values": joined(of_kind(media, Modality.IMAGE))}


def feed_tiles(ids: list[int], media: MultimodalInputs) -> dict[str, Any]:
    """Images filled up to equally many."""
    images = of_kind(media, Modality.IMAGE)
    if not images:
        return {}
    most = max(image.feature.shape[1] for image in images)
    filled = [torch.nn.functional.pad(image.feature, (0,) * 7 + (most - image.feature.shape[1],)) for image in images]
    return {"pixel_values": torch.cat(filled), "image_sizes": joined(images, "image_sizes")}


def feed_onevision(ids: list[int], media: MultimodalInputs) -> dict[str, Any]:
    images, videos = of_kind(media, Modality.IMAGE), of_kind(media, Modality.VIDEO)
    counts = {"batch_num_images": torch.tensor([len(images)])} if images else {}
    return {**feed_tiles(ids, media), **counts, "pixel_values_videos": joined(videos)}


LLAMA, MISTRAL, QWEN2, QWEN3 = ({"model_type": name} for name in ("llama", "mistral", "qwen2", "qwen3"))
LISTED = {"vision_feature_layer": [-2, 1, -1], "vision_feature_select_strategy": "full"}
SEEN_WHOLE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}

CASES = (
    VisionCase("llava", partial(make_llava, tower=CLIP, text=LLAMA), feed, IMAGE, sizes=SIZES),
    VisionCase(
        "llava-onevision",
        partial(make_onevision, tower=SIGLIP, text=QWEN2, max_tiles=3),
        feed_onevision,
        IMAGE,
        VIDEO,
        sizes=SIZES,
    ),
    VisionCase("llava-next", partial(make_next, text=MISTRAL), feed_tiles, IMAGE, sizes=SIZES, slow=True),
    VisionCase(
        "llava-layers",
        partial(make_llava, tower=CLIP, text=QWEN2, multimodal_projector_bias=False, **LISTED),
        feed,
        IMAGE,
        sizes=SIZES,
        slow=True,
    ),
    VisionCase(
        "llava-siglip-window-tied",
        partial(
            make_llava,
            tower=SIGLIP,
            text=MISTRAL | {"sliding_window": 9, "tie_word_embeddings": True},
            preprocessor={"image_processor_type": "SiglipImageProcessor", **RESIZED},
            projector_hidden_act="relu",
            **SEEN_WHOLE,
        ),
        feed,
        IMAGE,
        options={"page_size": 4},
        sizes=SIZES,
        slow=True,
    ),
    VisionCase(
        "llava-next-siglip-layers",
        partial(make_next, text=LLAMA, vision_config=SIGLIP, **LISTED),
        feed_tiles,
        IMAGE,
        sizes=SIZES,
        slow=True,
    ),
    VisionCase(
        "llava-onevision-clip",
        partial(
            make_onevision,
            tower=CLIP,
            text=QWEN3,
            max_tiles=9,
            vision_feature_layer=[-2, -1],
            vision_feature_select_strategy="default",
        ),
        feed_onevision,
        IMAGE,
        VIDEO,
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


def test_the_processor_is_transformers(served: ServedVision) -> None:
    """Ids and pixels of every prompt."""
    theirs = hf_processor(served.model_dir)
    for asked in served.asked[1:]:
        prompt = Prompt(text=asked.text, image_data=asked.images or None, video_data=asked.videos or None)
        ids, media = prepared(served, prompt)
        ours = served.case.feed(ids, media)
        images = [asked.images] if asked.images else None  # of one chat
        expected = theirs(text=[asked.text], images=images, videos=asked.videos or None, return_tensors="pt")
        assert ids == expected["input_ids"][0].tolist(), asked.name
        for name in ("pixel_values", "image_sizes", "batch_num_images"):
            if ours.get(name) is not None:
                torch.testing.assert_close(ours[name], torch.as_tensor(expected[name]), rtol=0, atol=0)


def prepared(served: ServedVision, prompt: Prompt) -> tuple[list[int], MultimodalInputs]:
    """Ids and media, by our processor."""
    done = asyncio.run(served.engine.tokenizer_manager.with_media(prompt))
    return done.input_ids, MultimodalInputs.decode(done.media.content)


def hf_processor(model_dir: str) -> Any:
    """transformers' processor of the checkpoint, but that frames of videos, for which it needs torchvision, come back
    as nothing but their number."""
    config = transformers.AutoConfig.from_pretrained(model_dir)
    parts: list[Any] = [
        transformers.AutoImageProcessor.from_pretrained(model_dir, backend="pil"),
        transformers.AutoTokenizer.from_pretrained(model_dir),
    ]
    strategy = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    has_class_token = int(config.vision_config.model_type == "clip_vision_model")
    if config.model_type == "llava_onevision":
        num_patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        video = lambda videos, **_: {"pixel_values_videos": videos}  # noqa: E731
        sizes = {"num_image_tokens": num_patches + has_class_token, "vision_aspect_ratio": config.vision_aspect_ratio}
        return _Onevision(*parts, video, **sizes, **strategy)
    made = transformers.LlavaNextProcessor if config.model_type == "llava_next" else transformers.LlavaProcessor
    counts = {"patch_size": config.vision_config.patch_size, "num_additional_image_tokens": has_class_token}
    return made(*parts, **counts, **strategy)


class _Onevision(LlavaOnevisionProcessor):
    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        pass


@pytest.mark.parametrize("served", vision_params(tuple(case for case in CASES if case.video)), indirect=True)
def test_frames_of_a_video_are_prepared_as_whole_images(served: ServedVision) -> None:
    shots = frames(3, 50, 30)
    _, media = prepared(served, Prompt(text=VIDEO, video_data=[shots]))
    for shot, pixels in zip(shots, media.mm_items[0].feature[0], strict=True):
        _, of_image = prepared(served, Prompt(text=IMAGE, image_data=[Image.fromarray(shot)]))
        torch.testing.assert_close(pixels, of_image.mm_items[0].feature[0, 0], rtol=0, atol=0)


def test_images_of_extreme_shapes(served: ServedVision) -> None:
    """They are answered or refused, and memory is not filled: 30,000 pixels squared would be 2.7 GB."""
    thin = [draw_image(30_000, 1), draw_image(1, 2000)]
    for images in (thin[:1], thin[1:], thin):
        call = {"prompt": "Look:" + IMAGE * len(images), "image_data": images, "sampling_params": {"max_new_tokens": 1}}
        if served.case.name in ("llava", "llava-layers"):  # the short side would be made 20 times as long
            with pytest.raises(InvalidRequest, match="is too long: one side may be 200 times the other"):
                served.engine.generate(**call)
        else:
            assert len(served.engine.generate(**call)["output_ids"]) == 1


def test_more_images_than_the_context_holds(served: ServedVision) -> None:
    call = {"prompt": IMAGE * 32, "image_data": [draw_image(60, 60)] * 32}
    with pytest.raises(InvalidRequest, match=r"media alone have at least \d+|image data take \d+ tokens"):
        served.engine.generate(**call)


def test_what_transformers_processor_returned(served: ServedVision) -> None:
    """Ids and pixels together give the same answer; pixels of another size than the tower's are refused."""
    theirs = hf_processor(served.model_dir)
    asked = served.asked[2]
    made = theirs(text=[asked.text], images=[asked.images], return_tensors="pt")
    ids = made["input_ids"][0].tolist()
    output = {name: value for name, value in made.items() if name not in ("input_ids", "attention_mask")}
    source = {"format": "processor_output", **output}
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    result = served.engine.generate(input_ids=ids, sampling_params=params, image_data=[source])
    assert_same_ids(result["output_ids"], asked.expected, served.case.name)
    wrong = {**source, "pixel_values": output["pixel_values"][..., 1:]}
    with pytest.raises(InvalidRequest, match=r"\[3, 20, 20\], but pixels were prepared as .*20, 19\]"):
        served.engine.generate(input_ids=ids, sampling_params=params, image_data=[wrong])
    ids.remove(IDS["image_token_index"])
    with pytest.raises(InvalidRequest, match=r"the prompt has \d+ places for what has \d+ embeddings"):
        served.engine.generate(input_ids=ids, sampling_params=params, image_data=[source])


LAYOUTS = {
    "first": [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.", ""),
    ],
    "all below model": [(r"^model\.vision_tower\.", "model.vision_tower.vision_model.")],
    "without vision_model": [],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_all_released_layouts(layout: str, tmp_path: Path) -> None:
    model_dir = CASES[1].make(tmp_path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32)
    names = model.state_dict()
    for pattern, replacement in LAYOUTS[layout]:
        names = {re.sub(pattern, replacement, name): tensor for name, tensor in names.items()}
    config = ModelConfig.from_pretrained(model_dir, dtype="float32")
    expected = load_model(config, model_dir).state_dict()
    save_file({name: tensor.clone() for name, tensor in names.items()}, tmp_path / "model.safetensors")
    loaded = load_model(config, model_dir).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("architecture", "wrong", "message"),
    [
        ("Llava", {"vision_config": TOWER | {"model_type": "vit"}}, "vision towers of type 'vit' are not supported"),
        ("Llava", {"text_config": {"model_type": "gpt2"}}, "language models of type 'gpt2' are not supported"),
        ("LlavaNext", {"vision_feature_select_strategy": "full"}, "must have 5 x 5 features, but .* gives 26"),
        ("LlavaNext", {"image_grid_pinpoints": [[20, 50]]}, r"multiples of the tile size 20, not \[20, 50\]"),
        ("LlavaOnevision", {"vision_aspect_ratio": "anyres"}, "must be anyres_max_ and a number, not 'anyres'"),
    ],
)
def test_refused(architecture: str, wrong: dict[str, Any], message: str) -> None:
    text = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    name = f"{architecture}ForConditionalGeneration"
    usual = {"vision_feature_select_strategy": "default", "image_grid_pinpoints": PINPOINTS}
    fields = {"vision_config": CLIP, "text_config": text, **usual} | wrong
    config = getattr(transformers, name).config_class(**fields)
    model_class, _ = ModelRegistry.resolve_model_cls([name])
    with pytest.raises(ValueError, match=message):
        model_class(config)


EXTREME = ((1, 1), (1, 3000), (3000, 1), (2, 901), (336, 336), (383, 385), (2304, 2304), (5000, 3001))
SWEEP = [tuple(size) for size in np.random.default_rng(0).integers(1, 3000, (60, 2)).tolist()]


@pytest.mark.parametrize("is_next", [True, False], ids=["next", "onevision"])
def test_tiles_are_packed_as_transformers_packs_them(is_next: bool) -> None:
    """At the sizes of released checkpoints; ``tile_grid`` foretells how many rows that makes."""
    config = transformers.LlavaNextConfig() if is_next else transformers.LlavaOnevisionConfig()
    their_class = transformers.LlavaNextModel if is_next else transformers.LlavaOnevisionModel
    option = {"vision_feature_select_strategy": "default"} if is_next else {}
    limit, newline = None if is_next else max_tiles(config), torch.randn(3)
    ours = SimpleNamespace(config=config, max_tiles=limit, image_newline=newline)
    for size in [*EXTREME, *SWEEP]:
        grid = tile_grid(size, config, limit)
        features = torch.randn(1 + grid.num_tiles, features_per_side(config) ** 2, 3)
        packed = LlavaNextModel.pack(ours, features, size)
        expected, _ = their_class.pack_image_features(
            SimpleNamespace(config=config), [features], [list(size)], image_newline=newline, **option
        )
        torch.testing.assert_close(packed, expected[0], msg=lambda text, size=size: f"{size}: {text}")
        assert len(packed) == features.shape[1] + grid.height * (grid.width + 1), size


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_two_ranks(case: VisionCase, tmp_path: Path) -> None:
    check_two_ranks_vision(case, tmp_path)
