"""Attention of encoders: each token sees its whole row, or a window on both sides; nothing is cached."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rtp_llm.srt.attention.encoder import attend_both_ways
from rtp_llm.srt.attention.torch import TorchAttention
from rtp_llm.srt.devices.cpu.backend import CpuAttention
from rtp_llm.srt.forward_batch import AttentionSpec

LENGTHS = [5, 1, 33, 5, 130]


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """Row by row, in float64."""
    rows, start = [], 0
    for length in LENGTHS:
        mine = slice(start, start + length)
        heads = [x[mine].double().transpose(0, 1) for x in (q, k, v)]
        keys, values = (x.repeat_interleave(spec.num_heads // spec.num_kv_heads, 0) for x in heads[1:])
        scores = heads[0] @ keys.transpose(1, 2) * spec.scaling
        if spec.logit_cap:
            scores = spec.logit_cap * torch.tanh(scores / spec.logit_cap)
        places = torch.arange(length)
        if spec.window is not None:
            scores = scores.masked_fill((places[:, None] - places).abs() >= spec.window, float("-inf"))
        rows.append((scores.softmax(-1) @ values).transpose(0, 1))
        start += length
    return torch.cat(rows).flatten(1).float()


@pytest.mark.parametrize("backend", [TorchAttention, CpuAttention])
@pytest.mark.parametrize(("window", "cap", "kv_heads"), [(None, 0.0, 6), (None, 3.0, 2), (4, 0.0, 3), (40, 2.0, 6)])
def test_rows_of_all_lengths(backend: type, window: int | None, cap: float, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(sum(LENGTHS), heads, 20, generator=generator) for heads in (6, kv_heads, kv_heads))
    spec = AttentionSpec(0, 6, kv_heads, 20, 20, 0.3, logit_cap=cap, window=window)
    counts = torch.tensor(LENGTHS)
    batch: Any = SimpleNamespace(
        extend_seq_lens=counts,
        extend_seq_lens_cpu=LENGTHS,
        extend_start_loc=counts.cumsum(0) - counts,
        extend_prefix_lens_cpu=[0] * len(LENGTHS),
        req_pool_indices=torch.arange(len(LENGTHS)),
        shared_prefixes=[],
    )
    attention = backend()
    attention.plan(batch)
    for _ in range(2):  # the second layer finds what the first has prepared
        out = attention.forward_encoder(q, k, v, spec, batch)
        torch.testing.assert_close(out, expected(q, k, v, spec), atol=2e-6, rtol=1e-5)


def test_keys_are_read_where_a_fused_projection_left_them() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(sum(LENGTHS), 3 * 4 * 8, generator=generator).chunk(3, dim=-1)
    heads = [x.unflatten(1, (4, 8)) for x in (q, k, v)]
    spec = AttentionSpec(0, 4, 4, 8, 8, 0.5)
    torch.testing.assert_close(attend_both_ways(*heads, spec, LENGTHS), expected(*heads, spec), atol=2e-6, rtol=1e-5)
