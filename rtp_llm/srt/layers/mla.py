"""Multi-head latent attention (DeepSeek-V2, 2024), in the form of vLLM's model files.

Each token has one latent c [kv_lora_rank] and one rotated key r [qk_rope_head_dim] for all heads; a head's key is
``(W_UK c, r)`` and its value ``W_UV c``. Only c and r are cached. Keys and values are never made: W_UK is applied to
the query instead, since ``q . W_UK c = (W_UK^T q) . c``, and W_UV to the weighted sum of the latents.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.layers.gated_norm import SigmoidGate
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.utils import add_prefix, cache_number


@dataclass(frozen=True, slots=True)
class MLAModules:
    """The layers of a block with latent attention, each an attribute of the block.

    Queries come from ``q_proj``; or from ``q_b_proj(q_a_layernorm(...))`` of what ``fused_qkv_a_proj`` makes, low-rank
    queries before the latent. The latent comes from that, or from ``kv_a_proj_with_mqa``.

    Attributes:
        g_proj: makes the logits of a gate of the output.
        indexer, is_sparse: attention to chosen tokens only, which is not supported: None and False.
    """

    kv_a_layernorm: nn.Module
    kv_b_proj: nn.Module
    rotary_emb: nn.Module | None
    o_proj: nn.Module
    fused_qkv_a_proj: nn.Module | None = None
    kv_a_proj_with_mqa: nn.Module | None = None
    q_a_layernorm: nn.Module | None = None
    q_b_proj: nn.Module | None = None
    q_proj: nn.Module | None = None
    indexer: nn.Module | None = None
    is_sparse: bool = False
    g_proj: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.indexer is not None or self.is_sparse:
            raise ValueError("attention to chosen tokens (an indexer, is_sparse) is not supported")
        low_rank = (self.fused_qkv_a_proj, self.q_a_layernorm, self.q_b_proj)
        plain = (self.kv_a_proj_with_mqa, self.q_proj)
        if any(layer is None for layer in low_rank) and any(layer is None for layer in plain):
            raise ValueError(
                "latent attention needs kv_a_proj_with_mqa and q_proj, or fused_qkv_a_proj, q_a_layernorm and q_b_proj"
            )


class MultiHeadLatentAttentionWrapper(nn.Module):
    """Latent attention of a block: ``mla_attn(positions, hidden_states, forward_batch)``.

    Args:
        hidden_size: part of the call shape that model files share, not needed here.
        num_heads: of this rank.
        scale: factor of the scores.
        q_lora_rank: of the queries; None: they come from ``q_proj``.
        mla_modules: the block's layers; they are called here, and not registered a second time.
        prefix: the block's name, which has the layer's index as a number.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        scale: float,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        mla_modules: MLAModules,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.nope_dim, self.rope_dim, self.v_head_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.q_lora_rank, self.latent_dim = q_lora_rank, kv_lora_rank
        self.layers = mla_modules
        self.gate_output = SigmoidGate()
        self.attn = RadixAttention(
            num_heads,
            kv_lora_rank + qk_rope_head_dim,
            scale,
            num_kv_heads=1,
            layer_id=cache_number(prefix),
            v_head_dim=kv_lora_rank,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
            latent=True,
        )

    def finish_load(self) -> None:
        """Split kv_b_proj into w_uk [heads, qk_nope_head_dim, kv_lora_rank], w_uv [heads, kv_lora_rank, v_head_dim]."""
        kv_b_proj: Any = self.layers.kv_b_proj
        by_head = kv_b_proj.dequantized_weight().unflatten(0, (self.num_heads, self.nope_dim + self.v_head_dim))
        self.w_uk, w_uv = by_head.split([self.nope_dim, self.v_head_dim], dim=1)
        self.w_uv = w_uv.transpose(1, 2)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: ForwardBatch,
        llama_4_scaling: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]; ``llama_4_scaling``: a factor of queries, of [T, 1, 1]."""
        q, latent, k_rope = self._project(hidden_states)
        q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], dim=-1)
        if self.layers.rotary_emb is not None:
            q_rope, k_rope = self.layers.rotary_emb(positions, q_rope, k_rope)
        q = torch.cat((apply_by_head(q_nope, self.w_uk), q_rope), dim=-1)
        if llama_4_scaling is not None:
            q = q * llama_4_scaling
        k = torch.cat((latent, k_rope), dim=-1)
        attended = self.attn(q, k, None, forward_batch).unflatten(-1, (self.num_heads, self.latent_dim))
        output = apply_by_head(attended, self.w_uv).flatten(1)
        if self.layers.g_proj is not None:
            output = self.gate_output(output, _output_of(self.layers.g_proj(hidden_states)))
        return _output_of(self.layers.o_proj(output))

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, hidden_size] -> queries [T, heads, head_dim], normed latents and keys to rotate, [T, 1, ...] both."""
        layers: Any = self.layers
        if self.q_lora_rank is None:
            q = _output_of(layers.q_proj(hidden_states))
            latent_and_key = _output_of(layers.kv_a_proj_with_mqa(hidden_states))
        else:
            low_rank = _output_of(layers.fused_qkv_a_proj(hidden_states))
            low_q, latent_and_key = low_rank.split([self.q_lora_rank, self.latent_dim + self.rope_dim], dim=-1)
            q = _output_of(layers.q_b_proj(layers.q_a_layernorm(low_q)))
        latent, k_rope = latent_and_key[:, None].split([self.latent_dim, self.rope_dim], dim=-1)
        return q.unflatten(-1, (self.num_heads, -1)), layers.kv_a_layernorm(latent), k_rope


def apply_by_head(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[T, heads, n] and one matrix per head [heads, n, m] -> [T, heads, m]."""
    return torch.bmm(x.transpose(0, 1), weights).transpose(0, 1)


def _output_of(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result
