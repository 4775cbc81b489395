"""Batches for attention back ends, and how far these are from the reference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rtp_llm.srt.attention.backends import make_backend
from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.cache.spec import CacheGroup, CacheSpec
from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.forward_batch import ForwardBatch, ForwardMode
from rtp_llm.srt.kernels import reference as kernels
from rtp_llm.srt.kv_pool import KVPool, slots_of
from rtp_llm.srt.layers.radix_attention import RadixAttention


@dataclass(frozen=True)
class AttentionCase:
    """``rows`` are (tokens in the cache, tokens of this step) of each request."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    page_size: int
    rows: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return (
            f"heads {self.num_heads}/{self.num_kv_heads}x{self.head_dim}, window {self.window}, page {self.page_size}"
        )


def attention_cases() -> Iterator[AttentionCase]:
    decode = ((0, 1), (7, 1), (64, 1), (300, 1))
    mixed = ((0, 33), (5, 1), (40, 16), (200, 57), (129, 1))
    for rows in (decode, mixed):
        yield AttentionCase(8, 2, 64, None, 1, rows)
        yield AttentionCase(6, 6, 40, None, 4, rows)
        yield AttentionCase(4, 1, 128, 16, 1, rows)
        yield AttentionCase(9, 3, 80, 7, 4, rows)


def attention_error(case: AttentionCase, dtype: str, name: str) -> float:
    """The largest absolute difference between the back end of the device of this name and the reference, over a random
    batch."""
    device = provider_named(name).torch_device
    torch_dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    seq_lens = [cached + new for cached, new in case.rows]
    pages = [-(-length // case.page_size) for length in seq_lens]
    spec = CacheSpec(case.num_kv_heads, case.head_dim, case.head_dim, dtype, case.window)
    pool = KVPool([CacheGroup(spec, (0,), case.page_size)], [sum(pages)], name)
    table = random_page_table(pages).to(device)

    scaling = case.head_dim**-0.5
    qs, ks, vs, expected = [], [], [], []
    for row, (cached, new) in enumerate(case.rows):
        q = torch.randn(new, case.num_heads, case.head_dim, device=device).to(torch_dtype)
        k, v = torch.randn(2, cached + new, case.num_kv_heads, case.head_dim, device=device).to(torch_dtype)
        slots = slots_of(table, torch.tensor(row, device=device), torch.arange(cached, device=device), case.page_size)
        pool.write(0, slots, k[:cached], v[:cached])
        expected.append(kernels.attention(q.float(), k.float(), v.float(), scaling, cached, case.window))
        qs.append(q)
        ks.append(k[cached:])
        vs.append(v[cached:])

    layer = RadixAttention(case.num_heads, case.head_dim, scaling, case.num_kv_heads, layer_id=0, window=case.window)
    attention = make_backend(None, name, torch_dtype)
    batch = forward_batch(case.rows, case.page_size, table, pool, device, attention)
    attention.plan(batch)
    output = layer(torch.cat(qs), torch.cat(ks), torch.cat(vs), batch)
    return (output.float() - torch.cat(expected).flatten(1)).abs().max().item()


def random_page_table(pages: list[int]) -> torch.Tensor:
    """[rows, max pages] int32, each page used once, in random order, page 0 by nobody."""
    order = (torch.randperm(sum(pages)) + 1).split(pages)
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    for row, page_ids in enumerate(order):
        table[row, : len(page_ids)] = page_ids
    return table


def forward_batch(
    lens: Sequence[tuple[int, int]],
    page_size: int,
    table: torch.Tensor,
    pool: KVPool,
    device: str,
    attention: AttentionBackend,
) -> ForwardBatch:
    """Return the batch of rows of (tokens in the cache, tokens of this step)."""
    cached, new = [list(column) for column in zip(*lens, strict=True)]
    seq_lens = [a + b for a, b in lens]
    rows = torch.cat([torch.full((n,), row) for row, n in enumerate(new)]).to(device)
    positions = torch.cat([torch.arange(a, a + b) for a, b in lens]).to(device)
    starts = [sum(new[:row]) for row in range(len(new))]

    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=device)

    return ForwardBatch(
        forward_mode=ForwardMode.DECODE if max(new) == 1 else ForwardMode.MIXED,
        batch_size=len(new),
        input_ids=torch.zeros_like(positions),
        positions=positions,
        req_pool_indices=torch.arange(len(new), device=device),
        seq_lens=on_device(seq_lens),
        extend_prefix_lens=on_device(cached),
        extend_seq_lens=on_device(new),
        extend_start_loc=on_device(starts),
        seq_lens_cpu=seq_lens,
        extend_prefix_lens_cpu=cached,
        extend_seq_lens_cpu=new,
        prompt_lens_cpu=seq_lens,
        page_tables=[table],
        out_cache_locs=[slots_of(table, rows, positions, page_size)],
        kv_pool=pool,
        attn_backend=attention,
        sample_rows=on_device([]),
    )
