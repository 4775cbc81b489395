"""The norms, under the name that vLLM's model files import; they are in ``norm.py``."""

from rtp_llm.srt.layers.norm import GemmaRMSNorm, LayerNorm, RMSNorm

__all__ = ["GemmaRMSNorm", "LayerNorm", "RMSNorm"]
