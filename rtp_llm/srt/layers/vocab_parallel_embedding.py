"""Vocabulary tables, under the name that vLLM's model files import; they are in ``embedding.py``."""

from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding

__all__ = ["ParallelLMHead", "VocabParallelEmbedding"]
