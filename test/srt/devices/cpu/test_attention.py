"""Attention over a paged cache, and its writing: every instruction set against plain torch, on random shapes."""

import random
from dataclasses import dataclass, field

import pytest
import torch

from rtp_llm.srt.devices.cpu import attention, build
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kernels.paged import PagedRows

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
pytestmark = needs_compiler

KINDS = [(activations, stored) for activations, several in attention.STORED.items() for stored in several]
CACHED = [0, 1, 5, 31, 63, 200, 700]
NEW = [1, 1, 1, 2, 9, 70]
FUNCTIONS = [attention._kernel]


@dataclass
class Problem:
    """Rows over a cache whose pages lie anywhere; the arguments of ``paged_attention``."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    page_table: torch.Tensor
    page_size: int
    rows: PagedRows
    scaling: float
    window: int | None = None
    logit_cap: float = 0.0
    sinks: torch.Tensor | None = None
    visible_ends: torch.Tensor | None = None
    scales: list[torch.Tensor | None] = field(default_factory=lambda: [None, None])
    alibi_slopes: torch.Tensor | None = None
    chunk: int | None = None

    @property
    def arguments(self) -> tuple:
        return (
            self.q, self.keys, self.values, self.page_table, self.page_size, self.rows, self.scaling, self.window,
            self.logit_cap, self.sinks, self.visible_ends, *self.scales, self.alibi_slopes, self.chunk,
        )  # fmt: skip

    def expected(self) -> torch.Tensor:
        """In float32."""
        return reference.paged_attention(self.q.float(), *self.arguments[1:])


def make_problem(
    rng: random.Random,
    activations: torch.dtype,
    stored: torch.dtype,
    cached: list[int],
    new: list[int],
    heads: tuple[int, int],  # per key head, key heads
    sizes: tuple[int, int],
    page_size: int = 1,
) -> Problem:
    (group, num_kv_heads), (head_dim, v_head_dim) = heads, sizes
    pages = [-(-(a + b) // page_size) for a, b in zip(cached, new, strict=True)]
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    for row, page_ids in enumerate((torch.randperm(sum(pages)) + 1).split(pages)):
        table[row, : len(page_ids)] = page_ids
    num_slots = (sum(pages) + 1) * page_size
    k, v = torch.randn(num_slots, num_kv_heads, head_dim), torch.randn(num_slots, num_kv_heads, v_head_dim)
    scales: list[torch.Tensor | None] = [None, None]
    if stored == torch.int8:
        keys, values = torch.empty(k.shape, dtype=stored), torch.empty(v.shape, dtype=stored)
        scales = [torch.empty(num_slots, num_kv_heads), torch.empty(num_slots, num_kv_heads)]
        reference.write_kv(k, v, keys, values, torch.arange(num_slots), *scales)
    elif rng.random() < 0.2 and v_head_dim <= head_dim:  # latent
        keys = k.to(stored)
        values = keys[..., :v_head_dim]
    else:
        keys, values = k.to(stored), v.to(stored)
    size = group * num_kv_heads * head_dim
    q = torch.randn(sum(new), size + 5).to(activations)[:, :size].view(sum(new), group * num_kv_heads, head_dim)
    rows = PagedRows.of(range(len(new)), cached, new)
    return Problem(q, keys, values, table, page_size, rows, head_dim**-0.5, scales=scales)


def random_problem(rng: random.Random, activations: torch.dtype, stored: torch.dtype) -> Problem:
    num_rows = rng.randrange(1, 5)
    cached, new = [rng.choice(CACHED) for _ in range(num_rows)], [rng.choice(NEW) for _ in range(num_rows)]
    head_dim = rng.choice([5, 16, 64, 80, 128])
    problem = make_problem(
        rng, activations, stored, cached, new,
        (rng.choice([1, 2, 3, 4, 7, 12]), rng.choice([1, 2, 3])),
        (head_dim, rng.choice([head_dim, 16, 24])), rng.choice([1, 4, 16]),
    )  # fmt: skip
    problem.window = rng.choice([None, None, 1, 7, 40])
    problem.chunk = rng.choice([None, 1, 6, 33, 4000]) if problem.window is None else None
    problem.logit_cap = rng.choice([0.0, 0.0, 1.5])
    problem.sinks = rng.choice([None, torch.randn(problem.q.shape[1])])
    problem.alibi_slopes = rng.choice([None, torch.rand(problem.q.shape[1]).square()])
    if rng.random() < 0.3:
        problem.visible_ends = blocks(cached, new)
    return problem


def blocks(cached: list[int], new: list[int]) -> torch.Tensor:
    """[T]: in rows of more than four tokens, tokens 1 to 4 see one another."""
    ends = torch.zeros(sum(new), dtype=torch.int64)
    first = 0
    for start, count in zip(cached, new, strict=True):
        if count > 4:
            ends[first + 1 : first + 5] = start + 5
        first += count
    return ends


def assert_right(output: torch.Tensor, problem: Problem) -> None:
    expected = problem.expected()
    assert output.dtype == problem.q.dtype
    if output.dtype == torch.float32:
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        return
    # Weights are rounded to bfloat16 before they meet the values, as the result is after it.
    error, size = (output.float() - expected).abs(), expected.abs().max()
    assert error.max() <= 2**-7 * size, f"off by {error.max():.2g} of {size:.2g}"
    assert error.mean() <= 2**-9 * size


@pytest.mark.parametrize(("activations", "stored"), KINDS)
def test_random_rows(isa: str, activations: torch.dtype, stored: torch.dtype) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(15):
        problem = random_problem(rng, activations, stored)
        assert_right(attention.paged_attention(*problem.arguments), problem)


@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
def test_latents_as_large_as_deepseeks(isa: str, activations: torch.dtype) -> None:
    problem = make_problem(random.Random(), activations, activations, [300, 40, 0], [1, 1, 5], (16, 1), (576, 512))
    problem.values = problem.keys[..., :512]
    assert_right(attention.paged_attention(*problem.arguments), problem)


@pytest.mark.parametrize("group", [1, 2, 12, 130])
def test_more_heads_than_a_tile_and_longer_than_a_split(isa: str, group: int) -> None:
    problem = make_problem(random.Random(), torch.float32, torch.float32, [1500, 3], [1, 1], (group, 1), (16, 16))
    assert_right(attention.paged_attention(*problem.arguments), problem)


@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [2, 12])
def test_a_row_does_not_depend_on_the_others(activations: torch.dtype, group: int) -> None:
    problem = make_problem(
        random.Random(), activations, activations, [900, 0, 64, 299], [1, 40, 1, 9], (group, 2), (32, 32)
    )
    together = attention.paged_attention(*problem.arguments)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(attention.paged_attention(*problem.arguments), together)
    finally:
        torch.set_num_threads(threads)
    rows, first = problem.rows, 0
    for row, count in enumerate(rows.counts.tolist()):
        one = slice(row, row + 1)
        problem.rows = PagedRows(rows.table_rows[one], rows.starts[one], rows.counts[one])
        tokens = slice(first, first + count)
        alone = attention.paged_attention(problem.q[tokens], *problem.arguments[1:])
        assert torch.equal(alone, together[tokens])
        first += count


@pytest.mark.parametrize("new", [1, 20])
@pytest.mark.parametrize("group", [1, 12])
@pytest.mark.parametrize("where", ["q", "keys", "values"])
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_none(isa: str, activations: torch.dtype, where: str, group: int, new: int) -> None:
    problem = make_problem(random.Random(), activations, activations, [300, 300], [new, new], (group, 1), (32, 32))
    problem.values = problem.values.clone()
    broken = getattr(problem, where)
    broken[0 if where == "q" else problem.page_table[0, 100], 0, 3] = torch.nan
    output = attention.paged_attention(*problem.arguments)
    assert output[0].isnan().any() and not output[new:].isnan().any()


@pytest.mark.parametrize(("activations", "stored"), KINDS)
@pytest.mark.parametrize("latent", [False, True])
def test_writing(isa: str, activations: torch.dtype, stored: torch.dtype, latent: bool) -> None:
    if latent and stored == torch.int8:
        pytest.skip("values within keys have no scales of their own")
    qkv = torch.randn(9, 2, 60).to(activations)
    qkv[3] = 0
    k, v = qkv[..., :33], None if latent else qkv[..., 33:50]
    slots = torch.randperm(20)[:9]
    made = []
    for write in (reference.write_kv, attention.write_kv):
        keys = torch.zeros(20, 2, 33, dtype=stored)
        values = keys[..., :17] if latent else torch.zeros(20, 2, 17, dtype=stored)
        scales = [torch.zeros(20, 2), torch.zeros(20, 2)] if stored == torch.int8 else [None, None]
        write(k, v, keys, values, slots, *scales)
        made.append([x for x in (keys, values, *scales) if x is not None])
    for ours, theirs in zip(made[1], made[0], strict=True):
        if stored == torch.int8 and ours.dtype == torch.int8:
            assert (ours.int() - theirs.int()).abs().max() <= 1  # where a quotient lies between two
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_int8_keeps_what_is_no_number(isa: str) -> None:
    k = torch.randn(3, 2, 8)
    k[1, 1, 5] = torch.nan
    keys, scales = torch.zeros(4, 2, 8, dtype=torch.int8), torch.zeros(4, 2)
    attention.write_kv(k, k, keys, keys.clone(), torch.arange(3), scales, scales.clone())
    assert scales.isnan().sum() == 1 and scales[1, 1].isnan()


def test_refusals() -> None:
    problem = make_problem(random.Random(), torch.bfloat16, torch.bfloat16, [3], [1], (1, 1), (8, 8))
    with pytest.raises(ValueError, match=r"a cache of torch\.float32 for queries of torch\.bfloat16"):
        attention.paged_attention(problem.q, problem.keys.float(), problem.values.float(), *problem.arguments[3:])
    with pytest.raises(ValueError, match=r"keys of torch\.bfloat16, values of torch\.float32"):
        attention.paged_attention(problem.q, problem.keys, problem.values.float(), *problem.arguments[3:])
    with pytest.raises(ValueError, match="an int8 cache has scales"):
        attention.paged_attention(problem.q, problem.keys.char(), problem.values.char(), *problem.arguments[3:])


def shared_problem(
    rng: random.Random, activations: torch.dtype, stored: torch.dtype, group: int, window: int | None = None
) -> Problem:
    """Rows 0 to 4 share 150 tokens, 1 and 2 of them 100 more; row 5 shares nothing, row 6 computes several tokens."""
    cached, new = [150, 260, 700, 180, 151, 300, 200], [1, 1, 1, 1, 1, 1, 5]
    page_size = rng.choice([1, 5])
    problem = make_problem(rng, activations, stored, cached, new, (group, 2), (32, 48), page_size)
    table = problem.page_table
    table[1:5, : 150 // page_size] = table[0, : 150 // page_size]
    table[2, : 250 // page_size] = table[1, : 250 // page_size]
    shared = [(150, [0, 1, 2, 3, 4]), (250, [1, 2])]
    problem.rows = PagedRows.of(range(len(new)), cached, new, shared)
    problem.window = window
    problem.sinks = rng.choice([None, torch.randn(2 * group)])
    problem.alibi_slopes = rng.choice([None, torch.rand(2 * group).square()])
    problem.logit_cap = rng.choice([0.0, 1.5])
    return problem


@pytest.mark.parametrize("window", [None, 1000, 290, 20], ids=["full", "whole", "one is cut", "all are cut"])
@pytest.mark.parametrize("group", [1, 3, 12, 100])
@pytest.mark.parametrize(("activations", "stored"), KINDS)
def test_shared_prefixes(
    isa: str, activations: torch.dtype, stored: torch.dtype, group: int, window: int | None
) -> None:
    problem = shared_problem(random.Random(), activations, stored, group, window)
    output = attention.paged_attention(*problem.arguments)
    assert_right(output, problem)
    rows = problem.rows
    problem.rows = PagedRows(rows.table_rows, rows.starts, rows.counts)
    alone = attention.paged_attention(*problem.arguments)
    assert torch.equal(alone[5:], output[5:])  # rows that share nothing do not notice
    if window == 20:
        assert torch.equal(alone, output)


def test_what_is_shared_is_read_from_one_row() -> None:
    problem = shared_problem(random.Random(), torch.float32, torch.float32, 3)
    expected = attention.paged_attention(*problem.arguments)
    first_page = 10 if problem.page_size == 1 else 2
    problem.page_table[2:5, first_page] = problem.page_table[6, 0]
    assert torch.equal(attention.paged_attention(*problem.arguments), expected)
