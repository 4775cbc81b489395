"""Paged attention in Triton's interpreter against plain torch, and compiled."""

import random
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch

from closeness import check_close
from rtp_llm.srt.devices.cuda import attention_rows
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kernels.paged import PagedRows
from triton_compile import check_compiled, launches_of
from triton_process import compiled, interpreted


def paged(
    q: torch.Tensor,
    cache: Any,
    rows: PagedRows,
    scores: Any,
    visible_ends: torch.Tensor | None,
    latent: bool,
    new: attention_rows.NewTokens | None,
) -> torch.Tensor:
    """``reference.paged_attention`` by the launchers: rows of one token decode, the others extend."""
    launch = import_module("rtp_llm.srt.devices.cuda.kernels.attention_launch")

    out = torch.full((len(q), q.shape[1], cache.values.shape[2]), torch.nan, dtype=q.dtype)
    counts = rows.counts.long()
    columns = rows.table_rows.long(), rows.starts.long(), counts.cumsum(0) - counts
    single, several = (counts == 1).nonzero()[:, 0], (counts > 1).nonzero()[:, 0]
    shared = None
    if len(rows.shared) and scores.window is None and scores.chunk is None:
        assert not len(several)
        entries, members, own_starts = attention_rows.shared_levels(rows)
        entries.append([0, 0, 0, 0, 0])
        shared = attention_rows.SharedRows(
            *(torch.tensor(x, dtype=torch.int32) for x in (entries, members, own_starts))
        )
    launch.decode(q, out, cache, attention_rows.DecodeRows(*(x[single] for x in columns)), scores, shared, latent, new)
    table_rows, starts, tokens = (x[several] for x in columns)
    extending = attention_rows.ExtendRows(table_rows, starts, counts[several], tokens, tuple(counts[several].tolist()))
    blocks = extending.blocks(launch.tokens_of_block(q, cache.keys.shape[1]))
    launch.extend(q, out, cache, extending, blocks, scores, visible_ends, latent)
    return out


def check(
    starts: list[int],
    counts: list[int],
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    page_size: int = 4,
    latent: bool = False,
    sinks: bool = False,
    slopes: bool = False,
    ahead: bool = False,
    fresh: bool = False,
    shared: list[tuple[int, list[int]]] | None = None,
    **options: Any,
) -> None:
    """Compare on random numbers in random pages; ``fresh``: rows are of one token, whose keys are not there yet."""
    num_rows, longest = len(starts), max(s + c for s, c in zip(starts, counts, strict=True))
    pages = -(-longest // page_size)
    ids = torch.randperm(num_rows * pages) + 1
    table = ids.view(num_rows, pages).int()
    for end, members in shared or []:
        table[members, : end // page_size] = table[members[0], : end // page_size]
    num_slots = (num_rows * pages + 1) * page_size
    stored = stored or dtype
    keys, values, *scales = torch.randn(num_slots, heads[1], sizes[0]), torch.randn(num_slots, heads[1], sizes[1])
    if stored == torch.int8:
        keys, values = (x.mul(40).clamp(-127, 127).to(torch.int8) for x in (keys, values))
        scales = [torch.rand(num_slots, heads[1]) / 30 for _ in "kv"]
    keys, values = keys.to(stored), values.to(stored)
    if latent:
        values = keys[..., : sizes[1]]
    order = torch.randperm(num_rows)
    rows = PagedRows.of(order.tolist(), starts, counts, [])
    tables = torch.empty_like(table)
    tables[order] = table
    q = torch.randn(sum(counts), heads[0], sizes[0]).to(dtype)
    visible_ends = None
    if ahead:
        places = [(s, s + c) for s, c in zip(starts, counts, strict=True)]
        visible_ends = torch.tensor([random.choice([0, p + 3, e]) for s, e in places for p in range(s, e)])
        visible_ends = visible_ends.minimum(torch.tensor([e for s, e in places for _ in range(s, e)]))
    scores = attention_rows.Scores(
        sizes[0] ** -0.5,
        sinks=torch.randn(heads[0]) if sinks else None,
        alibi_slopes=torch.rand(heads[0]) if slopes else None,
        **options,
    )
    new, written = None, (keys, values, *scales)
    if fresh:
        positions = torch.tensor(starts)
        slots = table[torch.arange(num_rows), positions // page_size].long() * page_size + positions % page_size
        k, v = (torch.randn(num_rows, heads[1], size + 5)[..., 2:-3].to(dtype) for size in sizes)
        new = attention_rows.NewTokens(k, None if latent else v, slots)
        written = tuple(x.clone() for x in (keys, values, *scales))
        keys, values, *scales = (x.clone() for x in written)
        if latent:
            values, written = keys[..., : sizes[1]], (written[0], written[0][..., : sizes[1]])
        reference.write_kv(k, new.v, keys, values, slots, *scales)
    expected = reference.paged_attention(
        q, keys, values, tables, page_size, rows, scores.scaling, scores.window, scores.logit_cap, scores.sinks,
        visible_ends, *(scales or (None, None)), scores.alibi_slopes, scores.chunk,
    )  # fmt: skip
    if shared:
        rows = PagedRows.of(order.tolist(), starts, counts, shared)
    cache = attention_rows.PagedCache(*written[:2], tables, page_size, *written[2:])
    check_close(paged(q, cache, rows, scores, visible_ends, latent, new), expected, float32=2e-5, float16=4e-3)
    for ours, theirs in zip(written, (keys, values, *scales), strict=True):
        check_close(ours, theirs, float32=1e-6)


MIXED = {"starts": [0, 7, 0, 65, 3, 129], "counts": [1, 1, 5, 1, 40, 3]}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float16": {"dtype": torch.float16, "heads": (6, 2)},
    "int8": {"stored": torch.int8},
    "window": {"window": 5, "page_size": 1},
    "chunk": {"chunk": 8},
    "cap": {"logit_cap": 2.0, "sinks": True},
    "slopes": {"slopes": True, "heads": (5, 1)},
    "ahead": {"ahead": True},
    "ahead-window": {"ahead": True, "window": 4},
    "odd-sizes": {"sizes": (72, 40), "heads": (3, 3)},
    "latent": {"sizes": (48, 32), "heads": (20, 1), "latent": True},
    "latent-odd": {"sizes": (48, 24), "heads": (2, 1), "latent": True},
}


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_steps_of_all_kinds_of_rows(form: str) -> None:
    check(**MIXED, **FORMS[form])


@interpreted
@pytest.mark.parametrize("form", ["plain", "cap", "slopes", "latent", "int8", "window"])
def test_shared_prefixes_are_read_once(form: str) -> None:
    """Two levels of prefixes, a third that each row reads by itself, and rows that share nothing."""
    shared = [(64, [0, 1, 3, 4, 5]), (72, [0, 3]), (80, [3, 4])]
    check([70, 90, 9, 200, 80, 64], [1] * 6, shared=[*shared[:1], (72, [1, 3]), (80, [1, 3])], **FORMS[form])


@interpreted
@pytest.mark.parametrize("form", ["plain", "float16", "int8", "window", "odd-sizes", "latent", "latent-odd"])
def test_decoding_rows_write_their_keys_and_values(form: str) -> None:
    check([0, 7, 64, 3, 129], [1] * 5, fresh=True, **FORMS[form])


@interpreted
def test_splits_without_keys_are_left_out() -> None:
    """One row is short, and the other makes a launch of many splits."""
    check([0, 2100], [1, 1], heads=(2, 1), sinks=True)


def bfloat16_step(heads: tuple[int, int], sizes: tuple[int, int], num_rows: int, **options: Any) -> None:
    """Launch everything for a cache of 16 bits, rows of 32,768 tokens at most."""
    launch = import_module("rtp_llm.srt.devices.cuda.kernels.attention_launch")

    latent = options.pop("latent", False)
    dtype, stored = options.pop("dtype", torch.bfloat16), options.pop("stored", None)
    keys = torch.zeros(64, heads[1], sizes[0], dtype=stored or dtype)
    values = keys[..., : sizes[1]] if latent else torch.zeros(64, heads[1], sizes[1], dtype=stored or dtype)
    scales = [torch.zeros(64, heads[1]) for _ in "kv"] if stored == torch.int8 else []
    table = torch.zeros(256, 32768 // 16, dtype=torch.int32)
    cache = attention_rows.PagedCache(keys, values, table, 16, *scales)
    q = torch.zeros(num_rows, heads[0], sizes[0], dtype=dtype)
    out = torch.zeros(num_rows, heads[0], sizes[1], dtype=dtype)
    scores = attention_rows.Scores(0.1, **options)
    column = torch.zeros(num_rows, dtype=torch.int64)
    rows = attention_rows.DecodeRows(column, column, column)
    shared = attention_rows.SharedRows(torch.zeros(2, 5, dtype=torch.int32), column.int(), column.int())
    k, v = (torch.zeros(num_rows, heads[1], size, dtype=dtype) for size in sizes)
    new = attention_rows.NewTokens(k, None if latent else v, column)
    launch.decode(q, out, cache, rows, scores, None, latent)  # beside prompts
    launch.decode(q, out, cache, rows, scores, None, latent, new)
    launch.decode(q, out, cache, rows, scores, shared, latent, new)
    extending = attention_rows.ExtendRows(column, column, column, column, (300,) * num_rows)
    blocks = extending.blocks(launch.tokens_of_block(q, heads[1]))
    launch.extend(q, out, cache, extending, blocks, scores, None, latent)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama": {"heads": (32, 8), "sizes": (128, 128)},
    "qwen-0.6b": {"heads": (16, 8), "sizes": (128, 128), "window": 512},
    "small-heads": {"heads": (14, 2), "sizes": (64, 64)},
    "gemma-2": {"heads": (16, 8), "sizes": (256, 256), "logit_cap": 50.0},
    "phi": {"heads": (32, 32), "sizes": (96, 96)},
    "latent": {"heads": (128, 1), "sizes": (576, 512), "latent": True},
    "latent-16": {"heads": (16, 1), "sizes": (576, 512), "latent": True},
    "int8": {"heads": (32, 8), "sizes": (128, 128), "stored": torch.int8},
    "float32": {"heads": (32, 8), "sizes": (128, 128), "dtype": torch.float32},
    "float16": {"heads": (32, 8), "sizes": (128, 128), "dtype": torch.float16},
}


def instruction(launch: Any, capability: int) -> str | None:
    """What a kernel must use: the tensor cores, by warp groups where tiles are large enough."""
    constants = dict(launch.constants)
    if launch.kernel.fn.__name__ == "merge_kernel" or capability == 100:
        return None
    is_large = capability == 90 and constants["BLOCK_M"] >= 64
    return "wgmma" if is_large and constants["PRECISION"] == "tf32" else "mma.sync"


@compiled
def test_attention_of_a_llama_compiles() -> None:
    launches = launches_of(lambda: bfloat16_step(num_rows=64, **CONFIGURATIONS["llama"]))
    hot = {launch.kernel.fn.__name__: launch for launch in launches}
    check_compiled(hot["decode_kernel"], 90, "mma.sync")
    check_compiled(hot["extend_kernel"], 90, "wgmma")


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_attention_compiles(name: str, capability: int) -> None:
    launch = import_module("rtp_llm.srt.devices.cuda.kernels.attention_launch")
    with patch.object(launch, "generation", lambda: capability // 10):
        launches = launches_of(lambda: [bfloat16_step(num_rows=rows, **CONFIGURATIONS[name]) for rows in (2, 64)])
    assert len(launches) > 4
    for launch in launches:
        check_compiled(launch, capability, instruction(launch, capability))
