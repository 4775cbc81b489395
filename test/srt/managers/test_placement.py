"""Media are put into prompts before the core gets them, as the model's class says, and what goes wrong is a 400."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rtp_llm import ModelRegistry
from rtp_llm.models_py.qwen2_vl import Qwen2VLForConditionalGeneration
from rtp_llm.srt.checkpoint import read_placer
from rtp_llm.srt.managers.tokenizer_manager import Prompt, TokenizerManager
from rtp_llm.srt.models import weightless
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.weightless import SMALL, build_without_weights
from rtp_llm.srt.multimodal.items import (
    MediaError,
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
    MultimodalProcessorOutput,
    pad_mm_tokens,
)
from rtp_llm.srt.multimodal.placement import MediaPlacementError, MediaPlacer
from rtp_llm.srt.sampling_params import ContextLengthExceeded

PAD = 9
CONFIG: Any = SimpleNamespace(hf_config=SimpleNamespace(rows=3))


def image(first: int = 1, last: int = 1, **more: Any) -> MultimodalDataItem:
    return MultimodalDataItem(Modality.IMAGE, torch.ones(4, 4), [(first, last)], **more)


def inputs(*items: MultimodalDataItem, **more: Any) -> MultimodalInputs:
    return MultimodalInputs(list(items), im_token_id=PAD, **more)


class Expanding(nn.Module):
    """Makes ``rows`` of one placeholder: its constructor knows how many. It has weights for more memory than is."""

    def __init__(self, config: Any, quant_config: Any = None) -> None:
        super().__init__()
        self.rows = config.rows
        self.rates = [float(rate) for rate in torch.linspace(0, 1, 5)]  # which no tensor without memory could give
        self.weight = nn.Parameter(torch.empty(1 << 22, 1 << 22))
        self.register_buffer("mask", torch.ones(8, 8))
        assert self.mask.sum().item() == 64

    def pad_input_ids(self, input_ids: list[int], mm_inputs: MultimodalInputs) -> list[int]:
        place = input_ids.index(PAD)
        mm_inputs.mm_items[0].offsets = [(place, place + self.rows - 1)]
        return pad_mm_tokens([*input_ids[:place], *[PAD] * self.rows, *input_ids[place + 1 :]], mm_inputs)


class ReadsItsWeights(Expanding):
    def __init__(self, config: Any, quant_config: Any = None) -> None:
        super().__init__(config, quant_config)
        self.weight[0, 0].item()


def read(model_cls: type, monkeypatch: pytest.MonkeyPatch) -> MediaPlacer:
    """What a checkpoint of this class gets."""
    monkeypatch.setitem(ModelRegistry.models, "Seeing", model_cls)
    config: Any = SimpleNamespace(is_multimodal=True, architectures=["Seeing"], hf_config=CONFIG.hf_config)
    return read_placer(config)


def test_most_models_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> Any:
        raise AssertionError("nobody needs an instance")

    monkeypatch.setattr(weightless, "build_without_weights", build)
    with pytest.raises(MediaPlacementError, match="nobody needs"):
        read(Expanding, monkeypatch).place([5, PAD], inputs(image()))
    for placer in (read(Qwen2VLForConditionalGeneration, monkeypatch), MediaPlacer()):
        ids, media = placer.place([5, PAD, PAD, 6], inputs(image(1, 2)))
        assert ids == [5, PAD, PAD, 6] and media.blocks == [(1, 2)]
        assert media.cache_keys == [5, *image().pad_ids(2), 6]
        assert MultimodalInputs.decode(media.content).mm_items[0].feature.shape == (4, 4)


def test_a_model_that_says_so_itself_is_built_once_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[nn.Module] = []

    def build(model_cls: type, config: Any) -> nn.Module:
        built.append(build_without_weights(model_cls, config))
        return built[-1]

    monkeypatch.setattr(weightless, "build_without_weights", build)
    placer = read(Expanding, monkeypatch)
    assert not built
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: placer.place([5, PAD, 6], inputs(image())), range(8)))
    assert len(built) == 1 and next(built[0].parameters()).is_meta
    for ids, media in found:
        assert ids == [5, PAD, PAD, PAD, 6] and media.blocks == [(1, 3)]
        assert media.cache_keys == [5, *image().pad_ids(3), 6]
        assert MultimodalInputs.decode(media.content).mm_items[0].offsets == [(1, 3)]


def test_a_model_that_cannot_be_built_so_is_named() -> None:
    with pytest.raises(ModelBuildError, match="ReadsItsWeights cannot be built without weights, which"):
        build_without_weights(ReadsItsWeights, CONFIG)
    placer = MediaPlacer(lambda: build_without_weights(ReadsItsWeights, CONFIG))
    with pytest.raises(MediaPlacementError, match=r"the media cannot be placed .*: ModelBuildError: ReadsItsWeights"):
        placer.place([5, PAD, 6], inputs(image()))


def test_what_is_built_without_weights_keeps_what_is_small() -> None:
    class Sizes(nn.Module):
        def __init__(self, config: Any, quant_config: Any = None) -> None:
            super().__init__()
            self.small, self.large = torch.zeros(SMALL), torch.zeros(SMALL + 1)
            self.total = self.small.sum().item()

    model: Any = build_without_weights(Sizes, CONFIG)
    assert not model.small.is_meta and model.large.is_meta
    assert torch.zeros(SMALL + 1).device.type == "cpu"  # again


@pytest.mark.parametrize(
    ("ids", "media", "message"),
    [
        ([5, PAD], inputs(image(1, 40)), r"MediaError: an item's offsets \[\(1, 40\)\] do not lie in the prompt of 2"),
        ([5, 6], inputs(image()), "ValueError: 9 is not in list"),
        ([5, PAD], inputs(image(), mrope_positions=torch.zeros(3, 2)), "MediaError: pad_input_ids moved media whose"),
    ],
)
def test_what_is_wrong_is_told(ids: list[int], media: MultimodalInputs, message: str) -> None:
    placer = MediaPlacer() if media.mm_items[0].offsets == [(1, 40)] else MediaPlacer(built)
    with pytest.raises(MediaPlacementError, match=f"^the media cannot be placed in the prompt: {message}"):
        placer.place(ids, media)


def test_what_no_model_can_get_is_not_the_prompts_problem() -> None:
    with pytest.raises(MediaError, match="media data may hold tensors"):
        MediaPlacer().place([5, PAD], inputs(image(strange=object())))


def built() -> nn.Module:
    return build_without_weights(Expanding, CONFIG)


def manager(output: MultimodalProcessorOutput) -> TokenizerManager:
    async def process_mm_data_async(**_: Any) -> MultimodalProcessorOutput:
        return output

    processor: Any = SimpleNamespace(loader=SimpleNamespace(trusted=True), process_mm_data_async=process_mm_data_async)
    return TokenizerManager(None, 100, 10, 10, processor=processor, placer=MediaPlacer(built))


def asked(ids: list[int], first: int, **params: Any) -> tuple[TokenizerManager, Prompt]:
    output = MultimodalProcessorOutput([image(first, first)], im_token_id=PAD, input_ids=ids)
    made = manager(output)
    prompt = Prompt(input_ids=[1], image_data=["x"], sampling_params=params)
    return made, asyncio.run(made.with_media(prompt))


def test_a_request_has_the_room_that_media_leave() -> None:
    made, prompt = asked([5, PAD, 6], 1)
    assert prompt.input_ids == [5, PAD, PAD, PAD, 6] and not prompt.has_media
    [request] = made.requests(prompt)
    assert request.spec.max_new_tokens == 10 - 5 and request.spec.media is prompt.media
    made, prompt = asked([5, PAD, 6], 1, max_new_tokens=6)
    with pytest.raises(ContextLengthExceeded, match="prompt of 5 tokens leaves room for 5"):
        made.requests(prompt)


def test_the_caller_is_told_before_anything_is_submitted() -> None:
    with pytest.raises(MediaPlacementError, match=r"^the media cannot be placed in the prompt: ValueError: 9 is not"):
        asked([5, 6], 1)
