"""Pictures that are shown in a message."""

import base64
from pathlib import Path
from typing import Any

from rtp_llm.srt.sampling_params import InvalidRequest

PICTURES = ("JPEG", "PNG", "GIF", "WebP", "BMP", "TIFF")


def picture_part(source: str) -> dict[str, Any]:
    """The part of a message that shows a picture: a URL as it is, a file with its content.

    Raises:
        InvalidRequest: there is no such file, or it is no picture.
    """
    if source.startswith(("http://", "https://", "data:")):
        return {"type": "image_url", "image_url": {"url": source}}
    path = Path(source).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read the picture {source}: {error.strerror or error}") from None
    kind = picture_kind(content)
    if kind is None:
        raise InvalidRequest(f"{source} is no picture of a known kind ({', '.join(PICTURES)})")
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def picture_kind(content: bytes) -> str | None:
    """Which of PICTURES a file's first bytes announce."""
    marks = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"BM": "BMP"}
    marks |= {b"II*\0": "TIFF", b"MM\0*": "TIFF"}
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    return next((kind for mark, kind in marks.items() if content.startswith(mark)), None)


def pictures(number: int) -> str:
    return "1 picture" if number == 1 else f"{number} pictures"
