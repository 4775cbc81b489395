"""RTP-LLM in Python: an inference engine in which supporting a new model is one file.

The names below are imported on first use, so that ``import rtp_llm`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rtp_llm.srt.configs.server_args import ServerArgs as ServerArgs
    from rtp_llm.srt.entrypoints.engine import Engine as Engine
    from rtp_llm.srt.models.registry import ModelRegistry as ModelRegistry
    from rtp_llm.srt.sampling_params import SamplingParams as SamplingParams

_HOMES = {
    "Engine": "rtp_llm.srt.entrypoints.engine",
    "ModelRegistry": "rtp_llm.srt.models.registry",
    "SamplingParams": "rtp_llm.srt.sampling_params",
    "ServerArgs": "rtp_llm.srt.configs.server_args",
}

__all__ = ["Engine", "ModelRegistry", "SamplingParams", "ServerArgs"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rtp_llm' has no attribute {name!r}")
