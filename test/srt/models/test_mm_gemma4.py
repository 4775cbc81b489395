"""Gemma 4 answers about images as transformers does, and its processor prepares them as transformers' does."""

import asyncio
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from mm_parity import (
    VISION_CHECKS,
    ServedVision,
    VisionCase,
    check_two_ranks_vision,
    of_kind,
    open_vision_engine,
    serve_vision,
    token_types,
    vision_params,
)
from torch.nn.utils.rnn import pad_sequence
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

from parity import Tensors, rewrite_tensors
from rtp_llm.models_py.gemma4_mm import squares
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalInputs
from rtp_llm.srt.sampling_params import InvalidRequest
from tiny_models import make_tiny_vision, special_id

BEGIN, END, IMAGE, VIDEO, AUDIO = TOKENS = ("<|image>", "<image|>", "<|image|>", "<|video|>", "<|audio|>")
FULL, WINDOW = "full_attention", "sliding_attention"
TEXT = {
    "sliding_window": 9,
    "layer_types": [WINDOW, FULL] * 2,
    "num_hidden_layers": 4,
    "global_head_dim": 20,
    "use_bidirectional_attention": "vision",
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 120,
}
TOWER = {
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 160,
}
PREPROCESSOR = {
    "image_processor_type": "Gemma4ImageProcessor",
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "max_soft_tokens": 70,
}
IDS = {
    "boi_token_id": BEGIN,
    "eoi_token_id": END,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "audio_token_id": AUDIO,
}
SOUNDS = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [4, 2],
    "output_proj_dims": 28,
}
SMALL = {  # as the sizes that know sounds
    "text_config": {
        "use_bidirectional_attention": None,
        "hidden_size_per_layer_input": 10,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 3.0,
    },
    "vision_config": {"use_clipped_linears": True},
    "audio_config": SOUNDS,
}
EXPERTS = {
    "text_config": {
        "attention_k_eq_v": True,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 20,
    },
    "vision_config": {"standardize": True},
    "tie_word_embeddings": False,
}


def make(directory: Path, preprocessor: Any = None, **config: Any) -> str:
    parts = {
        "text_config": TEXT | config.pop("text_config", {}),
        "vision_config": TOWER | config.pop("vision_config", {}),
        "audio_config": None,
    }
    ids = {name: special_id(TOKENS, token) for name, token in IDS.items()}
    files = {"preprocessor_config.json": PREPROCESSOR | (preprocessor or {})}
    model_dir = make_tiny_vision("Gemma4ForConditionalGeneration", directory, parts | ids | config, TOKENS, files)
    rewrite_tensors(model_dir, _disturbed)
    return model_dir


# What a model that was never trained has in its buffers, and what it is changed to: a mean and a deviation.
BUFFERS = {
    "layer_scalar": (0.8, 0.1),
    "std_bias": (0.0, 1.0),
    "std_scale": (1.0, 0.3),
    "input_min": (-0.9, 0.1),
    "input_max": (0.9, 0.1),
    "output_min": (-0.7, 0.1),
    "output_max": (0.7, 0.1),
}


def _disturbed(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(4)
    changed = dict(tensors)
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] in BUFFERS:
            mean, deviation = BUFFERS[name.rpartition(".")[2]]
            changed[name] = mean + deviation * torch.randn(tensor.shape, generator=generator)
    return changed


def feed(ids: list[int], media: MultimodalInputs) -> dict[str, Any]:
    images = of_kind(media, Modality.IMAGE)
    if not images:
        return {}
    pixels, places = ([tensor[0] for tensor in tensors] for tensors in zip(*map(_of_item, images), strict=True))
    return {
        "pixel_values": pad_sequence(pixels, batch_first=True),
        "image_position_ids": pad_sequence(places, batch_first=True, padding_value=-1),
        "mm_token_type_ids": token_types(ids, media),
    }


def _of_item(item: MultimodalDataItem) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.as_tensor(item.feature), item.image_position_ids


CASES = (
    VisionCase("gemma4", make, feed, IMAGE),
    VisionCase("gemma4-small-pages", partial(make, **SMALL), feed, IMAGE, options={"page_size": 4}, slow=True),
    VisionCase("gemma4-experts-untied", partial(make, **EXPERTS), feed, IMAGE, slow=True),
    VisionCase("gemma4-in-plain-torch", make, feed, IMAGE, options={"attention_backend": "torch_native"}, slow=True),
)


@pytest.fixture(scope="module", params=vision_params(CASES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedVision]:
    with serve_vision(request.param, tmp_path_factory.mktemp(request.param.name)) as served:
        yield served


@pytest.mark.parametrize("check", VISION_CHECKS)
def test_answers_are_the_references(served: ServedVision, check: Callable[[ServedVision], None]) -> None:
    check(served)


def test_the_processor_is_transformers(served: ServedVision) -> None:
    """Ids, pixels and places of every prompt."""
    image_processor = transformers.AutoImageProcessor.from_pretrained(served.model_dir, backend="pil")
    tokens = SimpleNamespace(boi_token=BEGIN, eoi_token=END, image_token=IMAGE)
    for asked in served.asked[1:]:
        prepared = asyncio.run(served.engine.tokenizer_manager.with_media(Prompt(asked.text, image_data=asked.images)))
        ours = MultimodalInputs.decode(prepared.media.content).mm_items
        theirs = image_processor(images=asked.images, return_tensors="pt")
        for i, item in enumerate(ours):
            pixels, places = _of_item(item)
            num_patches = pixels.shape[1]
            assert torch.equal(pixels[0], theirs["pixel_values"][i][:num_patches]), asked.name
            assert torch.equal(places[0], theirs["image_position_ids"][i][:num_patches])
            assert (theirs["image_position_ids"][i][num_patches:] == -1).all()
        texts = (transformers.Gemma4Processor.replace_image_token(tokens, theirs, i) for i in range(len(ours)))
        text = re.sub(re.escape(IMAGE), lambda _, texts=texts: next(texts), asked.text)
        expected = served.engine.tokenizer_manager.encode(text)
        assert prepared.input_ids == expected, asked.name


@pytest.mark.parametrize("most", [70, 280])
def test_images_are_resized_as_by_transformers(most: int) -> None:
    draw = random.Random(most)
    for _ in range(2000):
        height, width = (int(2 ** draw.uniform(0, 14)) for _ in range(2))
        side = 3 * 16
        expected = get_aspect_ratio_preserving_size(height, width, 16, most * 9, 3)
        assert squares(height, width, side, most) == tuple(size // side for size in expected), (height, width)


def test_what_transformers_processor_made_is_taken(served: ServedVision) -> None:
    """Also several images at once, which it pads."""
    image_processor = transformers.AutoImageProcessor.from_pretrained(served.model_dir, backend="pil")
    asked = served.asked[2]
    theirs = image_processor(images=asked.images, return_tensors="pt")
    counts = iter(theirs["num_soft_tokens_per_image"])
    text = re.sub(re.escape(IMAGE), lambda _: f"{BEGIN}{IMAGE * next(counts)}{END}", asked.text)
    params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    result = served.engine.generate(text, params, image_data=[{"format": "processor_output", **theirs}])
    assert result["output_ids"] == asked.expected.output_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_position_ids": torch.zeros(1, 4, 2)}, "a whole grid, row by row"),
        ({"image_position_ids": torch.zeros(1, 3, 2)}, r"need image_position_ids \[images, patches, 2\]"),
        ({"image_position_ids": None}, "need pixel_values and image_position_ids"),
        ({"pixel_values": torch.zeros(1, 4, 47)}, "takes patches of 48 values"),
    ],
)
def test_pixels_that_do_not_fit_are_refused(served: ServedVision, change: dict[str, Any], message: str) -> None:
    places = torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]])
    data = {"pixel_values": torch.zeros(1, 4, 48), "image_position_ids": places} | change
    with pytest.raises(InvalidRequest, match=message):
        served.engine.generate(f"See {IMAGE}", image_data=[{"format": "processor_output", **data}])


def test_sounds_are_refused(served: ServedVision) -> None:
    with pytest.raises(InvalidRequest, match="sounds are not supported") as raised:
        served.engine.generate(f"Hear {AUDIO}", audio_data=["sound.wav"])
    assert raised.value.param == "audio_data"


def test_videos_are_refused(served: ServedVision) -> None:
    with pytest.raises(InvalidRequest) as raised:
        served.engine.generate(f"Watch {VIDEO}", video_data=["film.mp4"])
    assert raised.value.param == "video_data"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            '{"vision_config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0}}}',
            "is 'linear'",
        ),
        ('{"text_config": {"use_bidirectional_attention": "all"}}', "use_bidirectional_attention='all'"),
    ],
)
def test_what_the_model_cannot_do_is_refused(tmp_path: Path, override: str, message: str) -> None:
    path = make(tmp_path)
    with pytest.raises(ModelBuildError, match=re.escape(message)):
        open_vision_engine(path, json_model_override_args=override)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES[:3]])
def test_two_ranks(case: VisionCase, tmp_path: Path) -> None:
    check_two_ranks_vision(case, tmp_path)
