"""The attention layer, under the name and with the arguments that vLLM's model files have."""

from typing import Any

import torch

from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.utils import cache_number

__all__ = ["Attention", "ChunkedLocalAttention", "PrefillPrefixLMAttention"]


class Attention(RadixAttention):
    """Causal attention over the paged cache, called as ``attn(q, k, v, forward_batch)``.

    Args:
        num_heads, num_kv_heads: of this rank; num_kv_heads None: as many as heads.
        logits_soft_cap: ``logit_cap`` of RadixAttention; None: none.
        per_layer_sliding_window: tokens visible, the query's own included; None: all of them.
        prefix: the layer's name, which has its index as a number.
        kv_sharing_target_layer_name: the name of the layer whose cache is read; nothing is written.
        sinks: [num_heads], a parameter of the block: a score per head that takes part in the softmax.
        head_size_v: of values; None: head_size.
        layer_id: in place of the number in ``prefix``.
        use_alibi_sqrt: scores are lowered by the root of the distance. Not supported: only False is taken.
        chunk_lookback: of windows that are whole blocks, how many before its own a token sees. Not supported: only -1
            is taken, or no window.
        **options: others of RadixAttention.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        *,
        quant_config: QuantizationConfig | None = None,
        logits_soft_cap: float | None = None,
        per_layer_sliding_window: int | None = None,
        prefix: str = "",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        head_size_v: int | None = None,
        layer_id: int | None = None,
        use_alibi_sqrt: bool = False,
        chunk_lookback: int = -1,
        **options: Any,
    ) -> None:
        if use_alibi_sqrt:
            raise ValueError(f"{prefix or 'Attention'}: use_alibi_sqrt is not supported: slopes times distances are")
        if chunk_lookback > -1 and per_layer_sliding_window is not None:
            raise ValueError(f"{prefix or 'Attention'}: windows of whole blocks (chunk_lookback) are not supported")
        own_id = cache_number(prefix) if layer_id is None else layer_id
        self.reads_only = kv_sharing_target_layer_name is not None
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads or num_heads,
            cache_number(kv_sharing_target_layer_name) if kv_sharing_target_layer_name else own_id,
            logits_soft_cap or 0.0,
            head_size_v or -1,
            quant_config=quant_config,
            prefix=prefix,
            window=per_layer_sliding_window,
            **options,
        )
        self._sinks = (sinks,)  # in a tuple, so that the block's parameter is not registered a second time

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As RadixAttention; a layer that reads another's cache does not need k and v."""
        sinks = self._sinks[0] if sinks is None else sinks
        if self.reads_only:
            return super().forward(q, None, None, forward_batch, save_kv_cache=False, sinks=sinks)
        return super().forward(q, k, v, forward_batch, save_kv_cache, sinks)


class ChunkedLocalAttention(Attention):
    """Attention within chunks of ``attention_chunk_size`` tokens, from the sequence's beginning (Llama 4, 2025)."""

    def __init__(self, num_heads: int, head_size: int, scale: float, attention_chunk_size: int, **options: Any) -> None:
        super().__init__(num_heads, head_size, scale, attention_chunk_size=attention_chunk_size, **options)


class PrefillPrefixLMAttention(Attention):
    """Attention in which tokens of a prompt see all of it (prefix language models; HRM-Text, 2026)."""

    def __init__(self, num_heads: int, head_size: int, scale: float, **options: Any) -> None:
        super().__init__(num_heads, head_size, scale, sees_whole_prompts=True, **options)
