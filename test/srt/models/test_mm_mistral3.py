"""Mistral 3 answers about images as transformers does, and its processor prepares them as transformers' does."""

import asyncio
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from mm_parity import (
    VISION_CHECKS,
    ServedVision,
    VisionCase,
    check_two_ranks_vision,
    draw_image,
    joined,
    of_kind,
    open_vision_engine,
    serve_vision,
    vision_params,
)

from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.multimodal.items import Modality, MultimodalInputs
from rtp_llm.srt.sampling_params import InvalidRequest
from tiny_models import make_tiny_vision, special_id

IMAGE, BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
TOKENS = (IMAGE, BREAK, END)
PATCH, LONGEST = 4, 64  # pixels
TOWER = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": LONGEST,
    "patch_size": PATCH,
}
MISTRAL = {"model_type": "mistral", "sliding_window": None}
MINISTRAL = {
    "model_type": "ministral3",
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "original_max_position_embeddings": 64,
        "max_position_embeddings": 1024,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.5,
    },
}


def make(directory: Path, text: dict[str, Any] = MISTRAL, merge_size: int = 2, **config: Any) -> str:
    parts = {"vision_config": TOWER, "text_config": text, "spatial_merge_size": merge_size}
    ids = {"image_token_index": special_id(TOKENS, IMAGE)}
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "PixtralImageProcessor",
            "size": {"longest_edge": LONGEST},
            "patch_size": PATCH,
        },
        "processor_config.json": {"patch_size": PATCH, "spatial_merge_size": merge_size, "image_token": IMAGE},
    }
    untied = {"tie_word_embeddings": False}
    return make_tiny_vision("Mistral3ForConditionalGeneration", directory, parts | ids | untied | config, TOKENS, files)


def feed(ids: list[int], media: MultimodalInputs) -> dict[str, Any]:
    """Images padded to one size."""
    images = of_kind(media, Modality.IMAGE)
    if not images:
        return {}
    sizes = joined(images, "image_sizes")
    height, width = sizes.max(dim=0).values.tolist()
    padded = [F.pad(i.feature, (0, width - i.feature.shape[3], 0, height - i.feature.shape[2])) for i in images]
    return {"pixel_values": torch.cat(padded), "image_sizes": sizes}


CASES = (
    VisionCase("mistral3", make, feed, IMAGE),
    VisionCase("mistral3-ministral", partial(make, text=MINISTRAL), feed, IMAGE, slow=True),
    VisionCase(
        "mistral3-tied-layer",
        partial(
            make,
            text=MISTRAL | {"sliding_window": 9},
            merge_size=1,
            tie_word_embeddings=True,
            vision_feature_layer=[-2],
            multimodal_projector_bias=True,
            projector_hidden_act="relu",
        ),
        feed,
        IMAGE,
        options={"page_size": 4},
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
    """Pixels of every prompt, and its ids. (transformers' whole processor cannot be imported without torchvision.)"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(served.model_dir)
    image_processor = transformers.AutoImageProcessor.from_pretrained(served.model_dir, backend="pil")
    side = PATCH * transformers.AutoConfig.from_pretrained(served.model_dir).spatial_merge_size
    for asked in served.asked[1:]:
        prepared = asyncio.run(served.engine.tokenizer_manager.with_media(Prompt(asked.text, image_data=asked.images)))
        ours = feed(prepared.input_ids, MultimodalInputs.decode(prepared.media.content))
        expected = image_processor(images=asked.images, patch_size=side, return_tensors="pt")
        torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"], rtol=0, atol=0)
        assert torch.equal(ours["image_sizes"], torch.as_tensor(expected["image_sizes"]))
        assert prepared.input_ids == tokenizer.encode(_spelled(asked.text, expected["image_sizes"], side)), asked.name


def _spelled(text: str, sizes: Any, side: int) -> str:
    """The text with each image's tokens."""
    parts = text.split(IMAGE)
    for i, (height, width) in enumerate(torch.as_tensor(sizes).tolist(), 1):
        rows = [IMAGE * (width // side) + BREAK for _ in range(height // side)]
        parts[i] = "".join(rows).removesuffix(BREAK) + END + parts[i]
    return "".join(parts)


def test_a_head_counts_though_the_configuration_ties_it_by_default(tmp_path: Path) -> None:
    """Published config.json files say nothing of tie_word_embeddings, which the class then takes for true."""
    path = make(tmp_path / "untied")
    with open_vision_engine(path) as engine:
        expected = engine.generate("Hello", {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True})["output_ids"]
    file = Path(path, "config.json")
    config = json.loads(file.read_text())
    del config["tie_word_embeddings"]
    file.write_text(json.dumps(config))
    assert transformers.AutoConfig.from_pretrained(path).tie_word_embeddings
    with open_vision_engine(path) as engine:
        again = engine.generate("Hello", {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True})["output_ids"]
    assert again == expected


def test_an_image_of_which_nothing_would_be_left_is_refused(served: ServedVision) -> None:
    prompt = Prompt(IMAGE, image_data=[draw_image(2 * LONGEST, 1)])
    with pytest.raises(InvalidRequest, match="128 x 1 pixels is too long"):
        asyncio.run(served.engine.tokenizer_manager.with_media(prompt))


def test_several_feature_layers_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(ModelBuildError, match="vision_feature_layer must be one layer"):
        open_vision_engine(path, json_model_override_args='{"vision_feature_layer": [-1, -2]}')


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    check_two_ranks_vision(CASES[0], tmp_path)
