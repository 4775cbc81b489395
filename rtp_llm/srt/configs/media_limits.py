"""How many images, videos and sounds a request may hold: the option ``limit_mm_data_per_request``."""

import json

from rtp_llm.srt.configs.options import ServerArgsError

MEDIA_KINDS = ("image", "video", "audio")
DEFAULT_MEDIA_LIMITS = {"image": 64, "video": 4}  # per request


def parse_media_limits(text: str) -> dict[str, int]:
    """Parse ``limit_mm_data_per_request``."""
    name = "limit_mm_data_per_request"
    try:
        limits = json.loads(text)
    except ValueError as error:
        raise ServerArgsError(f"{name} is not JSON: {error}; got {text!r}") from None
    if not isinstance(limits, dict):
        raise ServerArgsError(f'{name} must be an object such as {{"image": 4}}, not {text!r}')
    for kind, limit in limits.items():
        if kind not in MEDIA_KINDS:
            raise ServerArgsError(f"{name} names {kind!r}; kinds of media are {', '.join(MEDIA_KINDS)}")
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ServerArgsError(f"{name}: the limit of {kind} must be a whole number from 0 on, not {limit!r}")
    return limits
