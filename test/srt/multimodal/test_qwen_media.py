"""What the Qwen-VL processors make of prompts and media is what transformers makes of them."""

import asyncio
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from mm_parity import draw_image, frames
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_video

from rtp_llm.models_py.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from rtp_llm.models_py.qwen2_vl import Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from rtp_llm.models_py.qwen3_vl import Qwen3VLForConditionalGeneration
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.managers.multimodal_processor import get_mm_processor
from rtp_llm.srt.managers.tokenizer_manager import load_tokenizer
from rtp_llm.srt.multimodal.hf_processor import HfProcessor
from rtp_llm.srt.multimodal.items import Modality, MultimodalProcessorOutput
from rtp_llm.srt.multimodal.media import MediaLoader, VideoFrames, VideoInfo
from rtp_llm.srt.multimodal.qwen_media import Segment, VideoSettings, fit_size, mrope_positions, patch_times, patchify
from rtp_llm.srt.sampling_params import InvalidRequest
from tiny_seeing import CONFIG, IMAGE, VIDEO, make_seeing

FAMILIES = {
    "Qwen2VL": Qwen2VLForConditionalGeneration,
    "Qwen2_5_VL": Qwen2_5_VLForConditionalGeneration,
    "Qwen3VL": Qwen3VLForConditionalGeneration,
}
VIDEO_SETTINGS = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its tokenizer and image processor serve all three."""
    return make_seeing(tmp_path_factory.mktemp("qwen"))


def processor_of(family: str, model_dir: str, video: dict[str, Any] | None = None, **options: Any) -> Qwen2VLProcessor:
    vision = {"hidden_size": 48} if family == "Qwen2VL" else {"out_hidden_size": 48, "patch_size": 14}
    text = CONFIG["text_config"] | {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = CONFIG | {"vision_config": vision, "text_config": text}
    hf_config = getattr(transformers, f"{family}Config")(**config, architectures=[FAMILIES[family].__name__])
    hf_processor = HfProcessor(model_dir, load_tokenizer(model_dir))
    hf_processor.__dict__["video_settings"] = VIDEO_SETTINGS if video is None else video
    args = ServerArgs(model_path=model_dir, **options)
    loader = MediaLoader(trusted=True)
    return get_mm_processor(hf_config, args, hf_processor, model_cls=FAMILIES[family], loader=loader)


def process(processor: Qwen2VLProcessor, prompt: Any, images: Any = (), videos: Any = ()) -> MultimodalProcessorOutput:
    call = processor.process_mm_data_async(
        image_data=list(images), audio_data=[], input_text=prompt, request_obj=SimpleNamespace(video_data=list(videos))
    )
    return asyncio.run(call)


def joined(output: MultimodalProcessorOutput, modality: Modality, name: str = "feature") -> torch.Tensor:
    return torch.cat([getattr(item, name) for item in output.mm_items if item.modality is modality])


# Whole prompts


class PreparedVideos:
    """In the place of transformers' video processors, which need torchvision."""

    merge_size = temporal_patch_size = 2

    def __init__(self, output: MultimodalProcessorOutput, videos: list[VideoFrames]) -> None:
        self.output = output
        self.videos = videos
        self.valid_kwargs = transformers.processing_utils.VideosKwargs

    def __call__(self, videos: Any, **kwargs: Any) -> transformers.BatchFeature:
        metadata = [
            transformers.video_utils.VideoMetadata(
                total_num_frames=round(video.duration * video.fps), fps=video.fps, frames_indices=list(video.indices)
            )
            for video in self.videos
        ]
        grids = joined(self.output, Modality.VIDEO, "video_grid_thw")
        return transformers.BatchFeature({"video_grid_thw": grids, "video_metadata": metadata})


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_transformers(family: str, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = processor_of(family, model_dir)
    text = f"{IMAGE}One{VIDEO} and{IMAGE}{IMAGE} or {VIDEO}?"
    images = [draw_image(56, 56), draw_image(300, 41), draw_image(5, 9)]
    videos = [
        VideoFrames(frames(5, 90, 50), 30.0, 6.5, [0, 40, 80, 120, 190], []),
        VideoFrames(frames(2, 56, 56), 24.0, 2 / 24, [0, 1], []),
    ]

    output = process(processor, text, images, videos)

    mixin = transformers.processing_utils.ProcessorMixin
    monkeypatch.setattr(mixin, "check_argument_for_proper_class", lambda self, name, argument: type(argument))
    parts = processor._processor
    theirs = getattr(transformers, f"{family}Processor")(
        parts.image_processor, parts.tokenizer, PreparedVideos(output, videos)
    )
    expected = theirs(text=[text], images=images, videos=[video.frames for video in videos], return_tensors="pt")
    assert output.input_ids == expected["input_ids"][0].tolist()
    assert torch.equal(joined(output, Modality.IMAGE), expected["pixel_values"])
    assert torch.equal(joined(output, Modality.IMAGE, "image_grid_thw"), expected["image_grid_thw"])
    if family == "Qwen2_5_VL":
        seconds = joined(output, Modality.VIDEO, "second_per_grid_ts")
        assert torch.allclose(seconds, torch.as_tensor(expected["second_per_grid_ts"]))
    ids = processor.tokenizer.encode(text)
    assert process(processor, ids, images, videos).input_ids == output.input_ids


def test_frames_have_their_times_before_them(model_dir: str) -> None:
    processor = processor_of("Qwen3VL", model_dir, {"size": {"shortest_edge": 1, "longest_edge": 10**6}})
    output = process(processor, f"See{VIDEO}", videos=[frames(6)])  # bare frames are 1/24 s apart
    text = processor.tokenizer.decode(output.input_ids)
    frame = f"<|vision_start|>{'<|video_pad|>' * 4}<|vision_end|>"
    times = "".join(f"<{seconds} seconds>{frame}" for seconds in ("0.0", "0.1", "0.2"))
    assert text == f"See<|vision_start|>{times}<|vision_end|>"
    assert [last - first + 1 for first, last in output.mm_items[0].offsets] == [4, 4, 4]
    assert patch_times([0, 30, 60, 90, 120], 30.0, 2) == [0.5, 2.5, 4.0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (5, 9), (56, 56), (300, 41), (41, 8000), (3000, 2000)])
def test_what_is_told_before_decoding_is_what_is_made(family: str, size: tuple[int, int], model_dir: str) -> None:
    processor = processor_of(family, model_dir)
    output = process(processor, IMAGE, [draw_image(*size)])
    told = processor.prepared_image(size[1], size[0])
    assert told.num_tokens == output.mm_items[0].num_tokens
    assert told.num_values == output.mm_items[0].feature.numel()
    if max(size) < 1000:
        output = process(processor, VIDEO, videos=[frames(5, *size)])
        told = processor.prepared_video(5, size[1], size[0])
        assert told.num_tokens == output.mm_items[0].num_tokens
        assert told.num_values == output.mm_items[0].feature.numel()


def test_extreme_shapes_are_refused_before_decoding(model_dir: str) -> None:
    with pytest.raises(InvalidRequest, match="200 times"):
        processor_of("Qwen2VL", model_dir).prepared_image(1, 201)


# Positions


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_transformers(family: str, model_dir: str) -> None:
    processor = processor_of(family, model_dir)
    text = f"{IMAGE}It{VIDEO}{VIDEO} is{IMAGE} so"
    output = process(processor, text, [draw_image(60, 90), draw_image(400, 28)], [frames(9, 112, 28), frames(4)])
    kinds = torch.zeros(1, len(output.input_ids), dtype=torch.int64)
    for item in output.mm_items:
        kinds[0, item.positions] = 1 if item.modality is Modality.IMAGE else 2
    options = {
        "image_grid_thw": joined(output, Modality.IMAGE, "image_grid_thw"),
        "video_grid_thw": joined(output, Modality.VIDEO, "video_grid_thw"),
    }
    if family == "Qwen2_5_VL":
        processor.hf_config.vision_config.tokens_per_second = 40
        output = process(processor, text, [draw_image(60, 90), draw_image(400, 28)], [frames(9, 112, 28), frames(4)])
        options["second_per_grid_ts"] = joined(output, Modality.VIDEO, "second_per_grid_ts")
    with torch.device("meta"):
        model = getattr(transformers, f"{family}Model")(processor.hf_config)
    ids = torch.tensor([output.input_ids])
    positions, delta = model.get_rope_index(input_ids=ids, mm_token_type_ids=kinds, **options)
    assert output.mrope_positions is not None
    assert torch.equal(output.mrope_positions, positions[:, 0])
    assert output.mrope_position_delta == int(delta)


def test_positions_of_a_small_prompt() -> None:
    """Two tokens, an image of 2 x 3 merged squares, one token."""
    positions, delta = mrope_positions(9, [Segment(2, (1, 4, 6))], 2)
    assert positions.tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]
    assert delta == 6 - 9
    positions, delta = mrope_positions(4, [Segment(0, (2, 2, 4), 2.5)], 2)
    assert positions.tolist() == [[0, 0, 2, 2], [0, 0, 0, 0], [0, 1, 0, 1]]
    assert delta == 3 - 4


# Sizes and patches


def test_sizes_are_transformers() -> None:
    draw = np.random.default_rng(0)
    for height, width in draw.integers(1, 3000, (300, 2)).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        factor, low, high = (
            int(draw.choice([16, 28, 32])),
            int(draw.integers(1, 10**5)),
            int(draw.integers(10**5, 10**7)),
        )
        assert fit_size(height, width, factor, low, high) == smart_resize(height, width, factor, low, high)


@pytest.mark.parametrize("caps", [False, True])
def test_sizes_of_whole_videos_are_transformers(caps: bool, model_dir: str) -> None:
    settings = {"size": {"shortest_edge": 50_000, "longest_edge": 2_000_000}, "cap_pixels_per_frame": caps}
    processor = processor_of("Qwen3VL", model_dir, settings)
    draw = np.random.default_rng(1)
    for num_frames, height, width in draw.integers((2, 10, 10), (60, 900, 900), (200, 3)).tolist():
        most = max(min(768 * 28**2, 2_000_000 // num_frames), 52_500) * num_frames if caps else 2_000_000
        expected = smart_resize_video(
            num_frames, height, width, temporal_factor=2, factor=28, min_pixels=50_000, max_pixels=most
        )
        assert processor.frame_size(num_frames, height, width) == expected


def test_an_image_is_a_short_video(model_dir: str) -> None:
    """Its patches are those that transformers' image processor makes."""
    parts = HfProcessor(model_dir, load_tokenizer(model_dir))
    processor = processor_of("Qwen2VL", model_dir, parts.image_settings)
    image = draw_image(112, 84)
    expected = parts.image_processor(images=[image], return_tensors="pt")
    item = processor.video_item(VideoFrames(np.asarray(image)[None], 1.0, 1.0, [0], [0.0]))
    assert torch.equal(item.video_grid_thw, expected["image_grid_thw"])
    assert torch.allclose(item.feature, expected["pixel_values"], atol=1e-5)


def test_patches() -> None:
    """Each value of each patch stands where it should; the last frame is repeated."""
    size, merge, step = 3, 2, 2
    pixels = torch.randn(3, 3, 12, 6)
    patches, grid = patchify(pixels, size, merge, step)
    assert grid == (2, 4, 2)
    assert patches.shape == (16, 3 * step * size * size)
    squares = itertools.product(range(2), range(2), range(1), range(merge), range(merge))
    for patch, (time, square_row, square_column, row, column) in zip(patches, squares, strict=True):
        y, x = (square_row * merge + row) * size, (square_column * merge + column) * size
        values = patch.view(3, step, size, size)
        for frame in range(step):
            assert torch.equal(values[:, frame], pixels[min(time * step + frame, 2), :, y : y + size, x : x + size])


def test_frames_are_made_smaller_as_images_are(model_dir: str) -> None:
    settings = processor_of("Qwen2VL", model_dir, {"do_normalize": False}).video
    image = draw_image(130, 70)
    expected = torch.from_numpy(np.asarray(image.resize((56, 28), Image.Resampling.BICUBIC)).copy()).permute(2, 0, 1)
    found = settings.prepared(np.asarray(image)[None], (28, 56))[0] * 255
    assert (found - expected).abs().max() <= 1.01  # of 255: the two libraries round differently


# Frames


@pytest.mark.parametrize(
    "family, settings, video, expected",
    [
        ("Qwen2VL", {}, VideoInfo(100, 25.0, 4.0, 1, 1), [0, 12, 25, 37, 50, 62, 75, 87]),
        ("Qwen2VL", {}, VideoInfo(7, 30.0, 7 / 30, 1, 1), [0, 1, 3, 5]),  # at least four
        ("Qwen2VL", {}, VideoInfo(3, 30.0, 0.1, 1, 1), [0, 1]),  # a multiple of two
        ("Qwen2VL", {}, VideoInfo(1, 30.0, 1 / 30, 1, 1), [0]),
        ("Qwen2VL", {"fps": 1, "max_frames": 6}, VideoInfo(1000, 25.0, 40.0, 1, 1), [0, 166, 333, 500, 666, 833]),
        ("Qwen2_5_VL", {"num_frames": 3}, VideoInfo(100, 25.0, 4.0, 1, 1), [0, 25, 50, 75]),
        ("Qwen3VL", {}, VideoInfo(100, 25.0, 4.0, 1, 1), [0, 14, 28, 42, 57, 71, 85, 99]),
        ("Qwen3VL", {}, VideoInfo(3, 30.0, 0.1, 1, 1), [0, 1, 2]),
        ("Qwen3VL", {"num_frames": 2}, VideoInfo(100, 25.0, 4.0, 1, 1), [0, 99]),
    ],
)
def test_which_frames_are_looked_at(
    family: str, settings: dict[str, Any], video: VideoInfo, expected: list[int], model_dir: str
) -> None:
    assert processor_of(family, model_dir, settings).sample_frames(video) == expected


def test_old_names_of_sizes(model_dir: str) -> None:
    for settings in ({"min_pixels": 3136, "max_pixels": 10**6}, {"size": {"min_pixels": 3136, "max_pixels": 10**6}}):
        video = processor_of("Qwen2VL", model_dir, settings).video
        assert (video.min_pixels, video.max_pixels) == (3136, 10**6)


# What is refused


@pytest.mark.parametrize("family", FAMILIES)
def test_too_long_for_their_height(family: str, model_dir: str) -> None:
    processor = processor_of(family, model_dir)
    with pytest.raises(InvalidRequest, match="201 x 1 pixels is more than 200 times") as caught:
        process(processor, IMAGE, [Image.new("RGB", (201, 1))])
    assert caught.value.param == "image_data"
    if family != "Qwen3VL":
        with pytest.raises(InvalidRequest, match="more than 200 times"):
            process(processor, VIDEO, videos=[np.zeros((2, 201, 1, 3), np.uint8)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_beyond_the_context(family: str, model_dir: str) -> None:
    processor = processor_of(
        family, model_dir, {"size": {"shortest_edge": 1, "longest_edge": 10**8}}, context_length=40
    )
    with pytest.raises(InvalidRequest, match="the video takes 54 tokens, and the model's context has 40") as caught:
        process(processor, VIDEO, videos=[frames(6, 168, 84)])
    assert caught.value.param == "video_data"


@pytest.mark.parametrize(
    "source, match",
    [
        ({"feature": torch.zeros(4, 48)}, "image_grid_thw must tell frames, rows and columns"),
        ({"feature": torch.zeros(4, 48), "image_grid_thw": [1, 4]}, "image_grid_thw must tell"),
        ({"feature": torch.zeros(3, 48), "image_grid_thw": [1, 3, 4]}, "must be multiples of 2, not 3 and 4"),
        ({"feature": torch.zeros(4, 48), "image_grid_thw": [1, 4, 6]}, r"the image must be \[6, 48\], not \[4, 48\]"),
        ({"feature": torch.zeros(4, 96), "image_grid_thw": [1, 4, 4]}, r"the image must be \[4, 48\], not \[4, 96\]"),
    ],
)
def test_embeddings_that_do_not_fit(source: dict[str, Any], match: str, model_dir: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        process(processor_of("Qwen2VL", model_dir), IMAGE, [{"format": "precomputed_embedding", **source}])


def test_embeddings_that_fit(model_dir: str) -> None:
    processor = processor_of("Qwen3VL", model_dir)
    source = {"feature": torch.zeros(4, 48 * 4), "image_grid_thw": [1, 4, 4], "format": "precomputed_embedding"}
    output = process(processor, f"a{IMAGE}b", [source])
    assert output.mm_items[0].offsets == [(2, 5)]
    assert output.mrope_positions is not None
    assert output.mrope_positions[:, 3].tolist() == [2, 2, 3]


def test_a_resampling_that_torch_has_not(model_dir: str) -> None:
    with pytest.raises(ValueError, match=r"resample 1 of videos is not supported; have \[0, 2, 3\]"):
        processor_of("Qwen2VL", model_dir, {"resample": 1})


def test_settings_are_followed() -> None:
    vision = SimpleNamespace(patch_size=14, temporal_patch_size=2, spatial_merge_size=2)
    defaults = Qwen2VLProcessor.video_defaults
    pixels = np.full((1, 28, 28, 3), 100, np.uint8)
    config = SimpleNamespace(vision_config=vision)

    def value(**settings: Any) -> float:
        return float(VideoSettings(defaults, settings, config).prepared(pixels, (28, 28))[0, 0, 0, 0])

    assert math.isclose(value(), (100 / 255 - 0.48145466) / 0.26862954, rel_tol=1e-5)
    assert math.isclose(value(do_normalize=False), 100 / 255, rel_tol=1e-6)
    assert value(do_normalize=False, do_rescale=False) == 100
    assert math.isclose(value(rescale_factor=0.01, image_mean=[0.5] * 3, image_std=[0.25] * 3), 2.0, rel_tol=1e-5)


def test_the_processors_of_the_family_are_found(model_dir: str) -> None:
    for family, model_cls in FAMILIES.items():
        assert model_cls in type(processor_of(family, model_dir)).models
    assert Path(model_dir, "preprocessor_config.json").is_file()
