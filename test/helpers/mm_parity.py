"""Whether the engine answers about images as transformers does, in float32: what tests of models that see share.

A test file lists cases, makes a fixture of them with ``serve_vision``, and runs each of ``VISION_CHECKS``. Both sides
are given what our processor made of a prompt: whether the processor is right is another test.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from parity import LOGPROB_TOLERANCE, same_logprobs, same_output_logprobs
from rtp_llm import Engine
from rtp_llm.srt.managers.tokenizer_manager import Prompt
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalInputs
from rtp_llm.srt.sampling_params import InvalidRequest
from tiny_models import Reference, assert_same_ids

NEW_TOKENS = 8
SIZES = ((56, 56), (84, 56), (40, 112))  # (width, height) of the images
LONG_TEXT = "It was a long way to the picture, and nobody knew what it would show. " * 3
CHUNKS = {"chunked_prefill_size": 16}
Feed = Callable[[list[int], MultimodalInputs], dict[str, Any]]


@dataclass(frozen=True)
class VisionCase:
    """
    Args:
        make: writes the checkpoint into a directory.
        feed: what transformers' model takes beside ``input_ids`` for these ids and media (see ``of_kind``, ``joined``).
        image, video: what stands for one in a prompt.
        options: of the engine.
        has_states: the model keeps states of sequences, besides or instead of keys and values.
    """

    name: str
    make: Callable[[Path], str]
    feed: Feed
    image: str
    video: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = SIZES
    slow: bool = False
    has_states: bool = False


@dataclass(frozen=True)
class Asked:
    """A prompt, and what transformers answers."""

    name: str
    text: str
    images: list[Image.Image]
    videos: list[Any]
    expected: Reference

    @property
    def call(self) -> dict[str, Any]:
        return {"prompt": self.text, "image_data": self.images or None, "video_data": self.videos or None}


@dataclass(frozen=True)
class ServedVision:
    case: VisionCase
    model_dir: str
    engine: Engine
    asked: list[Asked]


def draw_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft random colours, the same for the same numbers."""
    draw = np.random.default_rng([width, height, seed])
    small = draw.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def frames(num: int, width: int = 56, height: int = 56) -> np.ndarray:
    """[num, height, width, 3] uint8."""
    return np.stack([np.asarray(draw_image(width, height, seed)) for seed in range(num)])


def of_kind(media: MultimodalInputs, modality: Modality) -> list[MultimodalDataItem]:
    return [item for item in media.mm_items if item.modality is modality]


def joined(items: list[MultimodalDataItem], name: str = "feature") -> torch.Tensor | None:
    """A tensor of all items, one after the other; None of none."""
    return torch.cat([getattr(item, name) for item in items]) if items else None


def token_types(ids: list[int], media: MultimodalInputs) -> torch.Tensor:
    """[1, tokens]: 1 where an image is, 2 where a video is."""
    types = torch.zeros(1, len(ids), dtype=torch.int64)
    for item in media.mm_items:
        types[0, item.positions] = 1 if item.modality is Modality.IMAGE else 2
    return types


def feed_qwen(ids: list[int], media: MultimodalInputs) -> dict[str, Any]:
    """What transformers' Qwen-VL models take besides ids."""
    images, videos = of_kind(media, Modality.IMAGE), of_kind(media, Modality.VIDEO)
    return {
        "pixel_values": joined(images),
        "image_grid_thw": joined(images, "image_grid_thw"),
        "pixel_values_videos": joined(videos),
        "video_grid_thw": joined(videos, "video_grid_thw"),
        "mm_token_type_ids": token_types(ids, media),
    }


@contextmanager
def serve_vision(case: VisionCase, directory: Path) -> Iterator[ServedVision]:
    model_dir = case.make(directory)
    model = transformers.AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    with open_vision_engine(model_dir, **case.options) as engine:
        yield ServedVision(case, model_dir, engine, [_asked(case, model, engine, *prompt) for prompt in _prompts(case)])


def open_vision_engine(model_dir: str, **options: Any) -> Engine:
    options = {"context_length": 768, "max_total_tokens": 4096} | options
    return Engine(model_path=model_dir, device="cpu", dtype="float32", **options)


def _prompts(case: VisionCase) -> Iterator[tuple[str, str, list[Image.Image], list[Any]]]:
    images = [draw_image(*size) for size in case.sizes]
    mark = case.image
    yield "no image", "Tell me a story", [], []
    yield "one image", f"See {mark} and say what it is", images[:1], []
    yield "three images", f"{mark} then {mark} or{mark}?", images, []
    yield "image after a long text", f"{LONG_TEXT}{mark} So?", images[1:2], []
    if case.video is not None:
        yield "video", f"Watch {case.video} now", [], [frames(4)]
        yield "video and image", f"Watch {case.video} and {mark}!", images[2:], [frames(6, 84, 56)]


def _asked(
    case: VisionCase,
    model: Any,
    engine: Engine,
    name: str,
    text: str,
    images: list[Image.Image],
    videos: list[Any],
) -> Asked:
    prompt = Prompt(text=text, image_data=images or None, video_data=videos or None)
    prepared = asyncio.run(engine.tokenizer_manager.with_media(prompt))
    if prepared.media is None:
        ids, media = engine.tokenizer_manager.encode(text), MultimodalInputs([])
    else:
        ids, media = prepared.input_ids, MultimodalInputs.decode(prepared.media.content)
        check_estimates(engine.tokenizer_manager._processor, images, videos, media)
    options = {key: value for key, value in case.feed(ids, media).items() if value is not None}
    return Asked(name, text, images, videos, vision_reference(model, ids, options))


def check_estimates(processor: Any, images: list[Image.Image], videos: list[Any], media: MultimodalInputs) -> None:
    """What was told of media before they were decoded: no more tokens than there are, and no fewer numbers."""
    told = [processor.prepared_image(image.height, image.width) for image in images]
    told += [processor.prepared_video(*video.shape[:3]) for video in videos]
    num_tokens = sum(each.num_tokens for each in told)
    features = [
        part for item in media.mm_items for part in ([item.feature] if torch.is_tensor(item.feature) else item.feature)
    ]
    num_values = sum(part.numel() for part in features)
    most_tokens = sum(item.num_tokens for item in media.mm_items)
    assert most_tokens / 8 < num_tokens <= most_tokens
    assert num_values <= sum(each.num_values for each in told) <= 8 * num_values


@torch.inference_mode()
def vision_reference(model: Any, prompt_ids: list[int], options: dict[str, Any]) -> Reference:
    """As ``tiny_models.reference``, of a model that sees."""
    ids = torch.tensor([prompt_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
    logits = model(**inputs).logits[0].float()
    prompt_logprobs = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    generated = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps = torch.stack([step[0] for step in generated.logits]).float()
    best = steps.topk(2).values
    output_ids = generated.sequences[0, len(prompt_ids) :]
    output_logprobs = steps.log_softmax(-1).gather(1, output_ids[:, None])[:, 0]
    return Reference(
        output_ids.tolist(), (best[:, 0] - best[:, 1]).tolist(), prompt_logprobs.tolist(), output_logprobs.tolist()
    )


def ask(engine: Engine, asked: Asked | list[Asked], **options: Any) -> Any:
    """Ask one question, or a list of them at once."""
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    if isinstance(asked, Asked):
        return engine.generate(sampling_params=params, **asked.call, **options)
    calls = [item.call for item in asked]
    return engine.generate(
        [call["prompt"] for call in calls],
        params,
        image_data=[call["image_data"] for call in calls],
        video_data=[call["video_data"] for call in calls],
        **options,
    )


def check_single(served: ServedVision) -> None:
    for asked in served.asked:
        result = ask(served.engine, asked, return_logprob=True, logprob_start_len=0)
        assert_same_ids(result["output_ids"], asked.expected, f"{served.case.name}, single, {asked.name}")
        same_logprobs(result, asked.expected)


def check_batched(served: ServedVision) -> None:
    results = ask(served.engine, served.asked, return_logprob=True, logprob_start_len=0)
    for result, asked in zip(results, served.asked, strict=True):
        assert_same_ids(result["output_ids"], asked.expected, f"{served.case.name}, batched, {asked.name}")
        same_logprobs(result, asked.expected)


def check_warm(served: ServedVision) -> None:
    """All but the last token, or page, come from the cache; up to where prompt logprobs are wanted, if they are."""
    ask(served.engine, served.asked)
    page_size = served.case.options.get("page_size", 1)
    for asked in served.asked:
        what, num_tokens = f"{served.case.name}, warm, {asked.name}", len(asked.expected.prompt_logprobs) + 1
        result = ask(served.engine, asked, return_logprob=True)
        assert_same_ids(result["output_ids"], asked.expected, what)
        same_output_logprobs(result, asked.expected)
        assert result["meta_info"]["prompt_tokens"] == num_tokens, what
        cached, most = result["meta_info"]["cached_tokens"], (num_tokens - 1) // page_size * page_size
        if served.case.has_states:  # of which the last is kept at a multiple of 64
            assert (num_tokens - 1) // 64 * 64 <= cached <= most, what
        else:
            assert cached == most, what
        middle = num_tokens // 2  # within an image, where there is one
        result = ask(served.engine, asked, return_logprob=True, logprob_start_len=middle)
        assert_same_ids(result["output_ids"], asked.expected, what)
        found = [entry[0] for entry in result["meta_info"]["input_token_logprobs"][1:]]
        assert found == pytest.approx(asked.expected.prompt_logprobs[middle:], abs=LOGPROB_TOLERANCE), what
        assert result["meta_info"]["cached_tokens"] <= middle, what


def check_chunked(served: ServedVision) -> None:
    """Chunks end within images."""
    with open_vision_engine(served.model_dir, **served.case.options | CHUNKS) as engine:
        for asked in served.asked:
            result = ask(engine, asked, return_logprob=True, logprob_start_len=0)
            assert_same_ids(result["output_ids"], asked.expected, f"{served.case.name}, chunked, {asked.name}")
            same_logprobs(result, asked.expected)
        for result, asked in zip(ask(engine, served.asked), served.asked, strict=True):
            assert_same_ids(result["output_ids"], asked.expected, f"{served.case.name}, chunked, {asked.name}")


EXTREME = ((1, 1), (1, 3), (3, 1), (2, 5), (20_000, 1), (1, 20_000), (20_000, 120))


def check_extreme_shapes(served: ServedVision) -> None:
    """Images of one pixel, and of 20,000 by 120, are seen; very long ones may be refused, and politely."""
    for size in EXTREME:
        call = {"prompt": f"See {served.case.image}", "image_data": draw_image(*size)}
        try:
            result = served.engine.generate(sampling_params={"max_new_tokens": 1}, **call)
        except InvalidRequest as error:
            assert error.param == "image_data" and f"{size[0]} x {size[1]} pixels" in str(error)
            assert max(size) > 60 * min(size), f"{served.case.name} refuses {size}"
        else:
            assert len(result["output_ids"]) == 1


VISION_CHECKS = (check_single, check_batched, check_warm, check_chunked, check_extreme_shapes)


def check_two_ranks_vision(case: VisionCase, directory: Path) -> None:
    with serve_vision(case, directory) as served, open_vision_engine(served.model_dir, tp_size=2) as engine:
        for result, asked in zip(ask(engine, served.asked), served.asked, strict=True):
            assert_same_ids(result["output_ids"], asked.expected, f"{case.name}, two ranks, {asked.name}")


def vision_params(cases: tuple[VisionCase, ...]) -> list[Any]:
    """For a fixture: one worker has all tests of a case, and slow cases are marked."""
    return [
        pytest.param(
            case,
            id=case.name,
            marks=[pytest.mark.xdist_group(case.name), *([pytest.mark.slow] if case.slow else [])],
        )
        for case in cases
    ]
