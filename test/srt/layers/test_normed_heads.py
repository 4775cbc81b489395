"""Norms of heads and their rotation in one kernel: equal to the modules, one after the other, in every case."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rtp_llm.srt.layers.norm import GemmaRMSNorm, LayerNorm, Norm, RMSNorm
from rtp_llm.srt.layers.normed_heads import norm_and_rotate
from rtp_llm.srt.layers.rotary import RotaryEmbedding, get_rope
from rtp_llm.srt.models.building import built_as

HEAD = 16


def modules(first: type[Norm], second: type[Norm], eps: float = 1e-6) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    norms = first(HEAD, 1e-6), second(HEAD, eps)
    for norm in norms:
        norm.weight.data.normal_()
    return *norms, get_rope(HEAD, HEAD, 64, 10000.0)


def compared(q_norm: nn.Module, k_norm: nn.Module, rotary_emb: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    """Compare with the modules' own results; return how often the one kernel was called."""
    calls = []
    kernel = rotary_emb.norm_and_rotate
    monkeypatch.setattr(rotary_emb, "norm_and_rotate", lambda *args: calls.append(1) or kernel(*args))
    for dtype in (torch.float32, torch.bfloat16):
        q, k = torch.randn(5, 3, HEAD).to(dtype), torch.randn(5, 2, HEAD).to(dtype)
        if dtype != torch.float32:
            q_norm, k_norm = q_norm.to(dtype), k_norm.to(dtype)
        positions = torch.arange(5)
        expected = rotary_emb(positions, q_norm(q), k_norm(k))
        result = norm_and_rotate(q_norm, k_norm, rotary_emb, positions, q, k)
        torch.testing.assert_close(result, expected)
    return len(calls)


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("kind", [RMSNorm, GemmaRMSNorm])
def test_alike_norms(device: str, kind: type[Norm], monkeypatch: pytest.MonkeyPatch) -> None:
    with built_as("float32", device), torch.no_grad():
        assert compared(*modules(kind, kind), monkeypatch) == 2


@pytest.mark.parametrize("case", [(RMSNorm, GemmaRMSNorm), (LayerNorm, LayerNorm), (RMSNorm, RMSNorm, 1e-5)])
def test_other_norms(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    with built_as("float32", "cpu"), torch.no_grad():
        assert compared(*modules(*case), monkeypatch) == 0


def test_hooks_and_own_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(RotaryEmbedding):
        def forward(self, positions, q, k):
            return super().forward(positions, q, k)

    with built_as("float32", "cpu"), torch.no_grad():
        q_norm, k_norm, rotary_emb = modules(RMSNorm, RMSNorm)
        handle = k_norm.register_forward_hook(lambda module, args, output: None)
        assert compared(q_norm, k_norm, rotary_emb, monkeypatch) == 0
        handle.remove()
        spec = SimpleNamespace(head_size=HEAD, is_neox_style=True, dtype=torch.float32)
        assert compared(*modules(RMSNorm, RMSNorm)[:2], Own(spec, rotary_emb.inv_freq), monkeypatch) == 0
