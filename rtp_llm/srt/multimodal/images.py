"""Image files: their headers and their pixels."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from rtp_llm.srt.multimodal.memory import Need
from rtp_llm.srt.multimodal.work import WatchedFile, check_stopped
from rtp_llm.srt.sampling_params import InvalidRequest

MAX_PIXELS = 80_000_000  # of an image: 20,000 x 4,000; 320 MB as Pillow keeps RGB
LOW_DETAIL_SIZE = 512  # pixels of the longer side, as OpenAI has it
STRIPE_PIXELS = 1 << 20  # converted at once

# Formats whose decoders run no other programs (as EPS does) and are well tested.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

# A decoder that cannot be stopped runs in a process of its own, which can be killed: always if it does not keep to the
# header's size or blocks Python, else from this size on.
ALWAYS_APART = frozenset({"JPEG2000", "AVIF"})
LARGE_APART = frozenset({"WEBP", "TIFF"})
APART_PIXELS = 1 << 22

KEEP_NOTHING = frozenset({"JPEG", "PNG", "BMP", "PPM"})  # decoders that keep only the pixels

PIXEL_BYTES = 4  # of Pillow's RGB and RGBA
# Bytes per pixel beside the image itself while it is decoded, turned, blended and converted: measured, with a margin.
EXTRA_BYTES = {"WEBP": 20, "AVIF": 20, "JPEG2000": 36, "TIFF": 12}
OTHER_EXTRA_BYTES = 9
PROGRESSIVE_BYTES = 6  # of all coefficients, which a progressive JPEG holds at once

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Properties of an image, known before it is decoded.

    Args:
        file_format: Pillow's name; empty: the image is decoded already.
        width, height: after turning and reducing.
        num_file_pixels: decoded pixels.
        num_extra_bytes: bytes for decoding beside the result.
    """

    file_format: str
    width: int
    height: int
    num_file_pixels: int
    num_extra_bytes: int

    @property
    def num_pixels(self) -> int:
        return self.width * self.height

    @property
    def is_decoded_apart(self) -> bool:
        return self.file_format in ALWAYS_APART or (
            self.file_format in LARGE_APART and self.num_file_pixels > APART_PIXELS
        )

    @property
    def need(self) -> Need:
        """Memory for its pixels."""
        return Need(held=PIXEL_BYTES * self.num_pixels, decoding=self.num_extra_bytes)


def read_header(data: bytes, max_pixels: int = MAX_PIXELS, is_low: bool = False) -> ImageHeader:
    """Read the header of an image file.

    Raises:
        InvalidRequest: the image has more pixels than ``max_pixels``.
        Exception: it is no image.
    """
    with _open(data, max_pixels) as image:
        width, height = image.size
        num_pixels = width * height
        extra = EXTRA_BYTES.get(image.format or "", OTHER_EXTRA_BYTES) * num_pixels
        if image.info.get("progressive"):
            extra += PROGRESSIVE_BYTES * num_pixels
        if _orientation(image) >= 5:
            width, height = height, width
        if is_low and max(width, height) > LOW_DETAIL_SIZE:
            low_width, low_height = low_size(width, height)
            if image.format == "JPEG":  # decoded at a smaller size
                image.draft(None, _draft_size(image))
                extra -= OTHER_EXTRA_BYTES * (num_pixels - image.width * image.height)
            extra += PIXEL_BYTES * image.width * image.height
            width, height = low_width, low_height
        return ImageHeader(image.format or "", width, height, num_pixels, extra)


def header_of(image: Image.Image, is_low: bool = False) -> ImageHeader:
    """Return the header of an image that a caller has decoded."""
    width, height = low_size(*image.size) if is_low else image.size
    num_pixels = image.width * image.height
    return ImageHeader("", width, height, num_pixels, OTHER_EXTRA_BYTES * num_pixels)


def decode_image(
    data: bytes, max_pixels: int = MAX_PIXELS, keep_alpha: bool = False, is_low: bool = False
) -> Image.Image:
    """Return the first frame of an image file, RGB or, if it has transparency and ``keep_alpha``, RGBA.

    Args:
        is_low: reduce the longer side to LOW_DETAIL_SIZE at most.

    Raises:
        InvalidRequest: it has more pixels than ``max_pixels``; checked in the header before decoding.
        Exception: it cannot be decoded.
    """
    with _open(data, max_pixels) as file:
        size = file.size
        if is_low and file.format == "JPEG" and max(size) > LOW_DETAIL_SIZE:
            file.draft(None, _draft_size(file))
            size = file.size
        file.load()
        if file.size != size:
            raise InvalidRequest(f"the image has {file.width} x {file.height} pixels; its header says {size}")
        orientation = _orientation(file)
        image: Image.Image = file if file.format in KEEP_NOTHING else file.copy()
    return reduced(_plain(_turned(image, orientation), keep_alpha), is_low)


def plain_image(image: Image.Image, keep_alpha: bool, is_low: bool = False) -> Image.Image:
    """Return the result of ``decode_image`` for an image that a caller has decoded; it is not changed."""
    plain = _plain(_turned(image, _orientation(image)), keep_alpha)
    plain = reduced(plain, is_low)
    return plain.copy() if plain is image else plain


def low_size(width: int, height: int) -> tuple[int, int]:
    """Return an image's size in low detail, at most a pixel less than Pillow's."""
    longest = max(width, height)
    if longest <= LOW_DETAIL_SIZE:
        return width, height
    return tuple(max(-(-side * LOW_DETAIL_SIZE // longest), 1) for side in (width, height))  # type: ignore[return-value]


def reduced(image: Image.Image, is_low: bool) -> Image.Image:
    """Return the image, in low detail with its longer side LOW_DETAIL_SIZE at most; the argument is not changed."""
    if not is_low or max(image.size) <= LOW_DETAIL_SIZE:
        return image
    image = image.copy()
    image.thumbnail((LOW_DETAIL_SIZE, LOW_DETAIL_SIZE), Image.Resampling.BICUBIC)
    return image


def _draft_size(image: Image.Image) -> tuple[int, int]:
    """Return at least twice the reduced size: a JPEG decodes at a half, a quarter or an eighth of its own."""
    width, height = low_size(*image.size)
    return 2 * width, 2 * height


def _open(data: bytes, max_pixels: int) -> Image.Image:
    image = Image.open(WatchedFile(data), formats=_image_formats())
    if image.width * image.height > max_pixels:
        image.close()
        raise InvalidRequest(f"the image has {image.width} x {image.height} pixels; at most {max_pixels} can be taken")
    return image


@functools.cache
def _image_formats() -> tuple[str, ...]:
    """Return the formats that this build of Pillow has."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken EXIF block; the pixels are sound
        return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    check_stopped()
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _plain(image: Image.Image, keep_alpha: bool) -> Image.Image:
    image = _eight_bits(image)
    check_stopped()
    if "A" not in image.mode and "a" not in image.mode and image.info.get("transparency") is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    return image if keep_alpha else _on_white(image)


def _on_white(image: Image.Image) -> Image.Image:
    """Blend with white, stripe by stripe, so that memory holds only the two images."""
    blended = Image.new("RGB", image.size)
    num_rows = max(STRIPE_PIXELS // image.width, 1)
    for top in range(0, image.height, num_rows):
        check_stopped()
        part = image.crop((0, top, image.width, min(top + num_rows, image.height)))
        white = Image.new("RGBA", part.size, (255, 255, 255, 255))
        blended.paste(Image.alpha_composite(white, part).convert("RGB"), (0, top))
    return blended


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale wide samples to eight bits: Pillow would clip them at 255, which makes a 16-bit image white."""
    if image.mode == "F":
        raise InvalidRequest("the image has floating-point samples, whose range is not known; convert it to 8 bits")
    if not image.mode.startswith("I"):
        return image
    samples: Any = np.asarray(image)
    if samples.min() < 0 or samples.max() > 0xFFFF:
        raise InvalidRequest("the image has samples of more than 16 bits; convert it to 8 bits")
    return Image.fromarray((samples >> 8).astype(np.uint8))
