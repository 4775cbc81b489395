"""From a prompt with placeholders and its media to ids and items: what the processors of all models share.

A model's processor stands beside the model. It names the model in ``models`` and, as a rule, says two things: what
stands in the prompt in place of an item's placeholder (``replacement``), and, where transformers' image processor does
not say it all, what the encoder takes (``image_item``, ``video_item``)::

    class XProcessor(BaseMultimodalProcessor):
        models = [XForConditionalGeneration]

        def __init__(self, hf_config, server_args, _processor, *args, **kwargs):
            super().__init__(hf_config, server_args, _processor, *args, **kwargs)
            self.mm_tokens = MultimodalSpecialTokens(image_token_id=hf_config.image_token_id).build(_processor)

        def replacement(self, item):
            return self.mm_tokens.image_token * self.hf_config.rows_per_image

        async def process_mm_data_async(self, image_data, audio_data, input_text, request_obj, **kwargs):
            return await self.process(image_data, audio_data, input_text, request_obj)

Without ``replacement`` the work is left to transformers' processor of the model, where it can be had.
"""

import asyncio
import json
import logging
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, AutoVideoProcessor

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.multimodal.estimates import Prepared, unknown, whole_need
from rtp_llm.srt.multimodal.images import ImageHeader
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalProcessorOutput
from rtp_llm.srt.multimodal.media import MediaLoader, OpenedMedia, VideoFrames, VideoInfo, uniform_indices
from rtp_llm.srt.multimodal.memory import Account, MediaScope, current_scope, total_need
from rtp_llm.srt.multimodal.work import check_stopped
from rtp_llm.srt.sampling_params import InvalidRequest

logger = logging.getLogger(__name__)

MAX_PROMPT_PIXELS = 1 << 28  # of a prompt's images and frames together: 1.1 GB as Pillow keeps them
LOADS_AT_ONCE = 8  # media of one prompt that are fetched side by side

PROCESSOR_OUTPUT = "processor_output"
PRECOMPUTED_EMBEDDING = "precomputed_embedding"

# Names that transformers' processors give to what they return, and what it belongs to.
MODALITY_OF_OUTPUT = {
    **dict.fromkeys(
        (
            "pixel_values", "image_grid_thw", "image_sizes", "image_grid_hws", "image_attention_mask", "tgt_size",
            "tgt_sizes", "aspect_ratio_ids", "aspect_ratio_mask", "num_patches", "patch_pixel_values", "num_crops",
            "batch_num_images", "pixel_attention_mask",
        ),
        Modality.IMAGE,
    ),
    **dict.fromkeys(
        ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "video_sizes", "video_grid_hws"),
        Modality.VIDEO,
    ),
    **dict.fromkeys(
        ("audio_features", "input_features", "audio_feature_lens", "audio_attention_mask", "feature_attention_mask"),
        Modality.AUDIO,
    ),
}  # fmt: skip
FEATURES = frozenset({"pixel_values", "pixel_values_videos", "audio_features", "input_features"})
GRIDS = ("image_grid_thw", "video_grid_thw")


class HfProcessor:
    """Parts of a checkpoint's processor, as transformers loads them; each is None where there is none.

    Called, it is the checkpoint's own processor. That of many models needs torchvision, for videos at least, so that it
    is made only when it is asked for. Image processors are those on PIL and numpy, wherever the model has one.

    ``video_settings`` are those of the video processor, read from the checkpoint's files, for processors that do the
    work themselves.
    """

    def __init__(self, model_path: str, tokenizer: Any, trust_remote_code: bool = False) -> None:
        self.tokenizer = tokenizer
        self._model_path = model_path
        self._options = {"trust_remote_code": trust_remote_code}

    @cached_property
    def image_processor(self) -> Any:
        if not self.image_settings:
            return None
        return AutoImageProcessor.from_pretrained(self._model_path, backend="pil", **self._options)

    @cached_property
    def video_processor(self) -> Any:
        try:
            return AutoVideoProcessor.from_pretrained(self._model_path, **self._options)
        except (ImportError, OSError, ValueError):  # no torchvision, or the checkpoint has none
            return None

    @cached_property
    def image_settings(self) -> dict[str, Any]:
        return self._settings("image_processor", "preprocessor_config.json")

    @cached_property
    def video_settings(self) -> dict[str, Any]:
        return self._settings("video_processor", "video_preprocessor_config.json", "preprocessor_config.json")

    def _settings(self, part: str, *files: str) -> dict[str, Any]:
        """Of the first of these files that exists, or the part of processor_config.json."""
        whole = _read_json(Path(self._model_path) / "processor_config.json")
        if part in whole:
            return whole[part]
        return next(filter(None, (_read_json(Path(self._model_path) / name) for name in files)), {})

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Those of the processor as a whole, such as patch sizes and placeholder tokens."""
        return _read_json(Path(self._model_path) / "processor_config.json")

    @cached_property
    def whole(self) -> Any:
        """transformers' processor of the model.

        Raises:
            ValueError: it cannot be made here.
        """
        try:
            return AutoProcessor.from_pretrained(self._model_path, **self._options)
        except (ImportError, OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"transformers cannot make the processor of {self._model_path} here: {str(error).strip()}; a "
                "BaseMultimodalProcessor that has a replacement() needs none"
            ) from error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.whole(*args, **kwargs)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def load_hf_processor(model_path: str, tokenizer: Any = None, trust_remote_code: bool = False) -> HfProcessor:
    """The parts of a checkpoint's processor.

    Args:
        model_path: its directory.
        tokenizer: None: the checkpoint's.
    """
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    return HfProcessor(model_path, tokenizer, trust_remote_code)


@dataclass
class MultimodalSpecialTokens:
    """How a model's prompts say where media stand.

    ``X_token`` is the placeholder for one item in a prompt, ``X_token_id`` the id of the positions that its embeddings
    take when it has been replaced; in most models they are the same token. ``X_token_regex`` finds placeholders in
    texts; unset: the token itself.
    """

    image_token: str | None = None
    video_token: str | None = None
    audio_token: str | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None
    image_token_regex: re.Pattern[str] | str | None = None
    video_token_regex: re.Pattern[str] | str | None = None
    audio_token_regex: re.Pattern[str] | str | None = None
    combined_regex: re.Pattern[str] | str | None = None

    def build(self, processor: Any) -> Self:
        """Fills in tokens from ids, ids from tokens, and the regular expressions."""
        tokenizer = tokenizer_of(processor)
        for modality in Modality.all():
            token, token_id = self.token_of(modality), self.get_token_id_by_modality(modality)
            if token is None and token_id is not None:
                token = tokenizer.convert_ids_to_tokens(token_id)
            elif token is not None and token_id is None:
                token_id = _known_id(tokenizer, token)
            self._set(modality, "token", token)
            self._set(modality, "token_id", token_id)
            regex = self.regex_of(modality)
            self._set(modality, "token_regex", re.compile(re.escape(token)) if regex is None and token else regex)
        self.combined_regex = self.get_combined_regex()
        return self

    def get_combined_regex(self) -> re.Pattern[str]:
        """Splits a text into what stands between placeholders, and the placeholders."""
        regexes = [regex.pattern for modality in Modality.all() if (regex := self.regex_of(modality))]
        default = f"({'|'.join(f'(?:{regex})' for regex in regexes)})" if regexes else "((?!))"
        return re.compile(self.combined_regex or default)

    def get_modality_of_token(self, token: str) -> Modality | None:
        """Which kind of media this text is a placeholder for; None: it is none."""
        for modality in Modality.all():
            regex = self.regex_of(modality)
            if token == self.token_of(modality) or (regex is not None and regex.fullmatch(token)):
                return modality
        return None

    def get_token_id_by_modality(self, modality: Modality) -> int | None:
        return getattr(self, f"{modality.value}_token_id")

    def token_of(self, modality: Modality) -> str | None:
        return getattr(self, f"{modality.value}_token")

    def regex_of(self, modality: Modality) -> re.Pattern[str] | None:
        regex = getattr(self, f"{modality.value}_token_regex")
        return None if regex is None else re.compile(regex)

    def _set(self, modality: Modality, name: str, value: Any) -> None:
        setattr(self, f"{modality.value}_{name}", value)


@dataclass
class BaseMultiModalProcessorOutput:
    """A prompt with its media loaded.

    A preformatted item is the dict that the caller gave. ``input_text`` is as given, or decoded from ``input_ids``,
    which are set where the prompt was given as ids.
    """

    input_text: str
    input_ids: list[int] | None = None
    images: list[Any] = field(default_factory=list)  # Image.Image, or preformatted
    videos: list[Any] = field(default_factory=list)  # VideoFrames, or preformatted
    audios: list[Any] = field(default_factory=list)
    add_special_tokens: bool = True

    def of(self, modality: Modality) -> list[Any]:
        return {Modality.IMAGE: self.images, Modality.VIDEO: self.videos, Modality.AUDIO: self.audios}[modality]

    @property
    def has_preformatted(self) -> bool:
        return any(_is_preformatted(item) for modality in Modality.all() for item in self.of(modality))


class BaseMultimodalProcessor(ABC):
    """Turns a prompt and its media into ``MultimodalProcessorOutput``. One serves all requests, in the client process.

    Args:
        hf_config: the model's configuration.
        server_args: options of the server; its media options are followed.
        _processor: what ``load_hf_processor`` returns, or a processor or tokenizer of transformers.
        loader: fetches and decodes media; None: as ``server_args`` say.
    """

    models: ClassVar[Sequence[type | str]] = ()  # the classes, or names of architectures, that it works for

    def __init__(
        self,
        hf_config: Any,
        server_args: Any,
        _processor: Any,
        *args: Any,
        loader: MediaLoader | None = None,
        **kwargs: Any,
    ) -> None:
        self.hf_config = hf_config
        self.server_args = server_args
        self._processor = _processor
        self.mm_tokens = MultimodalSpecialTokens()
        self._tokenizer_lock = threading.Lock()
        if loader is None:
            loader = MediaLoader.from_server_args(server_args) if isinstance(server_args, ServerArgs) else MediaLoader()
        self.loader = loader

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self._processor)

    @property
    def hf_image_processor(self) -> Any:
        """transformers'.

        Raises:
            InvalidRequest: the checkpoint has none.
        """
        image_processor = getattr(self._processor, "image_processor", None)
        if image_processor is None:
            raise InvalidRequest(
                "images cannot be taken: the checkpoint has no preprocessor_config.json, which says how they are "
                "prepared",
                "image_data",
            )
        return image_processor

    @property
    def image_options(self) -> Mapping[str, Any]:
        """What transformers' image processor is called with beside the image, where a model wants more than the
        checkpoint's settings."""
        return {}

    # What a model's processor says

    @abstractmethod
    async def process_mm_data_async(
        self, image_data: Any, audio_data: Any, input_text: str | list[int], request_obj: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput | dict[str, Any]:
        """A prompt's ids and media. Called with keywords.

        Args:
            image_data: sources of images, as ``MediaLoader.load_image`` takes them, in order of their placeholders.
            audio_data: sources of sounds.
            input_text: the prompt, or its ids.
            request_obj: the request; ``video_data`` are sources of videos.

        Raises:
            InvalidRequest: the prompt or a source is wrong.
        """

    def replacement(self, item: MultimodalDataItem) -> str:
        """What stands in the prompt in place of an item's placeholder: the token of ``X_token_id`` as often as its
        embedding has rows, and whatever the model wants around and between."""
        raise NotImplementedError

    def image_item(self, image: Image.Image) -> MultimodalDataItem:
        """What the encoder takes of an RGB image: by default what transformers' image processor makes of it. Each
        image is processed by itself, so that it is the same, and known again, whatever stands beside it."""
        check_stopped()
        output = self.hf_image_processor(images=[image], return_tensors="pt", **self.image_options)
        return one_item(Modality.IMAGE, output)

    def image_items(self, images: Sequence[Image.Image]) -> list[MultimodalDataItem]:
        """Of all of a prompt's images, for models that take one alone otherwise than one of several."""
        return [self.image_item(image) for image in images]

    def video_item(self, video: VideoFrames) -> MultimodalDataItem:
        """What the encoder takes of a video."""
        raise InvalidRequest("this model takes no videos", "video_data")

    def prepared_image(self, height: int, width: int) -> Prepared:
        """What will be made of an image of this size, told before it is decoded: prompts that are too long are refused
        by it, and memory is kept free for it."""
        return unknown(height * width)

    def prepared_video(self, num_frames: int, height: int, width: int) -> Prepared:
        """What will be made of so many frames of a video."""
        return unknown(height * width, num_frames)

    def sample_frames(self, video: VideoInfo) -> Sequence[int]:
        """Which frames of a video are looked at, where the request does not say: two per second, 4 to 768."""
        return uniform_indices(video, fps=2.0, max_frames=768, min_frames=4)

    # The way of a prompt

    async def process(
        self, image_data: Any, audio_data: Any, input_text: str | list[int], request_obj: Any
    ) -> MultimodalProcessorOutput:
        """The whole way with ``mm_tokens``: what most ``process_mm_data_async`` return, as it is or with positions
        added."""
        with current_scope():
            base_output = await self.load_mm_data(
                prompt=input_text,
                multimodal_tokens=self.mm_tokens,
                image_data=image_data,
                video_data=getattr(request_obj, "video_data", None),
                audio_data=audio_data,
                add_special_tokens=getattr(request_obj, "add_special_tokens", None),
            )
            items, ids, _ = await self.process_and_combine_mm_data_async(base_output, self.mm_tokens)
        return MultimodalProcessorOutput(
            input_ids=ids.tolist(),
            mm_items=items,
            im_token_id=self.mm_tokens.image_token_id,
            video_token_id=self.mm_tokens.video_token_id,
            audio_token_id=self.mm_tokens.audio_token_id,
        )

    async def load_mm_data(
        self,
        prompt: str | list[int],
        multimodal_tokens: MultimodalSpecialTokens,
        image_data: Sequence[Any] | None = None,
        video_data: Sequence[Any] | None = None,
        audio_data: Sequence[Any] | None = None,
        discard_alpha_channel: bool = True,
        add_special_tokens: bool | None = None,
    ) -> BaseMultiModalProcessorOutput:
        """Fetches and decodes a prompt's media, when there is room for all of them and what will be made of them.

        Args:
            discard_alpha_channel: images are RGB; otherwise those with transparency are RGBA.
            add_special_tokens: whether the tokenizer puts its own around the text; None: unless it begins with the
                token that begins a text, as what a chat template wrote may.

        Raises:
            InvalidRequest: there are not as many placeholders as media, or one of these is wrong.
        """
        given = {
            Modality.IMAGE: list(image_data or ()),
            Modality.VIDEO: list(video_data or ()),
            Modality.AUDIO: list(audio_data or ()),
        }
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
        for modality, sources in given.items():
            self._check_sources(modality, sources)
            if not any(_is_preformatted(source) for source in sources):
                check_counts(modality, self._count_placeholders(prompt, modality, multimodal_tokens), len(sources))
        loaded = await self._load_all(given, keep_alpha=not discard_alpha_channel)
        if add_special_tokens is None:
            bos = getattr(self.tokenizer, "bos_token", None)
            add_special_tokens = not (bos and text.startswith(bos))
        return BaseMultiModalProcessorOutput(
            input_text=text,
            input_ids=None if isinstance(prompt, str) else list(prompt),
            images=loaded[Modality.IMAGE],
            videos=loaded[Modality.VIDEO],
            audios=loaded[Modality.AUDIO],
            add_special_tokens=add_special_tokens,
        )

    async def process_and_combine_mm_data_async(
        self, base_output: BaseMultiModalProcessorOutput, mm_tokens: MultimodalSpecialTokens, **kwargs: Any
    ) -> tuple[list[MultimodalDataItem], torch.Tensor, Mapping[str, Any]]:
        """The items, the prompt's ids [n] with placeholders replaced, and what transformers' processor returned
        (nothing, where it was not asked). ``kwargs`` go to that processor."""
        return await self.loader.run(lambda: self._combine(base_output, mm_tokens, **kwargs))

    def _combine(
        self, base_output: BaseMultiModalProcessorOutput, mm_tokens: MultimodalSpecialTokens, **kwargs: Any
    ) -> tuple[list[MultimodalDataItem], torch.Tensor, Mapping[str, Any]]:
        if not base_output.has_preformatted and not self._replaces:
            return self._combine_by_hf(base_output, mm_tokens, **kwargs)
        items: dict[Modality, list[MultimodalDataItem]] = {}
        whole: dict[Modality, list[MultimodalDataItem]] = {}  # whose placeholders the caller has replaced
        for modality in Modality.all():
            loaded = base_output.of(modality)
            if loaded and _is_preformatted(loaded[0]):
                made = preformatted_items(modality, loaded[0], self.hf_config)
                replaced = not self._stands_unreplaced(base_output, modality, mm_tokens, made)
                (whole if replaced else items)[modality] = made
            elif loaded:
                items[modality] = self._items(modality, loaded)
        if items:
            ids = self._expand(base_output, mm_tokens, items)
        else:
            ids = self._encode(base_output) if base_output.input_ids is None else base_output.input_ids
        for modality, made in whole.items():
            whole[modality] = place(made, runs_of(ids, mm_tokens.get_token_id_by_modality(modality)))
            _check_rows(whole[modality])
        made_all = [item for found in (*items.values(), *whole.values()) for item in found]
        return made_all, torch.tensor(ids, dtype=torch.long), {}

    @property
    def _replaces(self) -> bool:
        return type(self).replacement is not BaseMultimodalProcessor.replacement

    def _stands_unreplaced(
        self,
        base_output: BaseMultiModalProcessorOutput,
        modality: Modality,
        mm_tokens: MultimodalSpecialTokens,
        made: list[MultimodalDataItem],
    ) -> bool:
        """Whether the prompt has one placeholder for each item, which is not all that there has to be."""
        prompt = base_output.input_text if base_output.input_ids is None else base_output.input_ids
        if self._count_placeholders(prompt, modality, mm_tokens) != len(made):
            return False
        if made[0].precomputed_embeddings is not None:
            return made[0].precomputed_embeddings.shape[0] > 1
        return self._replaces

    def _items(self, modality: Modality, media: Sequence[Any]) -> list[MultimodalDataItem]:
        if modality is Modality.IMAGE:
            return self.image_items(media)
        if modality is Modality.VIDEO:
            return [self.video_item(video) for video in media]
        raise InvalidRequest("this model takes no audio", "audio_data")

    def _check_sources(self, modality: Modality, sources: list[Any]) -> None:
        if not any(_is_preformatted(source) for source in sources):
            return
        name = f"{modality.value}_data"
        if not self.loader.trusted:
            raise InvalidRequest(
                "media that are processed already (format) are only taken from callers in the engine's own process",
                name,
            )
        if len(sources) > 1:
            raise InvalidRequest(f"media that are processed already must be the only item of {name}", name)

    async def _load_all(self, given: Mapping[Modality, list[Any]], keep_alpha: bool) -> dict[Modality, list[Any]]:
        """Opens all, which tells their sizes, and decodes them once it is known that they may be, and there is room.

        What the prompt takes is given back when the scope that this runs in is left.
        """
        places = [(modality, i) for modality in given for i in range(len(given[modality]))]
        with current_scope() as scope:
            for modality, sources in given.items():
                scope.check_tokens(len(sources), f"{modality.value}_data")  # each has one at least
            sources = [given[modality][i] for modality, i in places]
            files = scope.keep(self.loader.files_of(sources))
            enough = asyncio.Semaphore(LOADS_AT_ONCE)

            async def opened_at(modality: Modality, i: int) -> Any:
                async with enough:
                    with _numbered(modality, i + 1, len(given[modality])):
                        return await self._open(modality, given[modality][i], files, keep_alpha)

            async def decoded_at(modality: Modality, i: int, opened: Any) -> Any:
                with _numbered(modality, i + 1, len(given[modality])):
                    return await self.loader.decode(opened) if isinstance(opened, OpenedMedia) else opened

            opened = await _gather([opened_at(*place) for place in places])
            await self._take_room(scope, [item for item in opened if isinstance(item, OpenedMedia)])
            loaded = await _gather([decoded_at(*place, item) for place, item in zip(places, opened, strict=True)])
        return {
            kind: [item for (modality, _), item in zip(places, loaded, strict=True) if modality is kind]
            for kind in given
        }

    async def _open(self, modality: Modality, source: Any, files: Account, keep_alpha: bool) -> Any:
        if _is_preformatted(source):
            return source
        if modality is Modality.IMAGE:
            opened = await self.loader.open_image(source, files, keep_alpha)
        elif modality is Modality.VIDEO:
            opened = await self.loader.open_video(source, files, self.sample_frames)
        else:
            raise InvalidRequest("this model takes no audio", "audio_data")
        need = whole_need(opened.header, self._prepared(opened))
        self.loader.memory.check_fits(need.alone, f"the {opened.what}", opened.param)
        return opened

    def _prepared(self, opened: OpenedMedia) -> Prepared:
        header = opened.header
        if isinstance(header, ImageHeader):
            return self.prepared_image(header.height, header.width)
        return self.prepared_video(len(header.indices), header.info.height, header.info.width)

    async def _take_room(self, scope: MediaScope, opened: Sequence[OpenedMedia]) -> None:
        """Waits until there is room for all that a prompt's media will take.

        Raises:
            InvalidRequest: there will never be, or they have more pixels than a prompt's may.
            ContextLengthExceeded: they have more tokens than a prompt may.
        """
        if not opened:
            return
        param = opened[-1].param
        if sum(item.num_pixels for item in opened) > MAX_PROMPT_PIXELS:
            raise InvalidRequest(
                f"the prompt's images and video frames have more than {MAX_PROMPT_PIXELS:,} pixels together; send "
                "fewer, or smaller ones",
                param,
            )
        prepared = [self._prepared(item) for item in opened]
        scope.check_tokens(sum(each.num_tokens for each in prepared), param)
        need = total_need([whole_need(item.header, each) for item, each in zip(opened, prepared, strict=True)])
        self.loader.memory.check_fits(need, "the prompt's images and videos together", param)
        await scope.keep(self.loader.memory.pixels.account(need)).take(need)

    # Placeholders

    def _placeholder_id(self, modality: Modality, mm_tokens: MultimodalSpecialTokens) -> int | None:
        token = mm_tokens.token_of(modality)
        return None if token is None else _known_id(self.tokenizer, token)

    def _count_placeholders(
        self, prompt: str | list[int], modality: Modality, mm_tokens: MultimodalSpecialTokens
    ) -> int:
        if isinstance(prompt, str):
            return sum(mm_tokens.get_modality_of_token(part) is modality for part in split_text(prompt, mm_tokens))
        token_id = self._placeholder_id(modality, mm_tokens)
        if token_id is None and mm_tokens.token_of(modality) is not None:  # it is no single token
            return self._count_placeholders(self.tokenizer.decode(prompt), modality, mm_tokens)
        return sum(given == token_id for given in prompt)

    def _expand(
        self,
        base_output: BaseMultiModalProcessorOutput,
        mm_tokens: MultimodalSpecialTokens,
        items: Mapping[Modality, list[MultimodalDataItem]],
    ) -> list[int]:
        """The prompt's ids with each item's placeholder replaced, and the items' offsets set.

        Of a text the whole is tokenised after that, as transformers does: what a replacement ends in may merge with
        what follows. Ids stay as they are.
        """
        in_order: list[MultimodalDataItem] = []
        texts: dict[int, str] = {}
        left = {modality: iter(found) for modality, found in items.items()}

        def replaced(modality: Modality) -> str:
            item = next(left[modality])
            in_order.append(item)
            texts[id(item)] = self._replacement(item, mm_tokens)
            return texts[id(item)]

        single = all(self._placeholder_id(modality, mm_tokens) is not None for modality in items)
        if base_output.input_ids is not None and single:
            modality_of = {self._placeholder_id(modality, mm_tokens): modality for modality in items}
            ids: list[int] = []
            for token_id in base_output.input_ids:
                modality = modality_of.get(token_id)
                ids += [token_id] if modality is None else self._tokenize(replaced(modality), False)
        else:
            parts = split_text(base_output.input_text, mm_tokens)
            kinds = [mm_tokens.get_modality_of_token(part) for part in parts]
            text = "".join(
                part if kind is None or kind not in items else replaced(kind)
                for part, kind in zip(parts, kinds, strict=True)
            )
            ids = self._tokenize(text, base_output.add_special_tokens and base_output.input_ids is None)
        self._set_offsets(ids, in_order, texts, mm_tokens)
        return ids

    def _replacement(self, item: MultimodalDataItem, mm_tokens: MultimodalSpecialTokens) -> str:
        if item.precomputed_embeddings is None or (self._replaces and item.model_specific_data):
            return self.replacement(item)
        return self._fill(item.modality, mm_tokens) * item.precomputed_embeddings.shape[0]

    def _set_offsets(
        self,
        ids: list[int],
        in_order: list[MultimodalDataItem],
        texts: Mapping[int, str],
        mm_tokens: MultimodalSpecialTokens,
    ) -> None:
        """Positions of an embedding's token go to the items in their order, to each as many as its replacement has."""
        fill_ids = {item.modality: mm_tokens.get_token_id_by_modality(item.modality) for item in in_order}
        for fill_id in set(fill_ids.values()):
            positions = [position for position, token_id in enumerate(ids) if token_id == fill_id]
            taken = 0
            for item in in_order:
                if fill_ids[item.modality] == fill_id:
                    count = texts[id(item)].count(self._fill(item.modality, mm_tokens))
                    item.offsets = runs(positions[taken : taken + count])
                    taken += count
            if taken != len(positions):
                token = self.tokenizer.convert_ids_to_tokens(fill_id)
                raise InvalidRequest(
                    f"the prompt holds the token {token} where no image or video is ({len(positions)} times, and "
                    f"{taken} are theirs); it stands for media and cannot be used otherwise",
                    "prompt",
                )

    def _fill(self, modality: Modality, mm_tokens: MultimodalSpecialTokens) -> str:
        token_id = mm_tokens.get_token_id_by_modality(modality)
        if token_id is None:
            raise InvalidRequest(f"this model takes no {modality.value}", f"{modality.value}_data")
        return self.tokenizer.convert_ids_to_tokens(token_id)

    def _encode(self, base_output: BaseMultiModalProcessorOutput) -> list[int]:
        return self._tokenize(base_output.input_text, base_output.add_special_tokens)

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        with self._tokenizer_lock:  # transformers sets the tokenizer's state before each call
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    # By transformers' processor

    def process_mm_data(
        self,
        input_text: str,
        images: Sequence[Image.Image] | None = None,
        videos: Sequence[VideoFrames] | None = None,
        audios: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> Mapping[str, Any]:
        """What transformers' processor makes of a text with one placeholder for each of the media."""
        if images:
            kwargs["images"] = list(images)
        if videos:
            kwargs["videos"] = [video.frames for video in videos]
            kwargs["video_metadata"] = [_metadata(video) for video in videos]
            kwargs["do_sample_frames"] = False
        if audios:
            kwargs["audio"] = list(audios)
        return self._processor(text=[input_text], padding=True, return_tensors="pt", **kwargs)

    def _combine_by_hf(
        self, base_output: BaseMultiModalProcessorOutput, mm_tokens: MultimodalSpecialTokens, **kwargs: Any
    ) -> tuple[list[MultimodalDataItem], torch.Tensor, Mapping[str, Any]]:
        special = base_output.add_special_tokens and base_output.input_ids is None
        output = self.process_mm_data(
            base_output.input_text,
            base_output.images,
            base_output.videos,
            base_output.audios,
            add_special_tokens=special,
            **kwargs,
        )
        ids = output["input_ids"].flatten()
        items = []
        for item in self.collect_mm_items_from_processor_output(output):
            positions = runs_of(ids.tolist(), mm_tokens.get_token_id_by_modality(item.modality))
            items += place(split_item(item, len(base_output.of(item.modality))), positions)
        return items, ids, output

    def collect_mm_items_from_processor_output(self, output: Mapping[str, Any]) -> list[MultimodalDataItem]:
        """One item for each kind of media in what transformers' processor returned, all of a kind in one."""
        items: dict[Modality, MultimodalDataItem] = {}
        for name, value in output.items():
            modality = MODALITY_OF_OUTPUT.get(name)
            if modality is not None and value is not None:
                item = items.setdefault(modality, MultimodalDataItem(modality))
                _set_output(item, name, value)
        return list(items.values())


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer, or what is one itself."""
    return getattr(processor, "tokenizer", processor)


def _known_id(tokenizer: Any, token: str) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids(token)
    return None if token_id == getattr(tokenizer, "unk_token_id", None) and token != tokenizer.unk_token else token_id


def _metadata(video: VideoFrames) -> dict[str, Any]:
    height, width = video.frames.shape[1:3]
    return {
        "total_num_frames": max(video.indices) + 1, "fps": video.fps, "duration": video.duration, "height": height,
        "width": width, "frames_indices": video.indices, "video_backend": "pyav",
    }  # fmt: skip


@contextmanager
def _numbered(modality: Modality, number: int, count: int) -> Iterator[None]:
    """What is wrong with one of several says which."""
    try:
        yield
    except InvalidRequest as error:
        if count == 1:
            raise
        raise type(error)(f"{modality.value} {number} of {count}: {error}", error.param) from error.__cause__


async def _gather(loads: Sequence[Awaitable[Any]]) -> list[Any]:
    """All results, or the first error, with nothing left running."""
    tasks = [asyncio.ensure_future(load) for load in loads]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def check_counts(modality: Modality, num_placeholders: int, num_given: int) -> None:
    """Raises InvalidRequest where there are not as many placeholders as media."""
    if num_placeholders != num_given:
        name = modality.value
        raise InvalidRequest(
            f"Prompt has {num_placeholders} {name} placeholders but {num_given} {name} inputs were provided",
            f"{name}_data",
        )


def split_text(text: str, mm_tokens: MultimodalSpecialTokens) -> list[str]:
    """What stands between placeholders, and the placeholders, in order."""
    parts, end = [], 0
    for match in mm_tokens.get_combined_regex().finditer(text):
        parts += [text[end : match.start()], match.group()]
        end = match.end()
    return [part for part in (*parts, text[end:]) if part]


# Items


def one_item(modality: Modality, output: Mapping[str, Any]) -> MultimodalDataItem:
    """What an image or video processor returned for a single one."""
    item = MultimodalDataItem(modality)
    for name, value in output.items():
        _set_output(item, name, value)
    return item


def _set_output(item: MultimodalDataItem, name: str, value: Any) -> None:
    if name in FEATURES:
        item.feature = _host(value)
    else:
        setattr(item, name, _host(value))


def _host(value: Any) -> Any:
    """Arrays of any library as tensors; lists of them as lists of tensors."""
    if isinstance(value, (list, tuple)):
        return [_host(item) for item in value]
    return torch.as_tensor(value) if hasattr(value, "__array__") else value


def runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending positions as runs (first, last), inclusive."""
    breaks = [i for i, (one, other) in enumerate(pairwise(positions), 1) if other != one + 1]
    bounds = [0, *breaks, len(positions)]
    return [(positions[start], positions[end - 1]) for start, end in pairwise(bounds) if start < end]


def runs_of(ids: Sequence[int], token_id: int | None) -> list[tuple[int, int]]:
    """Runs (first, last) of positions that hold this id."""
    return runs([position for position, given in enumerate(ids) if given == token_id])


def split_item(item: MultimodalDataItem, count: int) -> list[MultimodalDataItem]:
    """An item that bundles ``count`` images or videos as single ones: by their grids, else along the first dimension.
    One that cannot be split is returned as it is."""
    if count <= 1 or item.feature is None:
        return [item]
    sizes = _rows_of_each(item)
    if sizes is not None and isinstance(item.feature, torch.Tensor) and sum(sizes) == len(item.feature):
        features: Sequence[Any] = item.feature.split(sizes)
    elif len(item.feature) == count:
        features = [item.feature[i : i + 1] for i in range(count)]
    else:
        return [item]
    return [
        MultimodalDataItem(
            item.modality,
            feature,
            model_specific_data={name: _part(value, i, count) for name, value in item.model_specific_data.items()},
        )
        for i, feature in enumerate(features)
    ]


def _rows_of_each(item: MultimodalDataItem) -> list[int] | None:
    """Patches of each image or video, if grids tell."""
    for name in GRIDS:
        if name in item.model_specific_data:
            grid = torch.as_tensor(item.model_specific_data[name])
            return grid.reshape(-1, grid.shape[-1]).prod(-1).tolist()
    return None


def _part(value: Any, i: int, count: int) -> Any:
    """An item's own part of what belongs to all of them."""
    if isinstance(value, torch.Tensor):
        return value[i : i + 1] if value.dim() and len(value) == count else value
    return value[i : i + 1] if isinstance(value, (list, tuple)) and len(value) == count else value


def place(items: list[MultimodalDataItem], found: list[tuple[int, int]]) -> list[MultimodalDataItem]:
    """Sets the items' offsets from the runs of their token: one run each, or by their grids' sizes. Where neither
    works, all become one again, at all places."""
    if len(items) == 1:
        items[0].offsets = found
        return items
    positions = [position for first, last in found for position in range(first, last + 1)]
    rows = [sum(_rows_of_each(item) or [0]) for item in items]
    if all(rows) and all(len(positions) * count % sum(rows) == 0 for count in rows):
        start = 0
        for item, count in zip(items, rows, strict=True):
            end = start + len(positions) * count // sum(rows)
            item.offsets = runs(positions[start:end])
            start = end
    elif len(found) == len(items):
        for item, run in zip(items, found, strict=True):
            item.offsets = [run]
    else:
        raise InvalidRequest(
            f"the prompt has {len(found)} places for {len(items)} items of kind {items[0].modality.value}, which "
            "cannot be told apart",
            f"{items[0].modality.value}_data",
        )
    return items


# Preformatted media


def _is_preformatted(source: Any) -> bool:
    return isinstance(source, Mapping) and "format" in source


def preformatted_items(modality: Modality, source: Mapping[str, Any], hf_config: Any) -> list[MultimodalDataItem]:
    """Items of a dict that a caller has made: ``{"format": "processor_output", ...}`` with what transformers' processor
    returned, or ``{"format": "precomputed_embedding", "feature": [n, hidden]}`` and what the model's positions need.

    Raises:
        InvalidRequest: the format is unknown, or its feature is missing or of a wrong shape.
    """
    name = f"{modality.value}_data"
    rest = {key: _host(value) for key, value in source.items() if key not in ("format", "input_ids", "attention_mask")}
    if source["format"] == PRECOMPUTED_EMBEDDING:
        feature = torch.as_tensor(rest.pop("feature", ()), dtype=torch.float32)
        hidden_size = hf_config.get_text_config().hidden_size
        if feature.dim() != 2 or not len(feature) or feature.shape[1] % hidden_size:
            raise InvalidRequest(
                f"feature must be [rows, {hidden_size}], an embedding for each position, not {list(feature.shape)}",
                name,
            )
        rest = {key: value for key, value in rest.items() if key not in FEATURES}
        return [MultimodalDataItem(modality, precomputed_embeddings=feature, model_specific_data=rest)]
    if source["format"] != PROCESSOR_OUTPUT:
        raise InvalidRequest(
            f"format must be {PROCESSOR_OUTPUT} or {PRECOMPUTED_EMBEDDING}, not {str(source['format'])[:40]!r}", name
        )
    item = MultimodalDataItem(modality)
    for key, value in rest.items():
        if key == "feature":
            item.feature = value
        elif MODALITY_OF_OUTPUT.get(key, modality) is modality:
            _set_output(item, key, value)
    if item.feature is None:
        raise InvalidRequest(f"{PROCESSOR_OUTPUT} has no feature such as pixel_values", name)
    return split_item(item, len(_rows_of_each(item) or [0]))


def _check_rows(items: Sequence[MultimodalDataItem]) -> None:
    """Raises InvalidRequest where a prompt has no places for an item, or not as many as its embedding has rows."""
    for item in items:
        rows = None if item.precomputed_embeddings is None else len(item.precomputed_embeddings)
        if not item.num_tokens or rows not in (None, item.num_tokens):
            name = item.modality.value
            raise InvalidRequest(
                f"the prompt has {item.num_tokens} places for the given {name}"
                + ("" if rows is None else f", whose embedding has {rows} rows"),
                f"{name}_data",
            )
