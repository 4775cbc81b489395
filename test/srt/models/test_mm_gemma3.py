"""Gemma 3 answers about images as transformers does, and its processor prepares them as transformers' does."""

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
    draw_image,
    joined,
    of_kind,
    open_vision_engine,
    serve_vision,
    token_types,
    vision_params,
)

from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.multimodal.items import Modality, MultimodalInputs
from tiny_models import make_tiny_vision, special_id

BEGIN, END, SOFT = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
TOKENS = (BEGIN, END, SOFT)
SIDE = 32  # pixels of an image
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 4,
}
TEXT = {"sliding_window": 9, "query_pre_attn_scalar": 12, "layer_types": ["sliding_attention", "full_attention"] * 2}
SCAN = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 3}


def make(directory: Path, num_tokens: int = 16, preprocessor: Any = None, **config: Any) -> str:
    ids = dict(zip(("boi_token_index", "eoi_token_index", "image_token_index"), map(_id, TOKENS), strict=True))
    text = {"num_hidden_layers": 4, **TEXT, **config.pop("text_config", {})}
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": SIDE, "width": SIDE},
            **(preprocessor or {}),
        }
    }
    parts = {"text_config": text, "vision_config": TOWER, "mm_tokens_per_image": num_tokens}
    return make_tiny_vision("Gemma3ForConditionalGeneration", directory, parts | ids | config, TOKENS, files)


def _id(token: str) -> int:
    return special_id(TOKENS, token)


def feed(ids: list[int], media: MultimodalInputs) -> dict[str, Any]:
    return {
        "pixel_values": joined(of_kind(media, Modality.IMAGE)),
        "token_type_ids": token_types(ids, media) if media.mm_items else None,
    }


CASES = (
    VisionCase("gemma3", make, feed, BEGIN),
    VisionCase("gemma3-pan-and-scan", partial(make, preprocessor=SCAN), feed, BEGIN, slow=True),
    VisionCase(
        "gemma3-untied-pages",
        partial(make, num_tokens=4, tie_word_embeddings=False),
        feed,
        BEGIN,
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
    """Ids and pixels of every prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(served.model_dir)
    for name, token in zip(("boi_token", "eoi_token", "image_token"), TOKENS, strict=True):
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", _id(token))
    image_processor = transformers.AutoImageProcessor.from_pretrained(served.model_dir, backend="pil")
    num_tokens = transformers.AutoConfig.from_pretrained(served.model_dir).mm_tokens_per_image
    theirs = transformers.Gemma3Processor(image_processor, tokenizer, image_seq_length=num_tokens)
    scan = SCAN if image_processor.do_pan_and_scan else {}
    for asked in served.asked[1:]:
        prepared = asyncio.run(served.engine.tokenizer_manager.with_media(Prompt(asked.text, image_data=asked.images)))
        ours = feed(prepared.input_ids, MultimodalInputs.decode(prepared.media.content))
        expected = theirs(images=[asked.images], text=[asked.text], return_tensors="pt", **scan)
        assert prepared.input_ids == expected["input_ids"][0].tolist(), asked.name
        torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"], rtol=0, atol=0)
        assert torch.equal(ours["token_type_ids"], torch.as_tensor(expected["token_type_ids"]))


def test_an_image_far_from_square_is_cropped(tmp_path: Path) -> None:
    """The crops change the answer, and each sees only itself both ways."""
    with open_vision_engine(make(tmp_path, preprocessor=SCAN)) as engine:
        prompt = Prompt(f"See {BEGIN}", image_data=[draw_image(96, 32)])
        prepared = asyncio.run(engine.tokenizer_manager.with_media(prompt))
    (item,) = MultimodalInputs.decode(prepared.media.content).mm_items
    assert [last - first + 1 for first, last in item.offsets] == [16] * 4


def test_ids_are_expanded_like_text(served: ServedVision) -> None:
    asked = served.asked[1]
    ids = served.engine.tokenizer_manager.encode(asked.text)
    prepared = [
        asyncio.run(served.engine.tokenizer_manager.with_media(Prompt(image_data=asked.images, **prompt)))
        for prompt in ({"text": asked.text}, {"input_ids": ids})
    ]
    assert prepared[0].input_ids == prepared[1].input_ids
    assert prepared[0].media == prepared[1].media


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('{"mm_tokens_per_image": 9}', "mm_tokens_per_image=9: it must be the square of a divisor of 8"),
        ('{"text_config": {"final_logit_softcapping": 30.0}}', "final_logit_softcapping is 30.0"),
    ],
)
def test_what_the_model_cannot_do_is_refused(tmp_path: Path, override: str, message: str) -> None:
    path = make(tmp_path)
    with pytest.raises(ModelBuildError, match=re.escape(message)):
        open_vision_engine(path, json_model_override_args=override)


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    check_two_ranks_vision(CASES[0], tmp_path)
