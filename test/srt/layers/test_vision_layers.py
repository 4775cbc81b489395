"""Vision attention, towers, positions in two dimensions and M-RoPE: against transformers, by hand, over ranks."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from dense_forward import make_batch
from torch import nn
from transformers.models.internvl.modeling_internvl import InternVLVisionAttention
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLRotaryEmbedding,
    Qwen2VLVisionRotaryEmbedding,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention as Qwen2VLVisionAttention
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.layers.rotary import MRotaryEmbedding, RotaryEmbedding, get_rope, get_rope_config
from rtp_llm.srt.layers.towers.clip import CLIPVisionModel
from rtp_llm.srt.layers.towers.grid import (
    axial_cos_sin,
    axial_inv_freq,
    frame_cu_seqlens,
    interpolate_grid,
    patch_positions,
)
from rtp_llm.srt.layers.towers.pixtral import PixtralVisionModel
from rtp_llm.srt.layers.towers.siglip import SiglipVisionModel
from rtp_llm.srt.layers.vision import SingletonCache, VisionAttention, prepare_vision_attention_metadata
from rtp_llm.srt.models.weight_loading import WeightLoadError, load_weights_declaratively

SEGMENTS = [[7], [3, 3, 3], [1, 5, 0, 5, 2, 1], [4, 9]]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(11)
    with torch.no_grad():
        yield


class Holder(nn.Module):
    """A module is loaded as a part of a model."""

    def __init__(self, inner: nn.Module, **attributes: Any) -> None:
        super().__init__()
        self.inner = inner
        for name, value in attributes.items():
            setattr(self, name, value)


def load(module: nn.Module, tensors: dict[str, torch.Tensor], **attributes: Any) -> None:
    load_weights_declaratively(Holder(module, **attributes), [(f"inner.{name}", t) for name, t in tensors.items()])


def randomize(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.normal_(0, 0.3)
    return module.eval()


def bounds(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


# Attention


def qwen_attention(num_heads: int, head_dim: int) -> tuple[VisionAttention, nn.Module]:
    size = num_heads * head_dim
    config = transformers.Qwen2VLConfig().vision_config
    config.embed_dim, config.num_heads = size, num_heads
    config._attn_implementation = "sdpa"
    theirs = randomize(Qwen2VLVisionAttention(config))
    ours = VisionAttention(size, num_heads, size, use_qkv_parallel=True)
    load(ours, theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("lengths", SEGMENTS)
@pytest.mark.parametrize("head_dim", [8, 20])
def test_segments_as_qwen2_vl(lengths: list[int], head_dim: int) -> None:
    ours, theirs = qwen_attention(3, head_dim)
    cu_seqlens, x = bounds(lengths), torch.randn(sum(lengths), 3 * head_dim)
    angles = torch.randn(sum(lengths), head_dim // 2)
    half, full = (angles.cos(), angles.sin()), (angles.repeat(1, 2).cos(), angles.repeat(1, 2).sin())
    expected = theirs(x, cu_seqlens.unique(), position_embeddings=full)
    metadata = prepare_vision_attention_metadata(cu_seqlens, "cpu")
    calls = [
        ours(x, cu_seqlens, position_embeddings=full),
        ours(x[None], cu_seqlens, position_embeddings=half),
        ours(x, cu_seqlens.long(), rotary_pos_emb_cos=half[0], rotary_pos_emb_sin=half[1]),
        ours(x, forward_metadata=metadata, position_embeddings=full),
        ours(x, SingletonCache(cu_seqlens), position_embeddings=full),
    ]
    for output in calls:
        assert output.shape == (1, *x.shape)
        torch.testing.assert_close(output[0], expected, atol=1e-5, rtol=1e-5)


def test_rotation_is_rounded_once_as_transformers() -> None:
    ours = VisionAttention(24, 2, 24)
    q, k = torch.randn(9, 2, 12).bfloat16(), torch.randn(9, 2, 12).bfloat16()
    angles = torch.randn(9, 6).repeat(1, 2)
    expected = apply_rotary_pos_emb_vision(q, k, angles.cos(), angles.sin())
    rotated = ours._rotate(q, k, angles.cos(), angles.sin())
    assert torch.equal(rotated[0], expected[0]) and torch.equal(rotated[1], expected[1])


def test_no_patch_sees_another_segment() -> None:
    ours = randomize(VisionAttention(12, 2, 12))
    x, cu_seqlens = torch.randn(14, 12), bounds([4, 4, 6])
    changed = x.clone()
    changed[4:8] += 1
    before, after = ours(x, cu_seqlens)[0], ours(changed, cu_seqlens)[0]
    assert torch.equal(before[:4], after[:4]) and torch.equal(before[8:], after[8:])
    assert not torch.isclose(before[4:8], after[4:8]).all(-1).any()


class ThreadGroup(RankGroup):
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, world_size: int, parts: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, world_size)
        self.parts, self.barrier = parts, barrier

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.parts[self.rank] = x
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self._exchange(x), dim=dim)


def on_ranks(num_ranks: int, run: Callable[[RankGroup], torch.Tensor]) -> list[torch.Tensor]:
    parts, barrier = [None] * num_ranks, threading.Barrier(num_ranks, timeout=30)
    results: list[Any] = [None] * num_ranks

    def run_rank(rank: int) -> None:
        with torch.no_grad():
            try:
                results[rank] = run(ThreadGroup(rank, num_ranks, parts, barrier))
            except Exception as error:
                results[rank] = error
                barrier.abort()

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "wider heads": {"head_dim": 10},
    "key heads shared": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1},
    "no biases, scale": {"qkv_bias": False, "proj_bias": False, "softmax_scale": 0.9},
    "heads take turns": {"use_qkv_parallel": False},
    "norm of all heads": {"qk_normalization": True, "layer_norm_eps": 1e-3},
    "norm of all heads, one key head": {"qk_normalization": True, "num_kv_heads": 1},
    "norm of all heads, which take turns": {"qk_normalization": True, "use_qkv_parallel": False},
    "norm of each head": {"qk_normalization_by_head_size": True, "num_kv_heads": 2},
    "single precision": {"softmax_in_single_precision": True},
}
NUM_HEADS, EMBED_DIM = 4, 22


def make_attention(case: dict[str, Any], **more: Any) -> VisionAttention:
    head_dim = case.get("head_dim", 6)
    return VisionAttention(EMBED_DIM, NUM_HEADS, NUM_HEADS * head_dim, **{"use_qkv_parallel": True, **case, **more})


def by_hand(case: dict[str, Any], tensors: dict[str, torch.Tensor], x: torch.Tensor, lengths: list[int]) -> Any:
    """[T, EMBED_DIM] -> the same: one segment, one head at a time."""
    head_dim, num_kv_heads = case.get("head_dim", 6), case.get("num_kv_heads", NUM_HEADS)
    qkv = F.linear(x, tensors["qkv_proj.weight"], tensors.get("qkv_proj.bias"))
    if case.get("use_qkv_parallel", True):
        heads = qkv.view(len(x), -1, head_dim)
        q, k, v = heads[:, :NUM_HEADS], heads[:, NUM_HEADS:-num_kv_heads], heads[:, -num_kv_heads:]
    else:
        q, k, v = (qkv.view(len(x), NUM_HEADS, 3, head_dim)[:, :, i] for i in range(3))
    if "q_norm.weight" in tensors:
        eps = case.get("layer_norm_eps", 1e-6)
        is_together = "qk_normalization" in case
        q, k = (
            F.rms_norm(h.flatten(1) if is_together else h, weight.shape, weight, eps).view(h.shape)
            for h, weight in ((q, tensors["q_norm.weight"]), (k, tensors["k_norm.weight"]))
        )
    out = []
    for segment in zip(*(h.split(lengths) for h in (q, k, v)), strict=True):
        for i in range(NUM_HEADS):
            j = i * num_kv_heads // NUM_HEADS
            scores = segment[0][:, i] @ segment[1][:, j].T * case.get("softmax_scale", head_dim**-0.5)
            out.append(scores.softmax(-1) @ segment[2][:, j])
    out = [torch.cat(out[i : i + NUM_HEADS], dim=-1) for i in range(0, len(out), NUM_HEADS)]
    return F.linear(torch.cat(out), tensors["proj.weight"], tensors.get("proj.bias"))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_option_over_ranks(name: str, num_ranks: int) -> None:
    case, lengths = CASES[name], [3, 5, 3]
    tensors = randomize(make_attention(case)).state_dict()
    x = torch.randn(sum(lengths), EMBED_DIM)

    def run(group: RankGroup) -> torch.Tensor:
        layer = make_attention(case, tp_group=group)
        load(layer, tensors)
        return layer(x, bounds(lengths))

    expected = by_hand(case, tensors, x, lengths)
    for output in on_ranks(num_ranks, run):
        torch.testing.assert_close(output[0], expected, atol=2e-5, rtol=2e-5)


def test_data_parallel_ranks_hold_all_heads() -> None:
    tensors = randomize(make_attention({})).state_dict()
    layer = make_attention({"use_data_parallel": True}, tp_group=RankGroup(1, 2))
    load(layer, tensors)
    x = torch.randn(5, EMBED_DIM)
    torch.testing.assert_close(layer(x)[0], by_hand({}, tensors, x, [5]))


def test_rows_without_segments() -> None:
    layer = randomize(make_attention({}))
    tensors, x = layer.state_dict(), torch.randn(3, 5, EMBED_DIM)
    angles, cache = torch.randn(5, 6), SingletonCache()
    rotation = angles.cos(), angles.sin()
    output = layer(x, position_embeddings=rotation)  # positions alike for all rows
    for row in range(3):
        torch.testing.assert_close(output[row], layer(x[row], position_embeddings=rotation)[0])
    plain = layer(x)
    torch.testing.assert_close(plain.flatten(0, 1), by_hand({}, tensors, x.flatten(0, 1), [5, 5, 5]))
    assert cache.empty() and torch.equal(layer(x, cache), plain)
    assert cache.get_data().tolist() == [0, 5, 10, 15]
    cache.set_data(bounds([15]))
    torch.testing.assert_close(layer(x, cache).flatten(0, 1), by_hand({}, tensors, x.flatten(0, 1), [15]))
    assert layer(torch.empty(0, EMBED_DIM), bounds([])).shape == (1, 0, EMBED_DIM)


@pytest.mark.parametrize("in_single_precision", [False, True])
def test_masks(in_single_precision: bool) -> None:
    layer = randomize(make_attention({"softmax_in_single_precision": in_single_precision}))
    x = torch.randn(2, 6, EMBED_DIM)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    added = torch.zeros(6, 6).masked_fill(~causal, float("-inf"))
    expected = layer(x, attention_mask=causal[None])
    for row in range(2):
        for end in range(1, 7):  # the last token of a prefix sees all of it
            torch.testing.assert_close(expected[row, end - 1], layer(x[row, :end])[0, -1], atol=2e-5, rtol=2e-5)
    for mask in (causal.expand(2, 6, 6), causal.expand(2, NUM_HEADS, 6, 6), added[None], added.expand(2, 1, 6, 6)):
        torch.testing.assert_close(layer(x, attention_mask=mask), expected, atol=1e-6, rtol=1e-5)
    segments = bounds([4, 2, 6])
    for mask in (causal[None], added[None]):  # both the mask and the segments hide
        both = layer(x, segments, attention_mask=mask)
        torch.testing.assert_close(both[0, :4], expected[0, :4], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(
            both[0, 4:], layer(x[0, 4:], attention_mask=mask[:, :2, :2])[0], atol=2e-5, rtol=2e-5
        )
    padding = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    padded = layer(x, attention_mask=padding[:, None] & padding[:, :, None])
    torch.testing.assert_close(padded[1, :4], layer(x[1, :4])[0], atol=2e-5, rtol=2e-5)
    assert padded.isfinite().all()  # what sees nothing must not become NaN, which would spread


def test_own_way_of_positions() -> None:
    seen = []

    def shift(q: torch.Tensor, k: torch.Tensor, positions: Any, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((q.shape, k.shape, positions, shape))
        return q + 1, k

    layer = randomize(make_attention({"num_kv_heads": 2}, customized_position_embedding_applier=shift))
    x = torch.randn(2, 5, EMBED_DIM)
    layer(x)
    assert not seen
    output = layer(x, position_embeddings="anything")
    assert seen == [((10, 4, 6), (10, 2, 6), "anything", x.shape)]
    layer.qkv_proj.bias[: 4 * 6] += 1
    torch.testing.assert_close(output, layer(x), atol=2e-5, rtol=2e-5)


def test_single_precision_is_what_it_says() -> None:
    layers = [make_attention({"softmax_in_single_precision": single}).bfloat16() for single in (False, True)]
    tensors = {name: tensor.float().bfloat16() for name, tensor in randomize(make_attention({})).state_dict().items()}
    for layer in layers:
        load(layer, tensors)
    q, k, v = (torch.randn(1, 40, NUM_HEADS, 6).bfloat16() * 3 for _ in range(3))
    exact = F.scaled_dot_product_attention(*(h.double().transpose(1, 2) for h in (q, k, v)), scale=6**-0.5)
    assert torch.equal(layers[1]._attend(q, k, v), exact.transpose(1, 2).bfloat16())
    assert layers[0]._attend(q, k, v).dtype == torch.bfloat16


def test_norm_of_all_heads_and_names_as_internvl() -> None:
    config = transformers.InternVLVisionConfig(hidden_size=24, num_attention_heads=4, use_qk_norm=True)
    config.attention_bias, config._attn_implementation = True, "sdpa"
    theirs = randomize(InternVLVisionAttention(config))
    ours = VisionAttention(24, 4, 24, qk_normalization=True)
    load(ours, theirs.state_dict())
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x)[0], atol=1e-5, rtol=1e-5)


def test_names_in_checkpoints() -> None:
    layer = randomize(make_attention({"num_kv_heads": 2}))
    tensors = layer.state_dict()
    parts = dict(zip("qkv", (t.split([24, 12, 12]) for t in [tensors["qkv_proj.weight"]] * 3), strict=True))
    separate = {f"{name}_proj.weight": parts[name][i] for i, name in enumerate("qkv")}
    separate |= {f"{name}_proj.bias": tensors["qkv_proj.bias"].split([24, 12, 12])[i] for i, name in enumerate("qkv")}
    fused = {f"qkv.{kind}": tensors[f"qkv_proj.{kind}"] for kind in ("weight", "bias")}
    for output in ("proj", "out_proj", "o_proj", "projection_layer"):
        for qkv in (separate, fused):
            other = make_attention({"num_kv_heads": 2})
            load(other, qkv | {f"{output}.{kind}": tensors[f"proj.{kind}"] for kind in ("weight", "bias")})
            assert all(torch.equal(tensor, tensors[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(WeightLoadError, match=r"inner.qkv_proj.weight \[48, 22\], made of inner.k_proj.weight$"):
        lacking = {name: tensor for name, tensor in separate.items() if name != "k_proj.weight"}
        load(
            make_attention({"num_kv_heads": 2}),
            lacking | {f"proj.{k}": tensors[f"proj.{k}"] for k in ("weight", "bias")},
        )
    with pytest.raises(
        WeightLoadError, match=r"no place in the model:\n  inner.q_proj.bias"
    ):  # a bias that is not there
        load(make_attention({"qkv_bias": False}), {"q_proj.bias": torch.zeros(24)})
    with pytest.raises(WeightLoadError, match=r"no place in the model:\n  inner.q_proj.weight"):  # not of this layout
        load(make_attention({"use_qkv_parallel": False}), {"q_proj.weight": torch.zeros(24, 22)})


def test_attention_errors() -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            make_attention(options, prefix="tower.attn")

    refused(r"tower.attn: unknown qkv_backend 'fa3'; have \['sdpa'\]", qkv_backend="fa3")
    refused("num_dummy_heads=2 is not supported: choose a tp_size that divides the 4 heads", num_dummy_heads=2)
    refused("4 heads cannot share 3 key/value heads", num_kv_heads=3)
    refused("need use_qkv_parallel=True", num_kv_heads=2, use_qkv_parallel=False)
    refused("exclude each other", qk_normalization=True, qk_normalization_by_head_size=True)
    refused("number of attention heads 4 is not divisible by 3; choose another tp_size", tp_group=RankGroup(0, 3))
    with pytest.raises(ValueError, match="projection_size 30 does not fit 4 heads"):
        VisionAttention(22, 4, 30)
    with pytest.raises(ValueError, match="projection_size 24 does not fit 4 heads of 8 components"):
        VisionAttention(22, 4, 24, head_dim=8)

    layer, x = make_attention({"flatten_batch": True}), torch.zeros(2, 6, EMBED_DIM)
    with pytest.raises(ValueError, match="flatten_batch takes one row of packed segments, got 2 rows"):
        layer(x)
    layer = make_attention({})
    with pytest.raises(ValueError, match="cu_seqlens end at 9, but there are 2 x 6 tokens"):
        layer(x, bounds([4, 5]))
    for wrong in ([1, 12], [0, 7, 5, 12], []):
        with pytest.raises(ValueError, match="cu_seqlens must be one row of bounds that begins with 0 and never falls"):
            layer(x, torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"for 12 tokens and heads of 6 components cannot be of shape \(5, 6\)"):
        layer(x, position_embeddings=(torch.zeros(5, 6), torch.zeros(5, 6)))
    with pytest.raises(ValueError, match=r"cannot be of shape \(12, 5\)"):
        layer(x, position_embeddings=(torch.zeros(12, 5), torch.zeros(12, 5)))
    with pytest.raises(ValueError, match="both cosines and sines"):
        layer(x, rotary_pos_emb_cos=torch.zeros(12, 6))
    for shape in ([6, 6], [3, 6, 6], [2, 2, 6, 6], [1, 1, 12, 12]):
        with pytest.raises(ValueError, match=r"attention_mask must be \[1 or 2, 1 or 4, 6, 6\] or without the second"):
            layer(x, attention_mask=torch.zeros(shape))


def test_metadata() -> None:
    metadata = prepare_vision_attention_metadata(bounds([2, 0, 3, 2]), "cpu")
    assert metadata.cu_seqlens.tolist() == [0, 2, 2, 5, 7] and metadata.cu_seqlens.dtype == torch.int32
    assert metadata.seq_lens.tolist() == [2, 0, 3, 2]
    assert (metadata.max_seqlen, metadata.num_tokens) == (3, 7)
    assert [(group.length, group.tokens.tolist()) for group in metadata.groups] == [(2, [0, 1, 5, 6]), (3, [2, 3, 4])]
    [group] = prepare_vision_attention_metadata(bounds([4, 0, 4]), "cpu").groups
    assert (group.length, group.tokens) == (4, None)  # nothing is gathered


# Positions of patches

GRIDS = [(1, 4, 6), (3, 2, 2), (1, 8, 2)]


@pytest.mark.parametrize("merge_size", [1, 2])
def test_patch_positions_as_transformers(merge_size: int) -> None:
    expected = get_vision_position_ids(torch.tensor(GRIDS), merge_size)
    assert torch.equal(patch_positions(GRIDS, merge_size), expected)
    assert torch.equal(patch_positions(torch.tensor(GRIDS), merge_size), expected)
    assert torch.equal(frame_cu_seqlens(GRIDS), get_vision_cu_seqlens(torch.tensor(GRIDS)))
    with pytest.raises(ValueError, match="3 x 4 patches cannot be merged by 2 x 2"):
        patch_positions([(1, 3, 4)], 2)


def test_axial_rotation_as_qwen2_vl() -> None:
    config = transformers.Qwen2VLConfig().vision_config
    config.embed_dim, config.num_heads = 80, 4
    positions = patch_positions(GRIDS, 2)
    expected = Qwen2VLVisionRotaryEmbedding(config)(torch.zeros(1), positions)
    for ours, theirs in zip(axial_cos_sin(positions, axial_inv_freq(20)), expected, strict=True):
        assert torch.equal(torch.cat((ours, ours), dim=-1), theirs)
    with pytest.raises(ValueError, match="a multiple of 4 components, got 10"):
        axial_inv_freq(10)


def test_interpolation_errors() -> None:
    table = torch.randn(9, 4)
    assert interpolate_grid(table, 3, 3) is table
    with pytest.raises(ValueError, match="8 learned positions are not those of a square grid"):
        interpolate_grid(table[:8], 3, 3)


# Towers

SIZES = dict(hidden_size=24, intermediate_size=36, num_hidden_layers=4, num_attention_heads=4, image_size=30)


def clip_pair(**more: Any) -> tuple[CLIPVisionModel, nn.Module]:
    config = transformers.CLIPVisionConfig(**SIZES, patch_size=7, **more)
    return loaded(CLIPVisionModel(config), transformers.CLIPVisionModel(config))


def siglip_pair() -> tuple[SiglipVisionModel, nn.Module]:
    config = transformers.SiglipVisionConfig(**SIZES, patch_size=7, vision_use_head=False)
    return loaded(SiglipVisionModel(config), transformers.SiglipVisionModel(config))


def pixtral_pair() -> tuple[PixtralVisionModel, nn.Module]:
    config = transformers.PixtralVisionConfig(**SIZES | {"num_attention_heads": 3}, patch_size=5, hidden_act="silu")
    mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    return loaded(PixtralVisionModel(config), transformers.PixtralVisionModel(config), packed_modules_mapping=mapping)


def loaded(ours: Any, theirs: nn.Module, **attributes: Any) -> Any:
    randomize(theirs)
    load(ours, theirs.state_dict(), **attributes)
    return ours, theirs


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pair", [clip_pair, siglip_pair])
@pytest.mark.parametrize("shape", [(1, 3, 30, 30), (3, 3, 28, 28), (2, 3, 40, 15)])
def test_towers_of_fixed_size(pair: Any, shape: tuple[int, ...]) -> None:
    ours, theirs = pair()
    x = torch.randn(shape)
    expected = theirs(x, interpolate_pos_encoding=shape[2] != 30, output_hidden_states=True)
    close(ours(x), expected.last_hidden_state)
    for layer in (0, 1, -2, -1, 4):
        close(ours(x, layer), expected.hidden_states[layer])
    for state, layer in zip(ours(x, [-2, 1, 1]), (-2, 1, 1), strict=True):
        close(state, expected.hidden_states[layer])


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_clip_activations(act: str) -> None:
    ours, theirs = clip_pair(hidden_act=act)
    x = torch.randn(1, 3, 30, 30)
    close(ours(x), theirs(x).last_hidden_state)


def test_pixtral_takes_images_of_any_size() -> None:
    ours, theirs = pixtral_pair()
    sizes = [(30, 20), (5, 5), (13, 27), (30, 20)]
    images = [torch.randn(3, *size) for size in sizes]
    padded = torch.stack(
        [F.pad(image, (0, 27 - image.shape[2], 0, 30 - image.shape[1]), value=9.0) for image in images]
    )
    expected = theirs(padded, image_sizes=sizes, output_hidden_states=True)
    close(ours(images), expected.last_hidden_state[0])
    close(ours(padded, sizes), expected.last_hidden_state[0])
    for state, layer in zip(ours(images, hidden_layer=[-2, 0]), (-2, 0), strict=True):
        close(state, expected.hidden_states[layer][0])
    close(ours(images[:1])[:24], ours(images)[:24])  # nobody else's patches are seen
    close(ours(padded[:2]), theirs(padded[:2]).last_hidden_state[0])


def test_pixtral_rotation() -> None:
    config = transformers.PixtralVisionConfig(**SIZES | {"num_attention_heads": 3})
    ours, positions = PixtralVisionModel(config), patch_positions([(1, 5, 7)])
    expected = PixtralVisionRotaryEmbedding(config)(torch.zeros(1), positions)
    for table, theirs in zip(axial_cos_sin(positions, ours.inv_freq), expected, strict=True):
        assert torch.equal(torch.cat((table, table), dim=-1), theirs)
    with pytest.raises(ValueError, match="a multiple of 4 components, got 6"):
        PixtralVisionModel(transformers.PixtralVisionConfig(**SIZES))


@pytest.mark.parametrize("pair", [clip_pair, siglip_pair, pixtral_pair])
def test_later_layers_are_not_computed(pair: Any) -> None:
    ours, _ = pair()
    layers = ours.transformer.layers if isinstance(ours, PixtralVisionModel) else ours.encoder.layers
    run: list[int] = []
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, i=i: run.append(i))
    ours(torch.randn(1, 3, 30, 30), hidden_layer=[0, -3])
    assert run == [0, 1]
    with pytest.raises(ValueError, match="a tower of 4 layers has hidden states -5 to 4, not"):
        ours(torch.randn(1, 3, 30, 30), hidden_layer=5)
    with pytest.raises(ValueError, match="a tower of 4 layers has hidden states -5 to 4, not"):
        ours(torch.randn(1, 3, 30, 30), hidden_layer=[])


@pytest.mark.parametrize("pair", [clip_pair, siglip_pair])
def test_names_of_older_checkpoints(pair: Any) -> None:
    ours, theirs = pair()
    older = {f"vision_model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    other = type(ours)(theirs.config)
    load(other, older | {"vision_model.embeddings.position_ids": torch.arange(16)[None]})
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in other.state_dict().items())
    lacking = {name: tensor for name, tensor in older.items() if "layers.2.self_attn.v_proj.bias" not in name}
    with pytest.raises(WeightLoadError, match=r"1 parameters were not set:\n.*layers.2.self_attn.qkv_proj.bias"):
        load(type(ours)(theirs.config), lacking)


def test_towers_in_bfloat16() -> None:
    for pair in (clip_pair, siglip_pair):
        ours, theirs = pair()
        x = torch.randn(2, 3, 28, 28)
        expected = ours(x)
        output = ours.bfloat16()(x)
        assert output.dtype == torch.bfloat16
        theirs_in_bfloat16 = theirs.bfloat16()(x, interpolate_pos_encoding=True).last_hidden_state.float()
        assert (output.float() - expected).norm() < 1.5 * (theirs_in_bfloat16 - expected).norm()


# M-RoPE


def text_config(kind: str, head_dim: int, rope: dict[str, Any]) -> Any:
    config = transformers.Qwen2VLTextConfig if kind == "qwen2" else transformers.Qwen3VLTextConfig
    sizes = dict(hidden_size=3 * head_dim, num_attention_heads=3, head_dim=head_dim, max_position_embeddings=128)
    return config(**sizes, rope_parameters={"rope_theta": 1e4, **rope})


def our_rope(config: Any, head_dim: int) -> RotaryEmbedding:
    base, scaling, partial = get_rope_config(config)
    options: dict[str, Any] = dict(base=base, rope_scaling=scaling, partial_rotary_factor=partial)
    return get_rope(head_dim, max_position=config.max_position_embeddings, **options)


def positions_of_media(num_tokens: int) -> torch.Tensor:
    return torch.randint(0, 3000, (3, num_tokens))


ROPES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qwen2": ("qwen2", 16, {"rope_type": "default", "mrope_section": [2, 3, 3]}),
    "qwen2, first name": ("qwen2", 16, {"type": "mrope", "mrope_section": [4, 0, 4]}),
    "qwen2, yarn": (
        "qwen2",
        32,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mrope_section": [4, 6, 6]},
    ),
    "qwen3": ("qwen3", 24, {"rope_type": "default", "mrope_section": [4, 4, 4], "mrope_interleaved": True}),
    "qwen3, uneven": ("qwen3", 32, {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}),
    "qwen3, larger than heads": (
        "qwen3",
        16,
        {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    ),
    "qwen3, linear": (
        "qwen3",
        24,
        {"rope_type": "linear", "factor": 3.0, "mrope_section": [6, 3, 3], "mrope_interleaved": True},
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_mrope_as_transformers(name: str) -> None:
    kind, head_dim, rope = ROPES[name]
    config = text_config(kind, head_dim, dict(rope))
    ours = our_rope(config, head_dim)
    assert isinstance(ours, MRotaryEmbedding)
    theirs = (Qwen2VLRotaryEmbedding if kind == "qwen2" else Qwen3VLTextRotaryEmbedding)(config)
    for num_tokens in (1, 3, 50):
        positions = positions_of_media(num_tokens)
        q, k = torch.randn(num_tokens, 3, head_dim), torch.randn(num_tokens, 1, head_dim)
        cos, sin = theirs(q, positions[:, None])
        expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        for rotated, other in zip(ours(positions, q, k), expected, strict=True):
            torch.testing.assert_close(rotated, other[0].transpose(0, 1), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", ROPES)
def test_text_is_rotated_as_without_mrope(name: str) -> None:
    _, head_dim, rope = ROPES[name]
    plain_rope = {key: value for key, value in rope.items() if not key.startswith("mrope")}
    ours, plain = get_rope(head_dim, rope_scaling=rope), get_rope(head_dim, rope_scaling=plain_rope)
    assert isinstance(ours, MRotaryEmbedding) and not isinstance(plain, MRotaryEmbedding)
    positions, q = torch.arange(5, 40), torch.randn(35, 2, head_dim)
    expected = plain(positions, q, q)[0]
    assert torch.equal(ours(positions, q, q)[0], expected)
    assert torch.equal(ours(positions.expand(3, -1), q, q)[0], expected)


def test_a_step_prepares_its_media_positions() -> None:
    _, head_dim, rope = ROPES["qwen2"]
    ours, q = get_rope(head_dim, rope_scaling=rope), torch.randn(9, 2, head_dim)
    text, media = make_batch([0] * 9, 4, 13), make_batch([0] * 9, 0, 9)
    media.mrope_positions = positions_of_media(9)
    for batch, positions in ((text, text.positions), (media, media.mrope_positions), (text, text.positions)):
        ours.prepare_for_forward(batch)
        assert torch.equal(ours(positions, q, q)[0], ours(positions.clone(), q, q)[0])
    with torch.inference_mode():
        ours.prepare_for_forward(media)
    cos, _ = ours._cos_and_sin_at(media.mrope_positions)
    assert cos.data_ptr() == ours._step_cos_sin.data_ptr()  # not made anew


def test_mrope_errors() -> None:
    with pytest.raises(ValueError, match=r"mrope_section \[2, 3, 4\] must sum to 8"):
        get_rope(16, rope_scaling={"mrope_section": [2, 3, 4]})
    with pytest.raises(ValueError, match=r"must be three numbers \(time, height, width\), got \[4, 4\]"):
        get_rope(16, rope_scaling={"mrope_section": [4, 4], "mrope_interleaved": True})
    with pytest.raises(ValueError, match="'dynamic' depends on sequence lengths, which mrope_section does not go with"):
        get_rope(16, rope_scaling={"rope_type": "dynamic", "factor": 2.0, "mrope_section": [2, 3, 3]})
