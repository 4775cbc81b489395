"""Media for the Qwen-VL models: sizes and patches of images and videos, and their positions in a prompt."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from rtp_llm.srt.multimodal.items import MultimodalDataItem
from rtp_llm.srt.multimodal.media import VideoInfo
from rtp_llm.srt.sampling_params import InvalidRequest


class Segment(NamedTuple):
    """Contiguous tokens of an image or of a video's frames in a prompt.

    Args:
        first: the first token's index.
        grid: (frames, rows, columns) in patches.
        interval: temporal positions from a frame to the next, perhaps a fraction.
    """

    first: int
    grid: tuple[int, int, int]
    interval: torch.Tensor | float = 1.0


def mrope_positions(num_tokens: int, segments: Sequence[Segment], merge_size: int) -> tuple[torch.Tensor, int]:
    """Return positions (time, height, width) of a prompt's tokens, and the offset of later tokens' positions.

    A text's three are equal and rise by one. A segment's begin after the text before it, and the text behind it goes on
    after the segment's longer side; frames do not count there, as in transformers.

    Returns:
        [3, num_tokens] int64, and the offset from a token's index.
    """
    parts = []
    place = position = 0
    for first, (num_frames, num_rows, num_columns), interval in sorted(segments, key=lambda segment: segment.first):
        parts.append(torch.arange(position, position + first - place).expand(3, -1))
        position += first - place
        rows, columns = torch.arange(num_rows // merge_size), torch.arange(num_columns // merge_size)
        times = (torch.arange(num_frames) * interval).long()
        parts.append(torch.stack(torch.meshgrid(times, rows, columns, indexing="ij")).flatten(1) + position)
        place = first + parts[-1].shape[1]
        position += max(len(rows), len(columns))
    parts.append(torch.arange(position, position + num_tokens - place).expand(3, -1))
    positions = torch.cat(parts, dim=1)
    return positions, int(positions.max()) + 1 - num_tokens


def grid_of(item: MultimodalDataItem) -> tuple[int, int, int]:
    """Return (frames, rows, columns) in patches.

    Raises:
        InvalidRequest: a caller's item lacks its grid.
    """
    name = f"{item.modality.value}_grid_thw"
    grid = torch.as_tensor(item.model_specific_data.get(name, ())).flatten().tolist()
    if len(grid) != 3 or not all(isinstance(size, int) and size > 0 for size in grid):
        raise InvalidRequest(
            f"{name} must tell frames, rows and columns, in patches, not {grid}", f"{item.modality.value}_data"
        )
    return grid[0], grid[1], grid[2]


_RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers -> torch's names


class VideoSettings:
    """A checkpoint's video processor settings, under transformers' names.

    Args:
        defaults: values for keys that ``settings`` lack.
        settings: as in preprocessor_config.json.

    Raises:
        ValueError: a setting is not supported.
    """

    def __init__(self, defaults: Mapping[str, Any], settings: Mapping[str, Any], hf_config: Any) -> None:
        given = {**defaults, **{name: value for name, value in settings.items() if value is not None}}
        size = {**defaults["size"], **given["size"]}
        # The first checkpoints have other names for the keys of size.
        self.min_pixels = given.get("min_pixels") or size.get("min_pixels") or size["shortest_edge"]
        self.max_pixels = given.get("max_pixels") or size.get("max_pixels") or size["longest_edge"]
        vision = hf_config.vision_config
        self.patch_size = given.get("patch_size", vision.patch_size)
        self.temporal_patch_size = given.get("temporal_patch_size", vision.temporal_patch_size)
        self.merge_size = given.get("merge_size", vision.spatial_merge_size)
        self.factor = self.patch_size * self.merge_size
        self.fixed_num_frames: int | None = given.get("num_frames")
        self.fps = given.get("fps", 2.0)
        self.min_frames, self.max_frames = given.get("min_frames", 4), given.get("max_frames", 768)
        self.caps_pixels = bool(given.get("cap_pixels_per_frame"))
        self.max_video_tokens = given["max_video_tokens"]
        if given.get("resample", 3) not in _RESAMPLE:
            raise ValueError(f"resample {given['resample']} of videos is not supported; have {sorted(_RESAMPLE)}")
        self.resample = _RESAMPLE[given.get("resample", 3)]
        self.mean, self.std = _mean_and_std(given)

    def num_frames(self, video: VideoInfo) -> float:
        """Return how many frames of a video are wanted; it may have fewer."""
        if self.fixed_num_frames is not None:
            return self.fixed_num_frames
        return min(max(video.total_frames / video.fps * self.fps, self.min_frames), self.max_frames)

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        return ceil(num_frames / self.temporal_patch_size), height // self.patch_size, width // self.patch_size

    def prepared(self, frames: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
        """Resize and normalise frames: [n, height, width, 3] uint8 -> [n, 3, *size] float32."""
        frames = frames if frames.flags.writeable else frames.copy()
        x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).contiguous()
        if x.shape[2:] != size:
            smooth = {} if self.resample == "nearest-exact" else {"antialias": True, "align_corners": False}
            x = F.interpolate(x, size, mode=self.resample, **smooth)
        return x.float().sub_(self.mean).div_(self.std)


def _mean_and_std(given: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation, [3, 1, 1] each, of samples from 0 to 255."""
    scale = 1 / given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0
    normalises = given.get("do_normalize", True)
    mean = torch.tensor(given["image_mean"] if normalises else [0.0] * 3) * scale
    std = torch.tensor(given["image_std"] if normalises else [1.0] * 3) * scale
    return mean.view(3, 1, 1), std.view(3, 1, 1)


def patchify(
    frames: torch.Tensor, patch_size: int, merge_size: int, temporal_patch_size: int
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Cut frames [n, channels, height, width] into patches [patches, channels * temporal_patch_size * patch_size ** 2],
    those of a merged square together; return them and their grid. The last frame is repeated to fill a patch.
    """
    missing = -len(frames) % temporal_patch_size
    frames = torch.cat((frames, frames[-1:].expand(missing, -1, -1, -1)))
    times, rows, columns = (
        size // step
        for size, step in zip((len(frames), *frames.shape[2:]), (temporal_patch_size, *[patch_size] * 2), strict=True)
    )
    x = frames.unflatten(3, (columns // merge_size, merge_size, patch_size))
    x = x.unflatten(2, (rows // merge_size, merge_size, patch_size)).unflatten(0, (times, temporal_patch_size))
    # (time, frame, channel, square's row, row, y, square's column, column, x) -> squares, their patches, values
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.flatten(5).flatten(0, 4), (times, rows, columns)


MAX_ASPECT = 200


def check_aspect(height: int, width: int, param: str) -> None:
    """Raise InvalidRequest if one side is more than 200 times the other, as transformers does."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InvalidRequest(
            f"one side of {width} x {height} pixels is more than {MAX_ASPECT} times the other, which cannot be seen",
            param,
        )


def fit_size(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    num_frames: int = 1,
    rounded_frames: int = 1,
) -> tuple[int, int]:
    """Return a height and width as the nearest multiples of ``factor``, scaled at about the same aspect if the pixels
    of all frames are outside these bounds."""
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    pixels = new_height * new_width * rounded_frames
    if pixels > max_pixels:
        shrink = sqrt(num_frames * height * width / max_pixels)
        new_height = max(factor, floor(height / shrink / factor) * factor)
        new_width = max(factor, floor(width / shrink / factor) * factor)
    elif pixels < min_pixels:
        grow = sqrt(min_pixels / (num_frames * height * width))
        new_height = ceil(height * grow / factor) * factor
        new_width = ceil(width * grow / factor) * factor
    return new_height, new_width


def patch_times(indices: Sequence[int], fps: float, temporal_patch_size: int) -> list[float]:
    """Return the seconds from a video's start to each temporal patch: midway between its first and last frame."""
    missing = -len(indices) % temporal_patch_size
    seconds = [index / fps for index in [*indices, *[indices[-1]] * missing]]
    ends = range(temporal_patch_size - 1, len(seconds), temporal_patch_size)
    return [(seconds[end - temporal_patch_size + 1] + seconds[end]) / 2 for end in ends]
