"""Small helpers under the names that model files of this field expect, imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rtp_llm.srt.utils.modules import add_prefix as add_prefix
    from rtp_llm.srt.utils.modules import cache_number as cache_number
    from rtp_llm.srt.utils.modules import extract_layer_index as extract_layer_index
    from rtp_llm.srt.utils.modules import make_layers as make_layers

_HOMES = {
    "add_prefix": "rtp_llm.srt.utils.modules",
    "cache_number": "rtp_llm.srt.utils.modules",
    "extract_layer_index": "rtp_llm.srt.utils.modules",
    "make_layers": "rtp_llm.srt.utils.modules",
}

__all__ = ["add_prefix", "cache_number", "extract_layer_index", "make_layers"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rtp_llm.srt.utils' has no attribute {name!r}")
