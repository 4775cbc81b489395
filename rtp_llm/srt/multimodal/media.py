"""Fetch, check and decode images and videos from the sources that callers name.

Neither callers nor sources are trusted: sizes are limited before memory is spent, memory is taken from a budget
(``memory.py``), and URLs cannot reach hosts that only this machine can reach (CWE-918, server-side request forgery;
``hosts.py``).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
from PIL import Image

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.multimodal import images, videos
from rtp_llm.srt.multimodal.decoder_process import decode_apart
from rtp_llm.srt.multimodal.images import MAX_PIXELS, ImageHeader, decode_image, header_of, plain_image
from rtp_llm.srt.multimodal.media_files import MediaFiles
from rtp_llm.srt.multimodal.memory import DECODERS, MIB, Account, FileLimits, MediaMemory, Need
from rtp_llm.srt.multimodal.url_fetcher import UrlFetcher
from rtp_llm.srt.multimodal.videos import (
    MAX_VIDEO_PIXELS,
    MAX_VIDEO_SECONDS,
    Sample,
    VideoFrames,
    VideoHeader,
    VideoInfo,
    VideoLimits,
    decode_video,
    given_frames,
    uniform_indices,
)
from rtp_llm.srt.multimodal.work import Workers
from rtp_llm.srt.sampling_params import InvalidRequest

__all__ = ["MediaLoader", "OpenedMedia", "VideoFrames", "VideoInfo", "decode_image", "uniform_indices"]

T = TypeVar("T")

DETAILS = ("auto", "low", "high")  # of OpenAI's API
DEFAULT_BUDGET_MB = 2048


@dataclass(slots=True, eq=False)
class OpenedMedia:
    """An image or a video, fetched and measured, and not decoded yet.

    Args:
        header: its properties.
        decode: decodes it to an Image or VideoFrames, in a thread.
        num_file_bytes: bytes that ``files`` holds for it.
    """

    header: ImageHeader | VideoHeader
    decode: Callable[[], Any] | None
    param: str
    files: Account
    num_file_bytes: int = 0

    @property
    def what(self) -> str:
        return "image" if isinstance(self.header, ImageHeader) else "video"

    @property
    def num_pixels(self) -> int:
        return self.header.num_pixels

    @property
    def need(self) -> Need:
        """Memory for its pixels."""
        return self.header.need


class MediaLoader:
    """Loads media from sources: http(s) URLs, ``data:`` URIs, base64 text, ``file://`` URIs and paths, bytes, what is
    decoded already, or ``{"url": source}``.

    Args:
        allowed_local_media_path: directory below which files may be named; None: none may.
        allowed_media_domains: the only hosts that URLs may name, those of private networks included; None: all hosts
            but those whose addresses are not public.
        max_file_size_mb: MiB of the largest image or video, before it is decoded.
        timeout_s: until a URL must have been fetched, redirects included.
        max_pixels: of the largest image, or of one frame of a video.
        max_video_pixels: of all frames of a video that are chosen, together.
        trusted: callers are this process's own code, which may name any file.
        memory_budget_mb: MiB for all media together.

    Every error of a source is an InvalidRequest that names ``param``.
    """

    def __init__(
        self,
        allowed_local_media_path: str | None = None,
        allowed_media_domains: Sequence[str] | None = None,
        max_file_size_mb: float = 64.0,
        timeout_s: float = 30.0,
        max_pixels: int = MAX_PIXELS,
        max_video_pixels: int = MAX_VIDEO_PIXELS,
        max_video_duration_s: float = MAX_VIDEO_SECONDS,
        trusted: bool = False,
        memory_budget_mb: float = DEFAULT_BUDGET_MB,
    ) -> None:
        self.trusted = trusted
        self.memory = MediaMemory(memory_budget_mb)
        self._max_pixels = max_pixels
        self._video_limits = VideoLimits(max_pixels, max_video_pixels, max_video_duration_s)
        self._workers = Workers(DECODERS, "rtp-llm-media")
        limits = FileLimits(int(max_file_size_mb * MIB), self.memory)
        fetcher = UrlFetcher(allowed_media_domains, timeout_s, limits)
        self._files = MediaFiles(allowed_local_media_path, trusted, limits, fetcher, self._workers)

    @classmethod
    def from_server_args(cls, args: ServerArgs, trusted: bool = False) -> Self:
        return cls(
            args.allowed_local_media_path,
            args.allowed_media_domains,
            args.media_url_max_file_size_mb,
            args.media_io_timeout,
            trusted=trusted,
            memory_budget_mb=args.media_memory_budget_mb,
        )

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in a decoder thread and return its result. If cancelled, the function stops at its next
        ``work.check_stopped()``."""
        return await self._workers.run(function, *arguments)

    async def load_image(self, source: Any, keep_alpha: bool = False, param: str = "image_data") -> Image.Image:
        """Return an RGB image, turned as its EXIF orientation says; of an animation the first frame.

        ``{"url": source, "detail": "low"}`` reduces a large image, its longer side to LOW_DETAIL_SIZE; otherwise it
        keeps its resolution. Transparent pixels are blended with white, as transformers' image processors
        do; with ``keep_alpha`` an image with any is RGBA instead. 16-bit samples keep their upper eight bits.

        Wait until there is memory to decode it.

        Raises:
            InvalidRequest: it cannot be fetched, is too large, or is no image.
        """
        with self.files_of([source]) as files:
            return await self._load(await self.open_image(source, files, keep_alpha, param))

    async def load_video(
        self,
        source: Any,
        fps: float | None = None,
        max_frames: int | None = None,
        min_frames: int = 1,
        sample: Sample | None = None,
        param: str = "video_data",
    ) -> VideoFrames:
        """Return frames of a video: those that ``sample`` names, else ``uniform_indices``. VideoFrames, an array
        [n, height, width, 3] uint8 and a list of images are taken as they are.

        A source that is a dict may have ``fps``, ``max_frames`` and ``min_frames`` of its own, beside ``url``; they
        come before ``sample``. Wait until there is memory to decode it.

        Raises:
            InvalidRequest: it cannot be fetched, is too long or large, or is no video.
        """
        if sample is None:
            sample = functools.partial(uniform_indices, fps=fps, max_frames=max_frames, min_frames=min_frames)
        with self.files_of([source]) as files:
            return await self._load(await self.open_video(source, files, sample, param))

    async def _load(self, opened: OpenedMedia) -> Any:
        self.memory.check_fits(opened.need.alone, f"the {opened.what}", opened.param)
        with self.memory.pixels.account(opened.need.alone) as pixels:
            await pixels.take(opened.need.alone)
            return await self.decode(opened)

    def files_of(self, sources: Sequence[Any]) -> Account:
        """Return an account for the files of these sources, which must be closed."""
        return self.memory.files.account(sum(map(self._files.claim, sources)))

    async def open_image(
        self, source: Any, files: Account, keep_alpha: bool = False, param: str = "image_data"
    ) -> OpenedMedia:
        """Fetch an image and read its header."""
        is_low = _is_low_detail(source, param)
        source = _unwrapped(source, param)
        if isinstance(source, Image.Image):
            return OpenedMedia(header_of(source, is_low), lambda: plain_image(source, keep_alpha, is_low), param, files)
        data = await self._files.read(source, files, param)
        header = await self.run(_decoded, lambda: images.read_header(data, self._max_pixels, is_low), param, "image")
        if header.is_decoded_apart:
            decode = functools.partial(decode_apart, data, header, self._max_pixels, keep_alpha, is_low)
        else:
            decode = functools.partial(decode_image, data, self._max_pixels, keep_alpha, is_low)
        return OpenedMedia(header, decode, param, files, len(data))

    async def open_video(self, source: Any, files: Account, sample: Sample, param: str = "video_data") -> OpenedMedia:
        """Fetch a video, measure it, and choose its frames."""
        options = _video_options(source, param)
        source = _unwrapped(source, param, known=_VIDEO_OPTIONS)
        if options:
            sample = functools.partial(uniform_indices, **options)
        limits = self._video_limits
        if isinstance(source, (VideoFrames, np.ndarray, list, tuple)):
            given = await self.run(_decoded, lambda: given_frames(source), param, "video")
            num_frames, height, width = given.frames.shape[:3]
            info = VideoInfo(num_frames, given.fps, given.duration, height, width)
            return OpenedMedia(VideoHeader(info, given.indices), lambda: given, param, files)
        data = await self._files.read(source, files, param)
        header = await self.run(_decoded, lambda: videos.read_header(data, sample, limits), param, "video")
        decode = functools.partial(decode_video, data, header, sample, limits)
        return OpenedMedia(header, decode, param, files, len(data))

    async def decode(self, opened: OpenedMedia) -> Any:
        """Return the Image or VideoFrames, and release its file. Memory for it must be reserved."""
        decode, opened.decode = opened.decode, None
        assert decode is not None  # decoded once only
        try:
            return await self.run(_decoded, decode, opened.param, opened.what)
        finally:
            del decode  # and with it the file
            opened.files.give(opened.num_file_bytes, lower_claim=opened.num_file_bytes)


def _unwrapped(source: Any, param: str, known: frozenset[str] = frozenset()) -> Any:
    """Return the source of ``{"url": source}``."""
    if not isinstance(source, Mapping):
        return source
    unknown = sorted(set(map(str, source)) - known - {"url", "detail"})
    if unknown or "url" not in source:
        what = f"has the unknown key {unknown[0]!r}" if unknown else "has no url"
        raise InvalidRequest(f"an object that names media {what}", param)
    return source["url"]


def _is_low_detail(source: Any, param: str) -> bool:
    detail = source.get("detail") if isinstance(source, Mapping) else None
    if detail not in (None, *DETAILS):
        raise InvalidRequest(f"detail must be one of {', '.join(DETAILS)}, not {str(detail)[:40]!r}", param)
    return detail == "low"


_VIDEO_OPTIONS = frozenset({"fps", "max_frames", "min_frames"})


def _video_options(source: Any, param: str) -> dict[str, Any]:
    options = {key: source[key] for key in _VIDEO_OPTIONS & set(source)} if isinstance(source, Mapping) else {}
    for key, value in options.items():
        kinds = (int, float) if key == "fps" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e6:
            raise InvalidRequest(f"{key} of a video must be a positive number, not {value!r:.40}", param)
    return options


def _decoded(decode: Callable[[], T], param: str, what: str) -> T:
    try:
        return decode()
    except InvalidRequest as error:
        raise InvalidRequest(str(error), param) from None
    except Exception as error:  # decoders raise any kind: OSError, SyntaxError, struct.error, ...
        raise InvalidRequest(
            f"the {what} cannot be decoded: it is broken, cut short, or of a format that is not supported", param
        ) from error
