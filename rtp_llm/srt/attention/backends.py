"""Attention back ends by name."""

from importlib import import_module

from rtp_llm.srt.attention.base import AttentionBackend

_BACKENDS = {"torch_native": ("rtp_llm.srt.attention.torch", "TorchAttention")}


def make_backend(name: str | None) -> AttentionBackend:
    """The back end called ``name``; None chooses one for the device."""
    name = name or "torch_native"
    if name not in _BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; have {sorted(_BACKENDS)}")
    module, attribute = _BACKENDS[name]
    return getattr(import_module(module), attribute)()
