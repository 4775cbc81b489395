"""Images and videos from wherever callers name them: fetched, checked, decoded.

Whoever names a source is not trusted, and neither is what lies there: sizes are limited before memory is spent, memory
is taken from a budget (``memory.py``), and a URL cannot reach what only this machine can reach (CWE-918, server-side
request forgery; ``hosts.py``).
"""

import asyncio
import base64
import binascii
import functools
import io
import os
import re
import stat
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import aiohttp
import numpy as np
from PIL import Image
from yarl import URL

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.multimodal import images, videos
from rtp_llm.srt.multimodal.decoder_process import decode_apart
from rtp_llm.srt.multimodal.hosts import (
    PublicResolver,
    check_public,
    host_of,
    plain_host,
    public_socket,
    refusal_in,
)
from rtp_llm.srt.multimodal.images import MAX_PIXELS, ImageHeader, decode_image, header_of, plain_image
from rtp_llm.srt.multimodal.memory import DECODERS, MIB, Account, MediaMemory, Need
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
from rtp_llm.version import __version__

__all__ = ["MediaLoader", "OpenedMedia", "VideoFrames", "VideoInfo", "decode_image", "uniform_indices"]

T = TypeVar("T")

MAX_REDIRECTS = 5
DETAILS = ("auto", "low", "high")  # of OpenAI's API
GROWTH = MIB  # bytes that a file takes at once while it is fetched
DEFAULT_BUDGET_MB = 2048

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}")
_SHORTEST_BASE64 = 100  # characters; what is shorter and begins as paths do is meant as one
_MAX_PATH = 4096  # characters; what is longer is no path


@dataclass(slots=True, eq=False)
class OpenedMedia:
    """An image or a video that is here, measured, and not decoded yet.

    Args:
        header: what is known of it.
        decode: makes an Image or VideoFrames of it, in a thread.
        num_file_bytes: that ``files`` holds for it.
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
        """Of its pixels alone."""
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
        memory_budget_mb: MiB that all media together take.

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
        self._local_root = None if allowed_local_media_path is None else Path(allowed_local_media_path).resolve()
        self._domains = None if allowed_media_domains is None else {plain_host(name) for name in allowed_media_domains}
        self._max_bytes = int(max_file_size_mb * MIB)
        self._timeout_s = timeout_s
        self._max_pixels = max_pixels
        self._video_limits = VideoLimits(max_pixels, max_video_pixels, max_video_duration_s)
        self._workers = Workers(DECODERS, "rtp-llm-media")

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
        """The function's result, from one of the decoders' threads; the event loop goes on. If this is cancelled, the
        function is stopped at its next ``work.check_stopped()``."""
        return await self._workers.run(function, *arguments)

    async def load_image(self, source: Any, keep_alpha: bool = False, param: str = "image_data") -> Image.Image:
        """An RGB image, turned as its EXIF orientation says; of an animation the first frame.

        ``{"url": source, "detail": "low"}`` makes a large one smaller, its longer side to LOW_DETAIL_SIZE; otherwise it
        keeps the resolution that it has. Transparent pixels are blended with white, as transformers' image processors
        do; with ``keep_alpha`` an image that has any is RGBA instead. 16-bit samples keep their upper eight bits.

        Waits until there is room to decode it.

        Raises:
            InvalidRequest: it cannot be had, is too large, or is no image.
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
        """Frames of a video: those that ``sample`` names, else ``uniform_indices``. VideoFrames, an array
        [n, height, width, 3] uint8 and a list of images are taken as they are.

        A source that is a dict may have ``fps``, ``max_frames`` and ``min_frames`` of its own, beside ``url``; they
        come before ``sample``. Waits until there is room to decode it.

        Raises:
            InvalidRequest: it cannot be had, is too long or large, or is no video.
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
        """An account for the files of these sources, which has to be closed."""
        return self.memory.files.account(sum(map(self._claim, sources)))

    def _claim(self, source: Any) -> int:
        """The most bytes that a source's file may take."""
        source = source.get("url") if isinstance(source, Mapping) else source
        if isinstance(source, (bytes, bytearray, memoryview)):
            return len(source)
        if not isinstance(source, (str, Path)):
            return 0
        text = str(source)
        is_text = text.lstrip()[:5].lower() == "data:" or len(text) > _MAX_PATH
        return min(len(text), self._max_bytes) if is_text else self._max_bytes

    async def open_image(
        self, source: Any, files: Account, keep_alpha: bool = False, param: str = "image_data"
    ) -> OpenedMedia:
        """An image, fetched, with its header read."""
        is_low = _is_low_detail(source, param)
        source = _unwrapped(source, param)
        if isinstance(source, Image.Image):
            return OpenedMedia(header_of(source, is_low), lambda: plain_image(source, keep_alpha, is_low), param, files)
        data = await self._bytes(source, files, param)
        header = await self.run(_decoded, lambda: images.read_header(data, self._max_pixels, is_low), param, "image")
        if header.is_decoded_apart:
            decode = functools.partial(decode_apart, data, header, self._max_pixels, keep_alpha, is_low)
        else:
            decode = functools.partial(decode_image, data, self._max_pixels, keep_alpha, is_low)
        return OpenedMedia(header, decode, param, files, len(data))

    async def open_video(self, source: Any, files: Account, sample: Sample, param: str = "video_data") -> OpenedMedia:
        """A video, fetched, measured, and with its frames chosen."""
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
        data = await self._bytes(source, files, param)
        header = await self.run(_decoded, lambda: videos.read_header(data, sample, limits), param, "video")
        decode = functools.partial(decode_video, data, header, sample, limits)
        return OpenedMedia(header, decode, param, files, len(data))

    async def decode(self, opened: OpenedMedia) -> Any:
        """The Image or VideoFrames. There must be room for what it needs; its file is given back."""
        decode, opened.decode = opened.decode, None
        assert decode is not None  # once
        try:
            return await self.run(_decoded, decode, opened.param, opened.what)
        finally:
            del decode  # and with it the file
            opened.files.give(opened.num_file_bytes, lower_claim=opened.num_file_bytes)

    async def _bytes(self, source: Any, files: Account, param: str) -> bytes:
        """A source's file, whose bytes ``files`` holds."""
        if isinstance(source, Path):
            source = str(source)
        if isinstance(source, (bytes, bytearray, memoryview)):
            self._check_size(len(source), param)
            await self._take(files, len(source), param)
            return bytes(source)
        if not isinstance(source, str):
            raise InvalidRequest(
                f"media must be a URL, a data: URI, base64 text, a path or bytes, not {type(source).__name__}", param
            )
        text = source.strip()
        scheme = _SCHEME.match(text)
        if scheme is not None and scheme[1].lower() in ("http", "https"):
            return await self._fetch(text, files, param)
        if text[:5].lower() == "data:":
            return await self._decoded_text(functools.partial(self._data_uri, text, param), files, len(text), param)
        if scheme is None:
            return await self._file_or_base64(text, files, param)
        if scheme[1].lower() == "file":
            return await self._file_uri(text, files, param)
        raise InvalidRequest(f"media cannot be had by {scheme[1][:20]}://; use http, https, data: or base64", param)

    async def _decoded_text(self, decode: Callable[[], bytes], files: Account, num_chars: int, param: str) -> bytes:
        most = min(num_chars, self._max_bytes)
        await self._take(files, most, param)
        data = await self.run(decode)
        files.give(most - len(data), lower_claim=most - len(data))
        return data

    async def _take(self, files: Account, num_bytes: int, param: str) -> None:
        if files.wanted + num_bytes > files.claim:
            self.memory.check_file_fits(
                files.wanted + num_bytes, "the prompt's images and videos are, as files,", param
            )
        await files.take(num_bytes)

    def _check_size(self, num_bytes: int, param: str) -> None:
        if num_bytes > self._max_bytes:
            raise self._too_large(param)

    def _checked_size(self, data: bytes, param: str) -> bytes:
        self._check_size(len(data), param)
        return data

    def _too_large(self, param: str) -> InvalidRequest:
        limit = self._max_bytes / MIB
        return InvalidRequest(f"the media are larger than {limit:.4g} MiB (--media-url-max-file-size-mb)", param)

    # Texts

    def _data_uri(self, uri: str, param: str) -> bytes:
        header, comma, payload = uri[5:].partition(",")
        if not comma:
            raise InvalidRequest("the data: URI has no comma between its type and its data", param)
        if header.lower().rstrip().endswith(";base64"):
            return self._base64(urllib.parse.unquote(payload) if "%" in payload else payload, param)
        if len(payload) > 3 * self._max_bytes:  # each byte takes one character, or three if it is escaped
            raise self._too_large(param)
        return self._checked_size(urllib.parse.unquote_to_bytes(payload), param)

    def _base64(self, text: str, param: str, problem: str = "the data: URI does not hold valid base64") -> bytes:
        if len(text) > self._max_bytes * 1.5 + 64:  # 4/3 of the bytes, and line ends
            raise self._too_large(param)
        text = "".join(text.split()).rstrip("=")
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequest(problem, param) from None
        if not data:
            raise InvalidRequest("the media are empty", param)
        return self._checked_size(data, param)

    # Files

    async def _file_uri(self, uri: str, files: Account, param: str) -> bytes:
        parts = urllib.parse.urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise InvalidRequest("a file:// URI must name a file of this machine: file:///path", param)
        file = await self.run(self._open_file, urllib.parse.unquote(parts.path))
        if file is None:
            raise self._no_file(param)
        return await self._read_file(file, files, param)

    async def _file_or_base64(self, text: str, files: Account, param: str) -> bytes:
        """Base64 may look like a path (that of a JPEG begins with /9j/), so a file has to be there."""
        file = await self.run(self._open_file, text)
        if file is not None:
            return await self._read_file(file, files, param)
        if not (len(text) < _SHORTEST_BASE64 and text.startswith(("/", ".", "~"))) and _BASE64.fullmatch(text):
            decode = functools.partial(self._base64, text, param, f"{_NO_SOURCE} valid base64 text")
            return await self._decoded_text(decode, files, len(text), param)
        raise self._no_file(param, f"{_NO_SOURCE} base64 text, and ")

    def _no_file(self, param: str, beginning: str = "") -> InvalidRequest:
        """Says the same whether a file that may not be named exists or not."""
        if self.trusted:
            return InvalidRequest(f"{beginning}there is no such file", param)
        if self._local_root is None:
            return InvalidRequest(f"{beginning}files may not be named here (--allowed-local-media-path)", param)
        return InvalidRequest(
            f"{beginning}there is no file of this name below the directory of --allowed-local-media-path", param
        )

    def _open_file(self, name: str) -> BinaryIO | None:
        """A regular file, if there is one that may be named."""
        if not (self.trusted or self._local_root) or not name or len(name) > _MAX_PATH:
            return None
        base = Path() if self.trusted or self._local_root is None else self._local_root
        try:
            path = (base / name).resolve(strict=True)
            if not self.trusted and not path.is_relative_to(base):
                return None
            # Not blocking: opening a named pipe would wait for its other end.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (OSError, ValueError, RuntimeError):  # not there, not ours, a null byte, a loop of links
            return None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            return None
        return os.fdopen(handle, "rb")

    async def _read_file(self, file: BinaryIO, files: Account, param: str) -> bytes:
        with file:
            num_bytes = os.fstat(file.fileno()).st_size
            self._check_size(num_bytes, param)
            files.give(0, lower_claim=self._max_bytes - num_bytes)
            await self._take(files, num_bytes, param)
            data = await self.run(file.read, num_bytes)
        files.give(num_bytes - len(data), lower_claim=num_bytes - len(data))
        return data

    # URLs

    async def _fetch(self, text: str, files: Account, param: str) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                return await self._follow(text, files, deadline, param)
        except TimeoutError:
            raise InvalidRequest(
                f"{_shown(text)} was not fetched within {self._timeout_s:g} s (--media-io-timeout)", param
            ) from None
        except _Refused as error:
            raise InvalidRequest(f"{_shown(text)}: {error}", param) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest(f"{_shown(text)}: {refusal_in(error) or 'it could not be fetched'}", param) from None

    async def _follow(self, text: str, files: Account, deadline: asyncio.Timeout, param: str) -> bytes:
        """Redirects are followed by hand: each hop is a URL like the first."""
        url = self._checked_url(text)
        # No compression: a small body that expands to a large one could not be limited while it arrives.
        headers = {"Accept-Encoding": "identity", "User-Agent": f"rtp-llm/{__version__}"}
        connector = aiohttp.TCPConnector(
            resolver=PublicResolver(self._may_be_private),
            use_dns_cache=False,
            socket_factory=public_socket if self._domains is None else None,
        )
        async with aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(),  # none of its own
        ) as session:
            for _ in range(MAX_REDIRECTS + 1):
                async with session.get(url, allow_redirects=False) as response:
                    if response.status not in (301, 302, 303, 307, 308):
                        return await self._body(response, files, deadline, param)
                    location = response.headers.get("Location")
                if not location:
                    raise _Refused("the server redirects without saying where to")
                url = self._checked_url(urllib.parse.urljoin(str(url), location))
        raise _Refused(f"it is redirected more than {MAX_REDIRECTS} times")

    def _checked_url(self, text: str) -> URL:
        """A URL whose host may be asked, and is the same one to everybody who reads it."""
        host = host_of(text)
        if self._domains is None:
            check_public(host)
        elif host not in self._domains:
            raise _Refused("its host is not one of those that may be fetched from (--allowed-media-domains)")
        url = URL(text)
        if plain_host(url.raw_host or "") != host:
            raise _Refused("its host can be read in two ways")
        return url

    def _may_be_private(self, host: str) -> bool:
        return self._domains is not None and plain_host(host) in self._domains

    async def _body(
        self, response: aiohttp.ClientResponse, files: Account, deadline: asyncio.Timeout, param: str
    ) -> bytes:
        if response.status != 200:
            raise _Refused(f"the server answered with status {response.status}")
        if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise _Refused("the server sends it compressed, though asked not to")
        most = self._max_bytes if response.content_length is None else response.content_length
        self._check_size(most, param)
        files.give(0, lower_claim=self._max_bytes - most)
        file, num_bytes, taken = io.BytesIO(), 0, 0
        async for chunk in response.content.iter_chunked(1 << 16):
            num_bytes += len(chunk)
            self._check_size(num_bytes, param)
            if num_bytes > taken:
                step = min(max(GROWTH, num_bytes - taken), most - taken)
                await self._take_while_fetching(files, step, deadline, param)
                taken += step
            file.write(chunk)
        files.give(taken - num_bytes, lower_claim=most - num_bytes)
        return file.getvalue()

    async def _take_while_fetching(self, files: Account, num_bytes: int, deadline: asyncio.Timeout, param: str) -> None:
        """Waiting for room is no time of the server's that is asked."""
        loop, when = asyncio.get_running_loop(), deadline.when()
        left_s = (when or 0) - loop.time()
        deadline.reschedule(None)
        await self._take(files, num_bytes, param)
        deadline.reschedule(loop.time() + left_s)


_NO_SOURCE = "the media are neither a URL, a data: URI nor"


class _Refused(Exception):
    """A URL that must not be fetched, or an answer that is of no use."""


def _shown(url: str) -> str:
    """A URL for messages: without credentials and query, and not long."""
    scheme, _, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")
    authority, slash, path = rest.partition("/")
    text = f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"
    if not text.isprintable():
        return "the URL"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _unwrapped(source: Any, param: str, known: frozenset[str] = frozenset()) -> Any:
    """What ``{"url": source}`` holds."""
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
    except Exception as error:  # decoders raise whatever comes to mind: OSError, SyntaxError, struct.error, ...
        raise InvalidRequest(
            f"the {what} cannot be decoded: it is broken, cut short, or of a format that is not supported", param
        ) from error
