"""The back ends over pages: caps, sinks, slopes, windows, values of another size, latents; all rows in one step."""

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from rtp_llm import Engine
from rtp_llm.srt.attention.backends import make_backend
from rtp_llm.srt.cache.spec import CacheGroup, CacheSpec
from rtp_llm.srt.device.registry import ATTENTION_BACKENDS
from rtp_llm.srt.devices.cpu.build import kernels_work
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.forward_batch import ForwardBatch, ForwardMode
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kv_pool import KVPool, slots_of
from rtp_llm.srt.layers.alibi import alibi_slopes, all_alibi_slopes
from rtp_llm.srt.layers.linear import QKVParallelLinear
from rtp_llm.srt.layers.radix_attention import RadixAttention
from tiny_models import TINY_MODELS, assert_same_ids, random_prompts, tiny_model
from tiny_models import reference as reference_answer

ROWS = [(0, 9), (5, 1), (11, 6), (30, 1), (0, 1), (14, 1), (170, 3), (201, 1)]  # (tokens in the cache, of the step)
# Blocks of each row's step that see themselves wholly, beginning and ending with it or not; alone, they are causal.
BLOCKS = [[(0, 5), (7, 9)], [(0, 1)], [(1, 4)], [], [(0, 1)], [], [(0, 3)], []]

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "attention_backend"
SCORES_PER_PIECE = "rtp_llm.srt.attention.torch.SCORES_PER_PIECE"
# Names, and constants of a back end's module that are set, so that rows are cut into pieces in several ways.
BACKENDS = [
    ("torch_native", {}),
    ("torch_native", {SCORES_PER_PIECE: 200}),
    ("torch_native", {SCORES_PER_PIECE: 1}),
    pytest.param("cpu", {}, marks=pytest.mark.skipif(not kernels_work(), reason="there is no C++ compiler")),
    ("row_by_row", {}),
]


@pytest.fixture(autouse=True)
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented example of a back end, which registers itself when it is imported."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setattr(ATTENTION_BACKENDS, "added", {"row_by_row": "row_by_row:RowByRow"})


@dataclass
class Case:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    page_size: int = 1
    window: int | None = None
    has_sinks: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # more of the layer's


CASES = {
    "plain": Case(6, 2, 5, 5, page_size=4),
    "values of another size": Case(4, 2, 7, 3),
    "one key head, wider values": Case(5, 1, 3, 8, page_size=2),
    "cap": Case(6, 2, 5, 5, options={"logit_cap": 1.5}),
    "cap, window": Case(4, 4, 6, 6, page_size=4, window=7, options={"logit_cap": 1.5}),
    "sinks": Case(6, 2, 5, 5, has_sinks=True),
    "sinks, window, one key head": Case(4, 1, 6, 6, page_size=4, window=7, has_sinks=True),
    "sinks, cap, values of another size": Case(4, 2, 6, 3, has_sinks=True, options={"logit_cap": 2.0}),
    "window of one": Case(3, 3, 4, 4, window=1),
    "chunks": Case(6, 2, 5, 5, page_size=4, options={"attention_chunk_size": 7}),
    "chunks, sinks, cap": Case(4, 1, 6, 6, has_sinks=True, options={"attention_chunk_size": 32, "logit_cap": 1.5}),
    "slopes": Case(6, 2, 5, 5, page_size=4, options={"alibi_slopes": [0.5, 0.25, 1.0, 0.02, 0.0, 0.125]}),
    "slopes, window, narrow values": Case(4, 4, 6, 3, window=7, options={"alibi_slopes": [1.5, 0.1, 0.0, 0.3]}),
    "slopes, cap, sinks": Case(3, 1, 6, 6, 4, None, True, options={"logit_cap": 1.5, "alibi_slopes": [0.3, 0.01, 1.0]}),
    "latent": Case(6, 1, 10, 7, options={"latent": True}),
    "latent, pages, window": Case(3, 1, 9, 4, page_size=4, window=7, options={"latent": True}),
    "latent, slopes": Case(3, 1, 9, 4, options={"latent": True, "alibi_slopes": [0.3, 0.01, 1.0]}),
    "latent, cap": Case(3, 1, 9, 4, options={"latent": True, "logit_cap": 2.0}),
    "latent, two key heads": Case(4, 2, 6, 6, options={"latent": True}),
}


def make_layer(case: Case) -> RadixAttention:
    return RadixAttention(
        case.num_heads,
        case.head_dim,
        0.37,
        case.num_kv_heads,
        layer_id=0,
        v_head_dim=case.v_head_dim,
        window=case.window,
        **case.options,
    )


def make_batch(
    case: Case, pool: KVPool, table: torch.Tensor, backend: str, visible_ends: torch.Tensor | None
) -> ForwardBatch:
    attention = make_backend(backend)
    cached, new = [list(lens) for lens in zip(*ROWS, strict=True)]
    seq_lens = [a + b for a, b in ROWS]
    rows = torch.arange(len(ROWS)).repeat_interleave(torch.tensor(new))
    positions = torch.cat([torch.arange(a, a + b) for a, b in ROWS])
    batch = ForwardBatch(
        forward_mode=ForwardMode.MIXED,
        batch_size=len(ROWS),
        input_ids=torch.zeros_like(positions),
        positions=positions,
        req_pool_indices=torch.arange(len(ROWS)),
        seq_lens=torch.tensor(seq_lens),
        extend_prefix_lens=torch.tensor(cached),
        extend_seq_lens=torch.tensor(new),
        extend_start_loc=torch.tensor([sum(new[:row]) for row in range(len(new))]),
        seq_lens_cpu=seq_lens,
        extend_prefix_lens_cpu=cached,
        extend_seq_lens_cpu=new,
        prompt_lens_cpu=seq_lens,
        page_tables=[table],
        out_cache_locs=[slots_of(table, rows, positions, case.page_size)],
        kv_pool=pool,
        attn_backend=attention,
        sample_rows=torch.tensor([]),
        visible_ends=visible_ends,
    )
    attention.plan(batch)
    return batch


def page_table(pages: list[int]) -> torch.Tensor:
    """Each page used once, in random order; 0 where a row has no more."""
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    for row, page_ids in enumerate((torch.randperm(sum(pages)) + 1).split(pages)):
        table[row, : len(page_ids)] = page_ids
    return table


def visible_ends(cached: int, blocks: list[tuple[int, int]], new: int) -> torch.Tensor:
    """[new] of a row whose step's tokens ``[start, end)`` see themselves wholly, for each of ``blocks``."""
    ends = torch.arange(cached + 1, cached + new + 1)
    ends[::3] = 0  # whatever is no more than p + 1 means causal
    for start, end in blocks:
        ends[start:end] = cached + end
    return ends


@pytest.mark.parametrize(("backend", "constants"), BACKENDS)
@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["causal", "blocks"])
@pytest.mark.parametrize("name", CASES)
def test_every_row_of_a_step(
    name: str,
    blocks: list[list[tuple[int, int]]] | None,
    backend: str,
    constants: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for constant, value in constants.items():
        monkeypatch.setattr(constant, value)
    case, layer = CASES[name], make_layer(CASES[name])
    ends = (
        [None] * len(ROWS)
        if blocks is None
        else [visible_ends(cached, row_blocks, new) for (cached, new), row_blocks in zip(ROWS, blocks, strict=True)]
    )
    pages = [-(-(a + b) // case.page_size) for a, b in ROWS]
    pool, table = KVPool([CacheGroup(layer.cache_spec(), (0,), case.page_size)], [sum(pages)], "cpu"), page_table(pages)
    sinks = torch.randn(case.num_heads) if case.has_sinks else None
    qs, ks, vs, expected = [], [], [], []
    for row, (cached, new) in enumerate(ROWS):
        q = 2 * torch.randn(new, case.num_heads, case.head_dim)
        k = 2 * torch.randn(cached + new, case.num_kv_heads, case.head_dim)
        v = k[..., : case.v_head_dim] if layer.latent else torch.randn(cached + new, case.num_kv_heads, case.v_head_dim)
        slots = slots_of(table, torch.tensor(row), torch.arange(cached), case.page_size)
        pool.write(0, slots, k[:cached], None if layer.latent else v[:cached])
        options = (case.window, layer.logit_cap, sinks, ends[row], layer.alibi_slopes, layer.spec.chunk)
        expected.append(reference.attention(q, k, v, 0.37, cached, *options))
        qs.append(q)
        ks.append(k[cached:])
        vs.append(v[cached:])
    visible = None if blocks is None else torch.cat([end for end in ends if end is not None])
    batch = make_batch(case, pool, table, backend, visible)
    output = layer(torch.cat(qs), torch.cat(ks), None if layer.latent else torch.cat(vs), batch, sinks=sinks)
    torch.testing.assert_close(output, torch.cat(expected).flatten(1), atol=1e-5, rtol=1e-5)
    again = layer(torch.cat(qs), None, None, batch, sinks=sinks)  # as a layer that reads another's cache
    assert torch.equal(again, output)


@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("cached", [0, 4])
def test_reference_blocks_by_hand(window: int | None, cached: int) -> None:
    """One query, one head at a time; some with a cap, with sinks, and with slopes."""
    ends = visible_ends(cached, [(1, 6), (8, 9)], 11)
    q, k, v = torch.randn(11, 4, 6), torch.randn(cached + 11, 2, 6), torch.randn(cached + 11, 2, 3)
    slopes = torch.tensor([0.5, 0.25, 0.0, 1.0])
    kinds = [(0.0, None, None), (1.5, None, None), (0.0, torch.randn(4), None), (2.0, torch.randn(4), slopes)]
    for cap, sinks, bias in kinds:
        output = reference.attention(q, k, v, 0.4, cached, window, cap, sinks, ends, bias)
        for i, head in product(range(11), range(4)):
            position = cached + i
            in_block = 1 <= i < 6
            first = 0 if window is None else max(0, position - window + 1)
            seen = slice(first, cached + 6 if in_block else position + 1)
            scores = k[seen, head // 2] @ q[i, head] * 0.4
            scores = cap * torch.tanh(scores / cap) if cap else scores
            if bias is not None:
                scores = scores + bias[head] * (torch.arange(cached + 11)[seen] - position)
            weights = torch.cat((scores, scores.new_zeros(0) if sinks is None else sinks[head, None])).softmax(0)
            torch.testing.assert_close(output[i, head], weights[: len(scores)] @ v[seen, head // 2])


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_reference_chunks_by_hand(chunk: int) -> None:
    q, k, v = torch.randn(11, 2, 6), torch.randn(20, 2, 6), torch.randn(20, 2, 3)
    output = reference.attention(q, k, v, 0.4, 9, chunk=chunk)
    for i, head in product(range(11), range(2)):
        seen = [j for j in range(20) if j <= 9 + i and j // chunk == (9 + i) // chunk]
        weights = (k[seen, head] @ q[i, head] * 0.4).softmax(0)
        torch.testing.assert_close(output[i, head], weights @ v[seen, head])


def test_blocks_as_gemma3() -> None:
    """What each query sees in layers of both kinds, where a window cuts a block, and two images follow one another."""
    kinds = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1]])
    num_tokens = kinds.shape[1]
    config = Gemma3TextConfig(
        sliding_window=4, layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2
    )
    config._attn_implementation = "eager"
    masks = create_masks_for_vision_model(
        config=config,
        inputs_embeds=torch.zeros(1, num_tokens, 4),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(num_tokens)[None],
        block_sequence_ids=get_block_sequence_ids_for_mask(kinds),
    )
    ends = torch.arange(1, num_tokens + 1)
    ends[1:6], ends[8:10], ends[11:14] = 6, 10, 14
    for kind, window in (("full_attention", None), ("sliding_attention", 4)):
        ours = reference._visible(num_tokens, num_tokens, 0, window, ends, None, torch.device("cpu"))
        assert torch.equal(ours, masks[kind][0, 0] == 0)


def test_reference_sinks_as_gpt_oss() -> None:
    q, k, v, sinks = torch.randn(5, 6, 4), torch.randn(5, 2, 4), torch.randn(5, 2, 4), torch.randn(6)
    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.sinks = 3, sinks
    mask = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    expected = eager_attention_forward(module, *heads, mask, scaling=0.6)[0][0]
    torch.testing.assert_close(reference.attention(q, k, v, 0.6, 0, sinks=sinks), expected)


@pytest.mark.parametrize("num_heads", [1, 2, 5, 6, 8, 12, 16, 71])
def test_slopes_as_bloom_and_mpt(num_heads: int) -> None:
    positions = torch.tensor([[1, 1]])
    bloom = build_alibi_tensor(positions, num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(all_alibi_slopes(num_heads), bloom)
    mpt = build_mpt_alibi_tensor(num_heads, 2, alibi_bias_max=5)[:, 0, 0]
    torch.testing.assert_close(all_alibi_slopes(num_heads, max_bias=5), -mpt)


def test_ranks_have_their_own_slopes() -> None:
    parts = [
        alibi_slopes(QKVParallelLinear(6, 2, 6, 3, tp_group=RankGroup(rank, 3)), max_bias=4.0) for rank in range(3)
    ]
    assert torch.equal(torch.cat(parts), all_alibi_slopes(6, 4.0))


def test_a_latent_is_stored_once() -> None:
    spec = make_layer(CASES["latent"]).cache_spec()
    assert spec == CacheSpec(1, 10, 7, "float32", None, latent=True)
    assert (spec.kind, spec.bytes_per_token) == ("latent", 10 * 4)
    pool = KVPool([CacheGroup(spec, (0, 1))], [3], "cpu")
    k = torch.randn(2, 1, 10)
    pool.write(1, torch.tensor([3, 1]), k, None)
    keys, values = pool.layer(1).keys, pool.layer(1).values
    assert torch.equal(values[[3, 1]], k[..., :7]) and values.data_ptr() == keys.data_ptr()


def test_a_back_end_from_outside_serves() -> None:
    """Windows whose pages are given back, prompts in chunks, several requests in a step, and int8 pages."""
    name, new_tokens = "qwen3-mixed-window7-tied", 12
    prompts = random_prompts(TINY_MODELS[name].vocab_size, (3, 21, 40))
    options = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "page_size": 4}
    params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}

    def answers(backend: str, **more: Any) -> list[dict[str, Any]]:
        with Engine(model_path=tiny_model(name), attention_backend=backend, **options, **more) as engine:
            assert engine.server_args.attention_backend == backend
            return engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)

    for prompt, answer in zip(prompts, answers("row_by_row", chunked_prefill_size=16), strict=True):
        assert_same_ids(answer["output_ids"], reference_answer(tiny_model(name), tuple(prompt), new_tokens))
    ours, plain = (answers(backend, kv_cache_dtype="int8") for backend in ("row_by_row", "torch_native"))
    for mine, yours in zip(ours, plain, strict=True):
        first, other = (answer["meta_info"]["output_token_logprobs"][0][0] for answer in (mine, yours))
        assert first == pytest.approx(other, abs=1e-4)


def test_errors() -> None:
    layer, batch = make_layer(CASES["latent"]), object()
    q, k = torch.zeros(2, 60), torch.zeros(2, 10)
    with pytest.raises(ValueError, match="pass None for v"):
        layer(q, k, k, batch)
    with pytest.raises(ValueError, match=r"sinks must be of shape \(6,\), one per head, got \(2,\)"):
        layer(q, k, None, batch, sinks=torch.zeros(2))
    with pytest.raises(ValueError, match=r"alibi_slopes must be of shape \(6,\), .* of this rank, got \(4,\)"):
        make_layer(Case(6, 2, 5, 5, options={"alibi_slopes": [0.1] * 4}))
    with pytest.raises(ValueError, match="v_head_dim must be at most head_dim=4, got 5"):
        CacheSpec(1, 4, 5, "float32", latent=True)
    pool = KVPool([CacheGroup(CacheSpec(1, 4, 4, "float32"), (0,))], [1], "cpu")
    with pytest.raises(ValueError, match="layer 0: a latent cache is written without values"):
        pool.write(0, torch.tensor([1]), torch.zeros(1, 1, 4), None)
