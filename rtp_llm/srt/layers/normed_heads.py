"""Norms of query and key heads and their rotation, in one pass over memory where they allow it."""

from typing import TypeGuard

import torch
from torch import nn

from rtp_llm.srt.layers.norm import GemmaRMSNorm, RMSNorm
from rtp_llm.srt.layers.rotary import RotaryEmbedding


def norm_and_rotate(
    q_norm: nn.Module,
    k_norm: nn.Module,
    rotary_emb: nn.Module,
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``rotary_emb(positions, q_norm(q), k_norm(k))``, for q and k of [T, heads, head_size].

    One kernel computes it, with the same roundings, if the norms differ in their weights alone and the rotation is
    RotaryEmbedding's own. While hooks look at one of them, the modules are called.
    """
    if _is_plain(q_norm) and _is_plain(k_norm) and _kind(q_norm) == _kind(k_norm) and _is_own(rotary_emb):
        weights, eps = (q_norm.weight, k_norm.weight), q_norm.variance_epsilon
        cos, sin = rotary_emb.cos_and_sin(positions, q.dtype)
        is_gemma = isinstance(q_norm, GemmaRMSNorm)
        rotated: tuple[torch.Tensor, torch.Tensor] = rotary_emb.norm_and_rotate(
            q, k, weights, eps, cos, sin, rotary_emb.is_neox_style, is_gemma
        )
        return rotated
    rotated = rotary_emb(positions, q_norm(q), k_norm(k))
    return rotated


def _is_plain(norm: nn.Module) -> TypeGuard[RMSNorm]:
    if type(norm) not in (RMSNorm, GemmaRMSNorm) or _is_watched(norm):
        return False
    return isinstance(norm, RMSNorm) and not norm.is_wide and norm.var_hidden_size is None


def _kind(norm: RMSNorm) -> tuple[str, float]:
    return norm.kernel, norm.variance_epsilon


def _is_own(rotary_emb: nn.Module) -> TypeGuard[RotaryEmbedding]:
    return type(rotary_emb).forward is RotaryEmbedding.forward and not _is_watched(rotary_emb)


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
