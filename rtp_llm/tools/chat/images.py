"""Images in messages."""

import base64
from pathlib import Path
from typing import Any

from rtp_llm.srt.sampling_params import InvalidRequest

IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "WebP", "BMP", "TIFF")


def image_part(source: str) -> dict[str, Any]:
    """Return the part of a message for an image: a URL as it is, a file with its content.

    Raises:
        InvalidRequest: there is no such file, or it is not an image.
    """
    if source.startswith(("http://", "https://", "data:")):
        return {"type": "image_url", "image_url": {"url": source}}
    path = Path(source).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read the image {source}: {error.strerror or error}") from None
    kind = image_format(content)
    if kind is None:
        raise InvalidRequest(f"{source} is no image of a known kind ({', '.join(IMAGE_FORMATS)})")
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def image_format(content: bytes) -> str | None:
    """Return the one of IMAGE_FORMATS that a file's first bytes announce; None: none."""
    marks = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"BM": "BMP"}
    marks |= {b"II*\0": "TIFF", b"MM\0*": "TIFF"}
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    return next((kind for mark, kind in marks.items() if content.startswith(mark)), None)


def image_count(number: int) -> str:
    return "1 image" if number == 1 else f"{number} images"
