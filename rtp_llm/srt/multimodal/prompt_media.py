"""Load all media of a prompt: open them, then decode them when there is memory for all of them and their items."""

import asyncio
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rtp_llm.srt.multimodal.estimates import Prepared, whole_need
from rtp_llm.srt.multimodal.images import ImageHeader
from rtp_llm.srt.multimodal.items import Modality
from rtp_llm.srt.multimodal.media import MediaLoader, OpenedMedia, VideoInfo
from rtp_llm.srt.multimodal.memory import Account, MediaScope, current_scope, total_need
from rtp_llm.srt.multimodal.processor_output import is_preformatted
from rtp_llm.srt.sampling_params import InvalidRequest

MAX_PROMPT_PIXELS = 1 << 28  # of all images and frames of a prompt: 1.1 GB in Pillow
LOADS_AT_ONCE = 8  # media of one prompt that are fetched in parallel


class PreparesMedia(Protocol):
    """A model's processor, which estimates media before they are decoded."""

    def prepared_image(self, height: int, width: int) -> Prepared: ...

    def prepared_video(self, num_frames: int, height: int, width: int) -> Prepared: ...

    def sample_frames(self, video: VideoInfo) -> Sequence[int]: ...


class PromptMedia:
    """Loads the media of one prompt.

    Args:
        keep_alpha: images with transparency stay RGBA.
    """

    def __init__(self, loader: MediaLoader, processor: PreparesMedia, keep_alpha: bool) -> None:
        self._loader = loader
        self._processor = processor
        self._keep_alpha = keep_alpha

    async def load(self, given: Mapping[Modality, list[Any]]) -> dict[Modality, list[Any]]:
        """Open all media to get their sizes, check them, wait for memory, and decode them.

        The memory is released when the current scope is left.
        """
        places = [(modality, i) for modality in given for i in range(len(given[modality]))]
        with current_scope() as scope:
            for modality, sources in given.items():
                scope.check_tokens(len(sources), f"{modality.value}_data")  # each has at least one
            sources = [given[modality][i] for modality, i in places]
            files = scope.keep(self._loader.files_of(sources))
            enough = asyncio.Semaphore(LOADS_AT_ONCE)

            async def opened_at(modality: Modality, i: int) -> Any:
                async with enough:
                    with _numbered(modality, i + 1, len(given[modality])):
                        return await self._open(modality, given[modality][i], files)

            async def decoded_at(modality: Modality, i: int, opened: Any) -> Any:
                with _numbered(modality, i + 1, len(given[modality])):
                    return await self._loader.decode(opened) if isinstance(opened, OpenedMedia) else opened

            opened = await _gather([opened_at(*place) for place in places])
            await self._reserve_memory(scope, [item for item in opened if isinstance(item, OpenedMedia)])
            loaded = await _gather([decoded_at(*place, item) for place, item in zip(places, opened, strict=True)])
        return {
            kind: [item for (modality, _), item in zip(places, loaded, strict=True) if modality is kind]
            for kind in given
        }

    async def _open(self, modality: Modality, source: Any, files: Account) -> Any:
        if is_preformatted(source):
            return source
        if modality is Modality.IMAGE:
            opened = await self._loader.open_image(source, files, self._keep_alpha)
        elif modality is Modality.VIDEO:
            opened = await self._loader.open_video(source, files, self._processor.sample_frames)
        else:
            raise InvalidRequest("this model takes no audio", "audio_data")
        need = whole_need(opened.header, self._prepared(opened))
        self._loader.memory.check_fits(need.alone, f"the {opened.what}", opened.param)
        return opened

    def _prepared(self, opened: OpenedMedia) -> Prepared:
        header = opened.header
        if isinstance(header, ImageHeader):
            return self._processor.prepared_image(header.height, header.width)
        return self._processor.prepared_video(len(header.indices), header.info.height, header.info.width)

    async def _reserve_memory(self, scope: MediaScope, opened: Sequence[OpenedMedia]) -> None:
        """Wait until there is memory for all media of a prompt.

        Raises:
            InvalidRequest: they need more memory than there is, or have too many pixels for a prompt.
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
        self._loader.memory.check_fits(need, "the prompt's images and videos together", param)
        await scope.keep(self._loader.memory.pixels.account(need)).take(need)


@contextmanager
def _numbered(modality: Modality, number: int, count: int) -> Iterator[None]:
    """Put a medium's number into an InvalidRequest raised within, if it is one of several."""
    try:
        yield
    except InvalidRequest as error:
        if count == 1:
            raise
        raise type(error)(f"{modality.value} {number} of {count}: {error}", error.param) from error.__cause__


async def _gather(loads: Sequence[Awaitable[Any]]) -> list[Any]:
    """Return all results, or raise the first error after cancelling the rest."""
    tasks = [asyncio.ensure_future(load) for load in loads]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
