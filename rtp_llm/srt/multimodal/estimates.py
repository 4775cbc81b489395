"""Estimates of the memory that media need, made before any is decoded."""

from dataclasses import dataclass, replace

from rtp_llm.srt.multimodal.images import ImageHeader
from rtp_llm.srt.multimodal.memory import Need
from rtp_llm.srt.multimodal.videos import VideoHeader

# Bytes per pixel of an image that transformers' image processors take beside it: an array of it (3), another that is
# contiguous (3), and an image of that (4), from which it is resized.
PIXEL_COPIES = 10
# Bytes per number that a processor makes: the number itself, float32, stays until the prompt is sent to the model. On
# its way there it is cloned, written and joined.
VALUE_BYTES = 16
# While an item is prepared: as float64, scaled, normalised and in patches.
VALUE_COPIES = 20

SMALLEST_PIXELS = 448**2  # of an image after a processor without estimates
LARGEST_PIXELS = 2048**2


@dataclass(frozen=True, slots=True)
class Prepared:
    """An estimate of a processor's output for an image or a video.

    Args:
        num_tokens: positions in the prompt, at least.
        num_values: of the encoder's input, at most.
        num_pixels: after padding or enlarging.
    """

    num_tokens: int
    num_values: int
    num_pixels: int = 0


def unknown(num_pixels: int, num_frames: int = 1) -> Prepared:
    """Estimate for a processor that gives none: one token, and images within usual bounds."""
    each = min(max(num_pixels, SMALLEST_PIXELS), LARGEST_PIXELS)
    return Prepared(1, 3 * each * num_frames)


def whole_need(header: ImageHeader | VideoHeader, prepared: Prepared) -> Need:
    """Return the memory that an image or a video needs from decoding until it is sent to the model."""
    need = header.need
    copies = PIXEL_COPIES * max(header.num_pixels, prepared.num_pixels) if isinstance(header, ImageHeader) else 0
    return replace(
        need,
        preparing=need.preparing + copies + VALUE_COPIES * prepared.num_values,
        features=VALUE_BYTES * prepared.num_values,
    )
