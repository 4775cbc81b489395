"""Video files: their headers, and chosen frames."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from PIL import Image

from rtp_llm.srt.multimodal.images import MAX_PIXELS, plain_image
from rtp_llm.srt.multimodal.memory import Need
from rtp_llm.srt.multimodal.work import check_stopped
from rtp_llm.srt.sampling_params import InvalidRequest

MAX_VIDEO_PIXELS = 1 << 28  # of a video's chosen frames together: 0.8 GB as RGB
MAX_VIDEO_SECONDS = 3600.0
MAX_VIDEO_SOURCE_PIXELS = 1 << 36  # decoded on the way to the chosen frames: half an hour at 30 frames of 1,280 x 720
UNKNOWN_FPS = 24.0  # of videos given as bare frames, as in transformers

# Containers that hold their own frames: playlists (HLS, DASH, concat) would make FFmpeg open other files.
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,gif,h264,hevc,ivf"

RGB_BYTES = 3  # of a pixel of chosen frames
# Bytes per pixel of one frame: sixteen reference frames and a few in the decoder, and copies while it is converted and
# turned.
DECODER_BYTES = 48


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Properties of a video, known before its frames are chosen. ``duration`` in seconds, ``fps`` of the source."""

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
        indices: of these frames in the source.
        timestamps: of each frame, in seconds from the source's first frame.
    """

    frames: np.ndarray
    fps: float
    duration: float
    indices: list[int]
    timestamps: list[float]


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """Limits of videos.

    Args:
        max_pixels: of one frame.
        max_video_pixels: of all chosen frames together.
    """

    max_pixels: int = MAX_PIXELS
    max_video_pixels: int = MAX_VIDEO_PIXELS
    max_duration_s: float = MAX_VIDEO_SECONDS


Sample = Callable[[VideoInfo], Sequence[int]]


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """Properties of a video and its chosen frames, before any is decoded. Whether frames are turned by a quarter is not
    known yet."""

    info: VideoInfo
    indices: list[int]

    @property
    def num_pixels(self) -> int:
        """Pixels of the chosen frames together."""
        return len(self.indices) * self.info.width * self.info.height

    @property
    def need(self) -> Need:
        """Memory for its pixels."""
        return Need(
            held=RGB_BYTES * self.num_pixels,
            decoding=DECODER_BYTES * self.info.width * self.info.height,
            preparing=RGB_BYTES * self.num_pixels,
        )


def uniform_indices(
    video: VideoInfo, fps: float | None = None, max_frames: int | None = None, min_frames: int = 1
) -> list[int]:
    """Return evenly spaced frames from the first to the last: ``fps`` per second (None: all), at least ``min_frames``,
    at most ``max_frames``, and no more than there are."""
    wanted = video.total_frames if fps is None else int(video.duration * fps)
    wanted = max(wanted, min_frames, 1)
    wanted = min(wanted, video.total_frames, max_frames or video.total_frames)
    return np.linspace(0, video.total_frames - 1, wanted).round().astype(int).tolist()


def read_header(data: bytes, sample: Sample, limits: VideoLimits) -> VideoHeader:
    """Read a video file's header of its first video stream. Frames are counted by reading the packets, since headers
    may be wrong or incomplete.

    Raises:
        InvalidRequest: it is too long, too large, or has no frames.
        Exception: it is no video.
    """
    with _open_video(data, limits.max_pixels) as container:
        if not container.streams.video:
            raise InvalidRequest("there is no video in the file")
        stream = container.streams.video[0]
        total = sum(packet.size > 0 for packet in _unless_stopped(container.demux(stream)))
        width, height = stream.width, stream.height
        if width < 1 or height < 1:
            raise InvalidRequest(
                f"the video tells no size that its frames could have: at most {limits.max_pixels} pixels"
            )
        if width * height > limits.max_pixels or width * height * total > MAX_VIDEO_SOURCE_PIXELS:
            raise _too_many_pixels(total, width, height)
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if fps <= 0:
            fps = total / seconds if seconds > 0 else UNKNOWN_FPS
    if total < 1:
        raise InvalidRequest("the video has no frames")
    info = VideoInfo(total, fps, total / fps, height, width)
    if info.duration > limits.max_duration_s:
        raise InvalidRequest(f"the video lasts {info.duration:.1f} s; at most {limits.max_duration_s:g} s can be taken")
    return VideoHeader(info, _chosen(info, sample, limits))


def _chosen(info: VideoInfo, sample: Sample, limits: VideoLimits) -> list[int]:
    indices = sorted({min(max(int(i), 0), info.total_frames - 1) for i in sample(info)})
    if info.height * info.width * len(indices) > limits.max_video_pixels:
        raise InvalidRequest(
            f"{len(indices)} frames of {info.width} x {info.height} pixels were chosen of the video; at most "
            f"{limits.max_video_pixels} pixels can be taken: choose fewer (fps, max_frames) or make it smaller"
        )
    return indices


def decode_video(data: bytes, header: VideoHeader, sample: Sample, limits: VideoLimits) -> VideoFrames:
    """Return the frames that ``sample`` chooses, upright.

    Raises:
        InvalidRequest: its frames are larger, or more, than its header said.
        Exception: it cannot be decoded.
    """
    info, turns = _upright(data, header.info)
    indices = header.indices if turns % 2 == 0 else _chosen(info, sample, limits)
    if info.width * info.height * len(indices) > header.num_pixels:
        raise InvalidRequest("the video's frames are larger than its header says")
    frames, times = _read_frames(data, indices, info, turns)
    if not times:
        raise InvalidRequest("the video has no frames")
    # A few packets at the end may hold no frame: the last frame is used for them.
    frames[len(times) :] = frames[len(times) - 1]
    times += [index / info.fps for index in indices[len(times) :]]
    return VideoFrames(frames, info.fps, info.duration, indices, times)


def _too_many_pixels(num_frames: int, width: int, height: int) -> InvalidRequest:
    return InvalidRequest(f"the video has {num_frames} frames of {width} x {height} pixels, which is too many")


def _open_video(data: bytes, max_pixels: int) -> Any:
    """Open a video so that a frame far larger than ``max_pixels`` is an error before it is allocated, even if the
    header is wrong. FFmpeg's limit applies to rounded sizes, hence the margin."""
    limit = {"max_pixels": str(2 * max_pixels + (1 << 20))}
    options = {"protocol_whitelist": "none", "format_whitelist": VIDEO_FORMATS, **limit}
    check_stopped()  # not within reads: after an error there PyAV may read for ever
    container = av.open(io.BytesIO(data), mode="r", options=options)
    for stream in container.streams.video:
        stream.codec_context.options = limit
    return container


def _unless_stopped(values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        check_stopped()
        yield value


def _upright(data: bytes, info: VideoInfo) -> tuple[VideoInfo, int]:
    """Return the sizes of the frames as they are shown, and by how many quarter turns, counterclockwise, they
    have to be turned."""
    with _open_video(data, info.width * info.height) as container:
        frame = next(_unless_stopped(container.decode(video=0)))
        turns = round(frame.rotation / 90) % 4
        height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
    return VideoInfo(info.total_frames, info.fps, info.duration, height, width), turns


def _read_frames(data: bytes, indices: list[int], info: VideoInfo, turns: int) -> tuple[np.ndarray, list[float]]:
    """Return the frames of these indices, all in the first one's size, and the times in seconds of existing ones."""
    height, width = (info.width, info.height) if turns % 2 else (info.height, info.width)
    frames = np.empty((len(indices), info.height, info.width, 3), np.uint8)
    wanted = set(indices)
    times: list[float] = []
    start: float | None = None
    num_pixels = 0  # decoded so far: later frames may be larger than the first
    with _open_video(data, width * height) as container:
        for index, frame in enumerate(_unless_stopped(container.decode(video=0))):
            num_pixels += frame.width * frame.height
            if num_pixels > MAX_VIDEO_SOURCE_PIXELS:
                raise _too_many_pixels(info.total_frames, frame.width, frame.height)
            start = frame.time if start is None else start
            if index in wanted:
                pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
                frames[len(times)] = np.rot90(pixels, turns)
                times.append(index / info.fps if frame.time is None or start is None else frame.time - start)
            if index >= indices[-1]:
                break
    return frames, times


def given_frames(source: Any) -> VideoFrames:
    """Return frames that a caller has decoded."""
    if isinstance(source, VideoFrames):
        return source
    if isinstance(source, np.ndarray):
        frames = source
    elif source and all(isinstance(frame, Image.Image) for frame in source):
        frames = np.stack([np.asarray(plain_image(frame, keep_alpha=False)) for frame in source])
    else:
        frames = np.stack([np.asarray(frame) for frame in source]) if source else np.empty(0)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise InvalidRequest(
            f"the frames of a video must be [frames, height, width, 3] uint8, not {list(frames.shape)} {frames.dtype}"
        )
    count = len(frames)
    times = [index / UNKNOWN_FPS for index in range(count)]
    return VideoFrames(frames, UNKNOWN_FPS, count / UNKNOWN_FPS, list(range(count)), times)
