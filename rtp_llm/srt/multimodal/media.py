"""Images and videos from wherever callers name them: fetched, checked, decoded.

Whoever names a source is not trusted, and neither is what lies there: sizes are limited before memory is spent, and a
URL cannot reach what only this machine can reach (CWE-918, server-side request forgery).
"""

import asyncio
import base64
import binascii
import functools
import io
import ipaddress
import os
import re
import socket
import stat
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp
import av
import numpy as np
from aiohttp.abc import AbstractResolver, ResolveResult
from PIL import Image, ImageOps
from yarl import URL

from rtp_llm import __version__
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.sampling_params import InvalidRequest

T = TypeVar("T")

MAX_PIXELS = 80_000_000  # of an image: 20,000 x 4,000; 240 MB as RGB
MAX_VIDEO_PIXELS = 1 << 28  # of a video's chosen frames together: 0.8 GB as RGB
MAX_VIDEO_SECONDS = 3600.0
MAX_VIDEO_SOURCE_PIXELS = 1 << 36  # decoded on the way to the chosen frames: half an hour at 30 frames of 1,280 x 720
MAX_REDIRECTS = 5
DETAILS = ("auto", "low", "high")  # of OpenAI's API
LOW_DETAIL_SIZE = 512  # pixels of the longer side, as OpenAI has it
UNKNOWN_FPS = 24.0  # of videos given as bare frames; what transformers assumes too
DECODER_THREADS = 4

# Formats whose decoders neither run other programs (as EPS does) nor are too obscure to be well tested.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# Containers that hold their frames themselves: playlists (HLS, DASH, concat) would make FFmpeg open what they name.
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,gif,h264,hevc,ivf"

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOCAL = tuple(  # to a site or a protocol, which Python's ``is_global`` does not know, or not in all versions
    map(ipaddress.ip_network, ("192.0.0.0/24", "64:ff9b:1::/48", "fec0::/10"))
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}")
_SHORTEST_BASE64 = 100  # characters; what is shorter and begins as paths do is meant as one
_MAX_PATH = 4096  # characters; what is longer is no path


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What is known of a video before its frames are chosen. ``duration`` is in seconds, ``fps`` the source's."""

    total_frames: int
    fps: float
    duration: float
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """Chosen frames of a video.

    Args:
        frames: [n, height, width, 3] uint8, RGB.
        fps: frames per second of the source.
        duration: seconds of the source.
        indices: which of the source's frames these are.
        timestamps: when each is shown, in seconds from the first frame of the source.
    """

    frames: np.ndarray
    fps: float
    duration: float
    indices: list[int]
    timestamps: list[float]


Sample = Callable[[VideoInfo], Sequence[int]]


def uniform_indices(
    video: VideoInfo, fps: float | None = None, max_frames: int | None = None, min_frames: int = 1
) -> list[int]:
    """Evenly spaced frames from the first to the last: ``fps`` per second (None: all), but not fewer than
    ``min_frames`` nor more than ``max_frames`` or than there are."""
    wanted = video.total_frames if fps is None else int(video.duration * fps)
    wanted = max(wanted, min_frames, 1)
    wanted = min(wanted, video.total_frames, max_frames or video.total_frames)
    return np.linspace(0, video.total_frames - 1, wanted).round().astype(int).tolist()


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
    ) -> None:
        self.trusted = trusted
        self._local_root = None if allowed_local_media_path is None else Path(allowed_local_media_path).resolve()
        self._domains = None if allowed_media_domains is None else {_plain_host(name) for name in allowed_media_domains}
        self._max_bytes = int(max_file_size_mb * 2**20)
        self._timeout_s = timeout_s
        self._max_pixels = max_pixels
        self._max_video_pixels = max_video_pixels
        self._max_video_duration_s = max_video_duration_s
        self._pool = ThreadPoolExecutor(DECODER_THREADS, thread_name_prefix="rtp-llm-media")

    @classmethod
    def from_server_args(cls, args: ServerArgs, trusted: bool = False) -> Self:
        return cls(
            args.allowed_local_media_path,
            args.allowed_media_domains,
            args.media_url_max_file_size_mb,
            args.media_io_timeout,
            trusted=trusted,
        )

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """The function's result, from one of the decoders' threads; the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(function, *arguments))

    async def load_image(self, source: Any, keep_alpha: bool = False, param: str = "image_data") -> Image.Image:
        """An RGB image, turned as its EXIF orientation says; of an animation the first frame.

        ``{"url": source, "detail": "low"}`` makes a large one smaller, its longer side to LOW_DETAIL_SIZE; otherwise it
        keeps the resolution that it has. Transparent pixels are blended with white, as transformers' image processors
        do; with ``keep_alpha`` an image that has any is RGBA instead. 16-bit samples keep their upper eight bits.

        Raises:
            InvalidRequest: it cannot be had, is too large, or is no image.
        """
        is_low = _is_low_detail(source, param)
        source = _unwrapped(source, param)
        if isinstance(source, Image.Image):
            return await self.run(_decoded, lambda: _reduced(_plain_image(source, keep_alpha), is_low), param, "image")
        data = await self._bytes(source, param)

        def decode() -> Image.Image:
            return _reduced(decode_image(data, self._max_pixels, keep_alpha), is_low)

        return await self.run(_decoded, decode, param, "image")

    async def load_video(
        self,
        source: Any,
        fps: float | None = None,
        max_frames: int | None = None,
        min_frames: int = 1,
        sample: Sample | None = None,
        param: str = "video_data",
    ) -> VideoFrames:
        """Frames of a video: those that ``sample`` names, else ``uniform_indices``. Frames given as an array
        [n, height, width, 3] uint8 or as a list of images are taken as they are.

        A source that is a dict may have ``fps``, ``max_frames`` and ``min_frames`` of its own, beside ``url``; they
        come before ``sample``.

        Raises:
            InvalidRequest: it cannot be had, is too long or large, or is no video.
        """
        options = _video_options(source, param)
        source = _unwrapped(source, param, known=_VIDEO_OPTIONS)
        if options or sample is None:
            chosen = {"fps": fps, "max_frames": max_frames, "min_frames": min_frames} | options
            sample = functools.partial(uniform_indices, **chosen)
        if isinstance(source, (np.ndarray, list, tuple)):
            return await self.run(_decoded, lambda: _given_frames(source), param, "video")
        data = await self._bytes(source, param)
        return await self.run(_decoded, lambda: self._decode_video(data, sample), param, "video")

    def _decode_video(self, data: bytes, sample: Sample) -> VideoFrames:
        return decode_video(data, sample, self._max_pixels, self._max_video_pixels, self._max_video_duration_s)

    async def _bytes(self, source: Any, param: str) -> bytes:
        if isinstance(source, Path):
            source = str(source)
        if isinstance(source, (bytes, bytearray, memoryview)):
            return self._checked_size(bytes(source), param)
        if not isinstance(source, str):
            raise InvalidRequest(
                f"media must be a URL, a data: URI, base64 text, a path or bytes, not {type(source).__name__}", param
            )
        text = source.strip()
        if text[:5].lower() == "data:":
            return await self.run(self._data_uri, text, param)
        scheme = _SCHEME.match(text)
        if scheme is None:
            return await self.run(self._file_or_base64, text, param)
        if scheme[1].lower() in ("http", "https"):
            return await self._fetch(text, param)
        if scheme[1].lower() == "file":
            return await self.run(self._file_uri, text, param)
        raise InvalidRequest(f"media cannot be had by {scheme[1][:20]}://; use http, https, data: or base64", param)

    def _checked_size(self, data: bytes, param: str) -> bytes:
        if len(data) > self._max_bytes:
            raise self._too_large(param)
        return data

    def _too_large(self, param: str) -> InvalidRequest:
        limit = self._max_bytes / 2**20
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

    def _file_uri(self, uri: str, param: str) -> bytes:
        parts = urllib.parse.urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise InvalidRequest("a file:// URI must name a file of this machine: file:///path", param)
        data = self._file(urllib.parse.unquote(parts.path), param)
        if data is None:
            raise self._no_file(param)
        return data

    def _file_or_base64(self, text: str, param: str) -> bytes:
        """Base64 may look like a path (that of a JPEG begins with /9j/), so a file has to be there."""
        data = self._file(text, param)
        if data is not None:
            return data
        if not (len(text) < _SHORTEST_BASE64 and text.startswith(("/", ".", "~"))) and _BASE64.fullmatch(text):
            return self._base64(text, param, f"{_NO_SOURCE} valid base64 text")
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

    def _file(self, name: str, param: str) -> bytes | None:
        """A regular file's bytes, if there is one that may be named."""
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
        with os.fdopen(handle, "rb") as file:
            return self._checked_size(file.read(self._max_bytes + 1), param)

    # URLs

    async def _fetch(self, text: str, param: str) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(text, param)
        except TimeoutError:
            raise InvalidRequest(
                f"{_shown(text)} was not fetched within {self._timeout_s:g} s (--media-io-timeout)", param
            ) from None
        except _Refused as error:
            raise InvalidRequest(f"{_shown(text)}: {error}", param) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error, InvalidRequest):
                raise
            refused = _refusal_in(error)
            raise InvalidRequest(f"{_shown(text)}: {refused or 'it could not be fetched'}", param) from None

    async def _follow(self, text: str, param: str) -> bytes:
        """Redirects are followed by hand: each hop is a URL like the first."""
        url = URL(text)
        # No compression: a small body that expands to a large one could not be limited while it arrives.
        headers = {"Accept-Encoding": "identity", "User-Agent": f"rtp-llm/{__version__}"}
        connector = aiohttp.TCPConnector(resolver=_PublicResolver(self._may_be_private), use_dns_cache=False)
        async with aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(),  # none of its own
        ) as session:
            for _ in range(MAX_REDIRECTS + 1):
                self._check_url(url)
                async with session.get(url, allow_redirects=False) as response:
                    if response.status not in (301, 302, 303, 307, 308):
                        return await self._body(response, param)
                    location = response.headers.get("Location")
                if not location:
                    raise _Refused("the server redirects without saying where to")
                url = url.join(URL(location))
        raise _Refused(f"it is redirected more than {MAX_REDIRECTS} times")

    def _check_url(self, url: URL) -> None:
        if url.scheme not in ("http", "https") or not url.host:
            raise _Refused("it leads to something that is no http or https URL")
        host = _plain_host(url.raw_host or "")
        if self._domains is not None and host not in self._domains:
            raise _Refused("its host is not one of those that may be fetched from (--allowed-media-domains)")
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return  # a name: the resolver checks what it means
        if not self._may_be_private(host) and not is_public(address):
            raise _Refused(_NOT_PUBLIC)

    def _may_be_private(self, host: str) -> bool:
        return self._domains is not None and _plain_host(host) in self._domains

    async def _body(self, response: aiohttp.ClientResponse, param: str) -> bytes:
        if response.status != 200:
            raise _Refused(f"the server answered with status {response.status}")
        if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise _Refused("the server sends it compressed, though asked not to")
        data = bytearray()
        async for chunk in response.content.iter_chunked(1 << 16):
            data += chunk
            if len(data) > self._max_bytes:
                raise self._too_large(param)
        return bytes(data)


_NO_SOURCE = "the media are neither a URL, a data: URI nor"
_NOT_PUBLIC = "its host is not on the public internet (--allowed-media-domains can allow it)"


class _Refused(Exception):
    """A URL that must not be fetched, or an answer that is of no use."""


class _RefusedAddress(OSError):
    """Raised through aiohttp, which takes OSErrors from resolvers."""


class _PublicResolver(AbstractResolver):
    """Resolves a name and checks its addresses in one: the connection is made to an address that was checked, whatever
    the name means a moment later (DNS rebinding)."""

    def __init__(self, may_be_private: Callable[[str], bool]) -> None:
        self._may_be_private = may_be_private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        addresses = [(kind, str(address[0])) for kind, _, _, _, address in found]
        public = all(is_public(ipaddress.ip_address(address.partition("%")[0])) for _, address in addresses)
        if not public and not self._may_be_private(host):
            raise _RefusedAddress(_NOT_PUBLIC)
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=kind, proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, address in addresses
        ]  # fmt: skip

    async def close(self) -> None:
        pass


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address belongs to the public internet, also where it is an IPv6 form of an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    if any(address in network for network in _LOCAL):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _refusal_in(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, _RefusedAddress):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _plain_host(host: str) -> str:
    return host.strip().strip("[]").rstrip(".").lower()


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


def _reduced(image: Image.Image, is_low: bool) -> Image.Image:
    """In low detail, its longer side is LOW_DETAIL_SIZE at most; the callers' own image is left as it is."""
    if is_low and max(image.size) > LOW_DETAIL_SIZE:
        image = image.copy()
        image.thumbnail((LOW_DETAIL_SIZE, LOW_DETAIL_SIZE), Image.Resampling.BICUBIC)
    return image


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


# Images


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, keep_alpha: bool = False) -> Image.Image:
    """An image file's first picture, RGB or, if it has transparency and ``keep_alpha``, RGBA.

    Raises:
        InvalidRequest: it has more pixels than ``max_pixels``, which the header tells before any is decoded.
        Exception: it cannot be decoded.
    """
    with Image.open(io.BytesIO(data), formats=_image_formats()) as image:
        if image.width * image.height > max_pixels:
            raise InvalidRequest(
                f"the image has {image.width} x {image.height} pixels; at most {max_pixels} can be taken"
            )
        image.load()
        return _plain_image(image, keep_alpha)


@functools.cache
def _image_formats() -> tuple[str, ...]:
    """Those that this build of Pillow has."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _plain_image(image: Image.Image, keep_alpha: bool) -> Image.Image:
    image = _eight_bits(_upright(image))
    if "A" not in image.mode and "a" not in image.mode and image.info.get("transparency") is None:
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    if keep_alpha:
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing; the pixels are sound
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow would clip wide samples at 255, which turns a 16-bit image white."""
    if image.mode == "F":
        raise InvalidRequest("the image has floating-point samples, whose range is not known; convert it to 8 bits")
    if not image.mode.startswith("I"):
        return image
    samples = np.asarray(image).astype(np.int64)
    if samples.min() < 0 or samples.max() > 0xFFFF:
        raise InvalidRequest("the image has samples of more than 16 bits; convert it to 8 bits")
    return Image.fromarray((samples >> 8).astype(np.uint8))


# Videos


def decode_video(
    data: bytes,
    sample: Sample,
    max_pixels: int = MAX_PIXELS,
    max_video_pixels: int = MAX_VIDEO_PIXELS,
    max_duration_s: float = MAX_VIDEO_SECONDS,
) -> VideoFrames:
    """The frames that ``sample`` chooses of a video file's first video stream, upright.

    Frames are counted by reading the packets, since headers may be wrong or silent.

    Raises:
        InvalidRequest: it is too long, too large, or has no frames.
        Exception: it cannot be decoded.
    """
    info, rotation = _video_info(data, max_pixels)
    if info.duration > max_duration_s:
        raise InvalidRequest(f"the video lasts {info.duration:.1f} s; at most {max_duration_s:g} s can be taken")
    size = info.height * info.width
    if size > max_pixels or size * info.total_frames > MAX_VIDEO_SOURCE_PIXELS:
        raise _too_many_pixels(info.total_frames, info.width, info.height)
    indices = sorted({min(max(int(i), 0), info.total_frames - 1) for i in sample(info)})
    if size * len(indices) > max_video_pixels:
        raise InvalidRequest(
            f"{len(indices)} frames of {info.width} x {info.height} pixels were chosen of the video; at most "
            f"{max_video_pixels} pixels can be taken: choose fewer (fps, max_frames) or make it smaller"
        )
    found, times = _read_frames(data, indices, info, rotation, max_pixels)
    if not found:
        raise InvalidRequest("the video has no frames")
    # A few packets at the end may hold no frame of their own: the last frame then stands for them.
    found += [found[-1]] * (len(indices) - len(found))
    times += [index / info.fps for index in indices[len(times) :]]
    return VideoFrames(np.stack(found), info.fps, info.duration, indices, times)


def _too_many_pixels(num_frames: int, width: int, height: int) -> InvalidRequest:
    return InvalidRequest(f"the video has {num_frames} frames of {width} x {height} pixels, which is too many")


def _open_video(data: bytes, max_pixels: int) -> Any:
    """Whatever its header says, a frame that is far larger than ``max_pixels`` is an error, before there is memory for
    it: FFmpeg limits the sizes that it rounds up itself, hence the margin."""
    limit = {"max_pixels": str(2 * max_pixels + (1 << 20))}
    options = {"protocol_whitelist": "none", "format_whitelist": VIDEO_FORMATS, **limit}
    container = av.open(io.BytesIO(data), mode="r", options=options)
    for stream in container.streams.video:
        stream.codec_context.options = limit
    return container


def _video_info(data: bytes, max_pixels: int) -> tuple[VideoInfo, int]:
    """Of the frames as they are shown; and by how many quarter turns, counterclockwise, they have to be turned."""
    with _open_video(data, max_pixels) as container:
        if not container.streams.video:
            raise InvalidRequest("there is no video in the file")
        stream = container.streams.video[0]
        total = sum(packet.size > 0 for packet in container.demux(stream))
        if stream.width * stream.height > max_pixels:
            raise _too_many_pixels(total, stream.width, stream.height)
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if fps <= 0:
            fps = total / seconds if seconds > 0 else UNKNOWN_FPS
    if total < 1:
        raise InvalidRequest("the video has no frames")
    with _open_video(data, max_pixels) as container:
        frame = next(iter(container.decode(video=0)))
        turns = round(frame.rotation / 90) % 4
        height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
    return VideoInfo(total, fps, total / fps, height, width), turns


def _read_frames(
    data: bytes, indices: list[int], info: VideoInfo, turns: int, max_pixels: int
) -> tuple[list[np.ndarray], list[float]]:
    """The frames of these indices, all of the first one's size, and their times in seconds."""
    height, width = (info.width, info.height) if turns % 2 else (info.height, info.width)
    wanted, found, times = set(indices), [], []
    start: float | None = None
    num_pixels = 0  # decoded, since later frames may be larger than the first
    with _open_video(data, max_pixels) as container:
        for index, frame in enumerate(container.decode(video=0)):
            num_pixels += frame.width * frame.height
            if num_pixels > MAX_VIDEO_SOURCE_PIXELS:
                raise _too_many_pixels(info.total_frames, frame.width, frame.height)
            start = frame.time if start is None else start
            if index in wanted:
                pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
                found.append(np.ascontiguousarray(np.rot90(pixels, turns)))
                times.append(index / info.fps if frame.time is None or start is None else frame.time - start)
            if index >= indices[-1]:
                break
    return found, times


def _given_frames(source: Any) -> VideoFrames:
    """Frames that a caller has decoded."""
    if isinstance(source, np.ndarray):
        frames = source
    elif source and all(isinstance(frame, Image.Image) for frame in source):
        frames = np.stack([np.asarray(_plain_image(frame, keep_alpha=False)) for frame in source])
    else:
        frames = np.stack([np.asarray(frame) for frame in source]) if source else np.empty(0)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise InvalidRequest(
            f"the frames of a video must be [frames, height, width, 3] uint8, not {list(frames.shape)} {frames.dtype}"
        )
    count = len(frames)
    times = [index / UNKNOWN_FPS for index in range(count)]
    return VideoFrames(frames, UNKNOWN_FPS, count / UNKNOWN_FPS, list(range(count)), times)
