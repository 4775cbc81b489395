"""The base of all multimodal processors: from a prompt with placeholders and its media to ids and items.

A model's processor stands in the model's file. It names the model in ``models`` and, as a rule, defines two things:
the text in place of an item's placeholder (``replacement``), and, if transformers' image processor is not enough, the
encoder's input (``image_item``, ``video_item``)::

    class XProcessor(BaseMultimodalProcessor):
        models = [XForConditionalGeneration]

        def __init__(self, hf_config, server_args, _processor, *args, **kwargs):
            super().__init__(hf_config, server_args, _processor, *args, **kwargs)
            self.mm_tokens = MultimodalSpecialTokens(image_token_id=hf_config.image_token_id).build(_processor)

        def replacement(self, item):
            return self.mm_tokens.image_token * self.hf_config.rows_per_image

        async def process_mm_data_async(self, image_data, audio_data, input_text, request_obj, **kwargs):
            return await self.process(image_data, audio_data, input_text, request_obj)

Without ``replacement``, transformers' processor of the model does the work, if it can be loaded.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.multimodal.estimates import Prepared, unknown
from rtp_llm.srt.multimodal.hf_processor import tokenizer_of
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem, MultimodalProcessorOutput
from rtp_llm.srt.multimodal.media import MediaLoader, VideoFrames, VideoInfo, uniform_indices
from rtp_llm.srt.multimodal.memory import current_scope
from rtp_llm.srt.multimodal.placeholders import (
    MultimodalSpecialTokens,
    check_counts,
    check_rows,
    place,
    runs_of,
    set_offsets,
    split_text,
)
from rtp_llm.srt.multimodal.processor_output import (
    bundled_items,
    is_preformatted,
    one_item,
    preformatted_items,
    split_item,
)
from rtp_llm.srt.multimodal.prompt_media import PromptMedia
from rtp_llm.srt.multimodal.work import check_stopped
from rtp_llm.srt.sampling_params import InvalidRequest

__all__ = ["BaseMultiModalProcessorOutput", "BaseMultimodalProcessor", "MultimodalSpecialTokens"]


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
        return any(is_preformatted(item) for modality in Modality.all() for item in self.of(modality))


class BaseMultimodalProcessor(ABC):
    """Turns a prompt and its media into ``MultimodalProcessorOutput``. One serves all requests, in the client process.

    Args:
        hf_config: the model's configuration.
        server_args: options of the server, for its media options.
        _processor: an ``HfProcessor``, or a processor or tokenizer of transformers.
        loader: fetches and decodes media; None: as ``server_args`` say.
    """

    models: ClassVar[Sequence[type | str]] = ()  # the model classes, or names of architectures

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
        """The checkpoint's image processor, of transformers.

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
        """Arguments of transformers' image processor beside the image, for models that need more than the checkpoint's
        settings."""
        return {}

    # Defined by a model's processor

    @abstractmethod
    async def process_mm_data_async(
        self, image_data: Any, audio_data: Any, input_text: str | list[int], request_obj: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput | dict[str, Any]:
        """Return a prompt's ids and media. Called with keywords.

        Args:
            image_data: sources of images, as ``MediaLoader.load_image`` takes them, in order of their placeholders.
            audio_data: sources of sounds.
            input_text: the prompt, or its ids.
            request_obj: the request; ``video_data`` are sources of videos.

        Raises:
            InvalidRequest: the prompt or a source is wrong.
        """

    def replacement(self, item: MultimodalDataItem) -> str:
        """Return the text in place of an item's placeholder: the token of ``X_token_id`` once for each row of its
        embedding, and the model's tokens around and between."""
        raise NotImplementedError

    def image_item(self, image: Image.Image) -> MultimodalDataItem:
        """Return the encoder's input for an RGB image: by default from transformers' image processor. Each image is
        processed by itself, so that its item, and cache key, do not depend on the others."""
        check_stopped()
        output = self.hf_image_processor(images=[image], return_tensors="pt", **self.image_options)
        return one_item(Modality.IMAGE, output)

    def image_items(self, images: Sequence[Image.Image]) -> list[MultimodalDataItem]:
        """Return the items of all images of a prompt, for models that treat a single image differently."""
        return [self.image_item(image) for image in images]

    def video_item(self, video: VideoFrames) -> MultimodalDataItem:
        """Return the encoder's input for a video."""
        raise InvalidRequest("this model takes no videos", "video_data")

    def prepared_image(self, height: int, width: int) -> Prepared:
        """Estimate tokens and memory of an image of this size before it is decoded, to refuse prompts that are too long
        and to reserve memory."""
        return unknown(height * width)

    def prepared_video(self, num_frames: int, height: int, width: int) -> Prepared:
        """Estimate tokens and memory of so many frames of a video."""
        return unknown(height * width, num_frames)

    def sample_frames(self, video: VideoInfo) -> Sequence[int]:
        """Return the indices of a video's frames to use by default: two per second, 4 to 768."""
        return uniform_indices(video, fps=2.0, max_frames=768, min_frames=4)

    # Processing a prompt

    async def process(
        self, image_data: Any, audio_data: Any, input_text: str | list[int], request_obj: Any
    ) -> MultimodalProcessorOutput:
        """Process a prompt with ``mm_tokens``: most ``process_mm_data_async`` return the result, some with positions
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
        """Fetch and decode a prompt's media, when there is memory for all of them and for their items.

        Args:
            discard_alpha_channel: images are RGB; otherwise those with transparency are RGBA.
            add_special_tokens: whether the tokenizer adds its own around the text; None: unless the text begins with
                the bos token, as a chat template's may.

        Raises:
            InvalidRequest: there are not as many placeholders as media, or a medium is wrong.
        """
        given = {
            Modality.IMAGE: list(image_data or ()),
            Modality.VIDEO: list(video_data or ()),
            Modality.AUDIO: list(audio_data or ()),
        }
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
        for modality, sources in given.items():
            self._check_sources(modality, sources)
            if not any(is_preformatted(source) for source in sources):
                check_counts(
                    modality, multimodal_tokens.num_placeholders(prompt, modality, self.tokenizer), len(sources)
                )
        loaded = await PromptMedia(self.loader, self, keep_alpha=not discard_alpha_channel).load(given)
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
        """Return the items, the prompt's ids [n] with placeholders replaced, and the output of transformers' processor
        (empty if it was not used). ``kwargs`` go to that processor."""
        return await self.loader.run(lambda: self._combine(base_output, mm_tokens, **kwargs))

    def _combine(
        self, base_output: BaseMultiModalProcessorOutput, mm_tokens: MultimodalSpecialTokens, **kwargs: Any
    ) -> tuple[list[MultimodalDataItem], torch.Tensor, Mapping[str, Any]]:
        if not base_output.has_preformatted and not self._replaces:
            return self._combine_by_hf(base_output, mm_tokens, **kwargs)
        items: dict[Modality, list[MultimodalDataItem]] = {}
        whole: dict[Modality, list[MultimodalDataItem]] = {}  # placeholders already replaced by the caller
        for modality in Modality.all():
            loaded = base_output.of(modality)
            if loaded and is_preformatted(loaded[0]):
                made = preformatted_items(modality, loaded[0], self.hf_config)
                replaced = not self._needs_replacement(base_output, modality, mm_tokens, made)
                (whole if replaced else items)[modality] = made
            elif loaded:
                items[modality] = self._items(modality, loaded)
        if items:
            ids = self._expand(base_output, mm_tokens, items)
        elif base_output.input_ids is not None:
            ids = base_output.input_ids
        else:
            ids = self._tokenize(base_output.input_text, base_output.add_special_tokens)
        for modality, made in whole.items():
            whole[modality] = place(made, runs_of(ids, mm_tokens.get_token_id_by_modality(modality)))
            check_rows(whole[modality])
        made_all = [item for found in (*items.values(), *whole.values()) for item in found]
        return made_all, torch.tensor(ids, dtype=torch.long), {}

    @property
    def _replaces(self) -> bool:
        return type(self).replacement is not BaseMultimodalProcessor.replacement

    def _needs_replacement(
        self,
        base_output: BaseMultiModalProcessorOutput,
        modality: Modality,
        mm_tokens: MultimodalSpecialTokens,
        made: list[MultimodalDataItem],
    ) -> bool:
        """Return whether the prompt has one placeholder for each item, which must be replaced."""
        prompt = base_output.input_text if base_output.input_ids is None else base_output.input_ids
        if mm_tokens.num_placeholders(prompt, modality, self.tokenizer) != len(made):
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
        if not any(is_preformatted(source) for source in sources):
            return
        name = f"{modality.value}_data"
        if not self.loader.trusted:
            raise InvalidRequest(
                "media that are processed already (format) are only taken from callers in the engine's own process",
                name,
            )
        if len(sources) > 1:
            raise InvalidRequest(f"media that are processed already must be the only item of {name}", name)

    # Placeholders

    def _expand(
        self,
        base_output: BaseMultiModalProcessorOutput,
        mm_tokens: MultimodalSpecialTokens,
        items: Mapping[Modality, list[MultimodalDataItem]],
    ) -> list[int]:
        """Return the prompt's ids with each item's placeholder replaced, and set the items' offsets.

        A text is tokenised as a whole after that, as transformers does: the end of a replacement may merge with the
        text behind it. Ids stay as they are.
        """
        replaced: list[tuple[MultimodalDataItem, str]] = []
        left = {modality: iter(found) for modality, found in items.items()}

        def replace(modality: Modality) -> str:
            item = next(left[modality])
            text = self._replacement(item, mm_tokens)
            replaced.append((item, text))
            return text

        modality_of = {mm_tokens.placeholder_id(modality, self.tokenizer): modality for modality in items}
        if base_output.input_ids is not None and None not in modality_of:
            ids: list[int] = []
            for token_id in base_output.input_ids:
                modality = modality_of.get(token_id)
                ids += [token_id] if modality is None else self._tokenize(replace(modality), False)
        else:
            parts = split_text(base_output.input_text, mm_tokens)
            kinds = [mm_tokens.get_modality_of_token(part) for part in parts]
            text = "".join(
                part if kind is None or kind not in items else replace(kind)
                for part, kind in zip(parts, kinds, strict=True)
            )
            ids = self._tokenize(text, base_output.add_special_tokens and base_output.input_ids is None)
        set_offsets(ids, replaced, mm_tokens, self.tokenizer)
        return ids

    def _replacement(self, item: MultimodalDataItem, mm_tokens: MultimodalSpecialTokens) -> str:
        if item.precomputed_embeddings is None or (self._replaces and item.model_specific_data):
            return self.replacement(item)
        return mm_tokens.fill(item.modality, self.tokenizer) * item.precomputed_embeddings.shape[0]

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        with self._tokenizer_lock:  # transformers sets the tokenizer's state before each call
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    # With transformers' processor

    def process_mm_data(
        self,
        input_text: str,
        images: Sequence[Image.Image] | None = None,
        videos: Sequence[VideoFrames] | None = None,
        audios: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> Mapping[str, Any]:
        """Call transformers' processor on a text with one placeholder for each medium."""
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
        """Return one item for each kind of media in the output of transformers' processor."""
        return bundled_items(output)


def _metadata(video: VideoFrames) -> dict[str, Any]:
    height, width = video.frames.shape[1:3]
    return {
        "total_num_frames": max(video.indices) + 1, "fps": video.fps, "duration": video.duration, "height": height,
        "width": width, "frames_indices": video.indices, "video_backend": "pyav",
    }  # fmt: skip
