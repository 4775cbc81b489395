"""The attention layer of model files: it describes what is computed; the ForwardBatch's back end computes it."""

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import nn

from rtp_llm.srt.cache.spec import CacheSpec
from rtp_llm.srt.forward_batch import AttentionSpec, ForwardBatch
from rtp_llm.srt.layers.quantization.base import QuantizationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def model_window(config: "PretrainedConfig", layer_window: int | None = None) -> int | None:
    """Return a layer's window: its own if it has one, else ``config.sliding_window`` where all layers share that.

    A configuration whose ``layer_types`` differ has no common window. This is what files written for vLLM expect of an
    attention layer that is given none.
    """
    if layer_window is not None:
        return layer_window
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and any(kind != "sliding_attention" for kind in layer_types):
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window or None


class AttentionType(Enum):
    DECODER = "decoder"
    DECODER_BIDIRECTIONAL = "decoder_bidirectional"
    ENCODER_ONLY = "encoder_only"


class RadixAttention(nn.Module):
    """Causal attention over the paged cache.

    Args:
        num_heads, num_kv_heads: of this rank.
        scaling: factor of the scores, usually ``head_dim ** -0.5``.
        layer_id: the layer whose cache is written and read.
        logit_cap: c > 0 replaces each score s by ``c * tanh(s / c)``.
        v_head_dim: -1: head_dim.
        window: tokens visible, the query's own included, as a Hugging Face configuration's ``sliding_window``; None:
            all of them.
        sliding_window_size: the same for model files written for SGLang: without the query's own token, so one less
            than ``window``; -1 or None for all of them.
        latent: a token's value is the first ``v_head_dim`` components of its key, stored once and never passed
            (multi-head latent attention; DeepSeek-V2, 2024).
        attention_chunk_size: the sequence is cut into chunks of so many tokens, and a token sees those of its own
            (Llama 4, 2025); None: it is not cut.
        alibi_slopes: [num_heads], of this rank (see ``layers/alibi.py``): head h's score of a key that lies d tokens
            before the query is lowered by ``alibi_slopes[h] * d``, after scaling and cap (ALiBi; Press et al., 2022).
        media_are_causal: a token of an image sees none behind it, although tokens of an image see each other in other
            layers of the model, which has ``max_media_block`` (Gemma 4, 2026).
        sees_whole_prompts: tokens of a prompt see all of it, drawn ones what is before them (prefix language models;
            HRM-Text, 2026). Prompts are then computed in one step, and none is found in the prefix cache.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        num_kv_heads: int,
        layer_id: int,
        logit_cap: float = 0.0,
        v_head_dim: int = -1,
        sliding_window_size: int | None = -1,
        attn_type: AttentionType | str = AttentionType.DECODER,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        latent: bool = False,
        window: int | None = None,
        alibi_slopes: torch.Tensor | Sequence[float] | None = None,
        attention_chunk_size: int | None = None,
        media_are_causal: bool = False,
        sees_whole_prompts: bool = False,
    ) -> None:
        super().__init__()
        if AttentionType(attn_type) != AttentionType.DECODER:
            raise ValueError(
                f"{prefix or 'RadixAttention'}: attention type {attn_type} is not supported; have [DECODER]"
            )
        if sliding_window_size is not None and sliding_window_size >= 0:
            if window is not None:
                raise ValueError(f"{prefix or 'RadixAttention'}: give window or sliding_window_size, not both")
            window = sliding_window_size + 1
        self.spec = AttentionSpec(
            layer_id=layer_id,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=head_dim if v_head_dim == -1 else v_head_dim,
            scaling=scaling,
            logit_cap=logit_cap,
            window=window,
            latent=latent,
            alibi_slopes=None if alibi_slopes is None else _slopes(alibi_slopes, num_heads, prefix),
            chunk=attention_chunk_size,
        )
        self.attn_type = AttentionType(attn_type)
        self.media_are_causal = media_are_causal
        self.sees_whole_prompts = sees_whole_prompts
        self.cache_dtype = str(torch.get_default_dtype()).removeprefix("torch.")
        if quant_config is not None and quant_config.get_quant_method(self, prefix) is not None:
            raise ValueError(f"{prefix or 'RadixAttention'}: {quant_config.get_name()} cannot quantize attention yet")

    def cache_spec(self) -> CacheSpec:
        """Return the description of this layer's cache; layers with equal specs share pages."""
        spec = self.spec
        window = spec.chunk or spec.window  # as many tokens as a query sees at most
        return CacheSpec(spec.num_kv_heads, spec.head_dim, spec.v_head_dim, self.cache_dtype, window, spec.latent)

    # Names that model files know these by.
    layer_id = property(lambda self: self.spec.layer_id)
    tp_q_head_num = property(lambda self: self.spec.num_heads)
    tp_k_head_num = tp_v_head_num = property(lambda self: self.spec.num_kv_heads)
    head_dim = qk_head_dim = property(lambda self: self.spec.head_dim)
    v_head_dim = property(lambda self: self.spec.v_head_dim)
    scaling = property(lambda self: self.spec.scaling)
    logit_cap = property(lambda self: self.spec.logit_cap)
    latent = property(lambda self: self.spec.latent)
    alibi_slopes = property(lambda self: self.spec.alibi_slopes)
    sliding_window_size = property(lambda self: -1 if self.spec.window is None else self.spec.window - 1)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the step's tokens over everything their sequences have in the cache.

        Args:
            q: [T, num_heads * head_dim] or [T, num_heads, head_dim]; k and v likewise with key/value heads, or both
                None where another layer's cache is read. A latent layer takes k and no v.
            save_kv_cache: False: only read the cache.
            sinks: [num_heads], of this rank: a score per head that takes part in the softmax and carries no value
                (GPT-OSS, 2025).

        Returns:
            [T, num_heads * v_head_dim].
        """
        spec = self.spec
        q = q.view(-1, spec.num_heads, spec.head_dim)
        if spec.latent and v is not None:
            raise ValueError("a latent RadixAttention takes its values from the keys: pass None for v")
        if not spec.latent and (k is None) != (v is None):
            raise ValueError("RadixAttention needs both k and v, or neither")
        if sinks is not None and sinks.shape != (spec.num_heads,):
            raise ValueError(f"sinks must be of shape ({spec.num_heads},), one per head, got {tuple(sinks.shape)}")
        if k is not None:
            k = k.view(-1, spec.num_kv_heads, spec.head_dim)
        if v is not None:
            v = v.view(-1, spec.num_kv_heads, spec.v_head_dim)
        if self.media_are_causal and forward_batch.visible_ends is not None:
            forward_batch = replace(forward_batch, visible_ends=None)
        return forward_batch.attn_backend.forward(q, k, v, spec, forward_batch, save_kv_cache, sinks)


def _slopes(slopes: torch.Tensor | Sequence[float], num_heads: int, prefix: str) -> torch.Tensor:
    """Return slopes as [num_heads] float32 on torch's default device, as layers are built."""
    tensor = torch.as_tensor(slopes, dtype=torch.float32, device=torch.get_default_device())
    if tensor.shape != (num_heads,):
        raise ValueError(
            f"{prefix or 'RadixAttention'}: alibi_slopes must be of shape ({num_heads},), one per head of this rank, "
            f"got {tuple(tensor.shape)}"
        )
    return tensor.contiguous()
