"""Names of a GGUF's tensors in a checkpoint, and what the converter does to tensors, undone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf_blocks import random_blocks, values_of

from rtp_llm.srt.gguf.changes import CHANGES
from rtp_llm.srt.gguf.header import GGUFError
from rtp_llm.srt.gguf.names import checkpoint_names
from rtp_llm.srt.kernels.block_tensor import BlockTensor, plain


def names_in(places: set[str], *tensors: str, architecture: str = "llama", **own_names: str) -> dict[str, str]:
    return checkpoint_names(architecture, tensors, own_names, lambda name: name if name in places else None)


def test_the_name_with_a_place_is_taken() -> None:
    places = {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.bias", "model.norm.weight"}
    found = names_in(places, "blk.0.attn_q.weight", "blk.1.attn_q.bias", "output_norm.weight", "rope_freqs.weight")
    assert found == {
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.1.attn_q.bias": "model.layers.1.self_attn.q_proj.bias",
        "output_norm.weight": "model.norm.weight",
    }


def test_names_without_a_suffix_and_with_another() -> None:
    places = {"model.layers.0.self_attn.sinks", "model.layers.0.mlp.experts.down_proj_bias"}
    found = names_in(places, "blk.0.attn_sinks.weight", "blk.0.ffn_down_exps.bias", architecture="gpt-oss")
    assert set(found.values()) == places


def test_experts_are_parts() -> None:
    places = {"model.layers.0.block_sparse_moe.experts.0.w1.weight"}
    found = names_in(places, "blk.0.ffn_gate_exps.weight")
    assert found["blk.0.ffn_gate_exps.weight"] == "model.layers.0.block_sparse_moe.experts.{part}.w1.weight"


def test_what_has_no_place_keeps_its_name() -> None:
    names = ("blk.0.attn_q.weight", "other")
    assert names_in(set(), *names) == {name: name for name in names}


def test_names_that_cannot_be_read() -> None:
    places = {"model.layers.0.self_attn.q_proj.weight", "transformer.h.0.attn.q_proj.weight"}
    with pytest.raises(GGUFError, match=r"'blk\.0\.attn_q\.weight' has several places in the model: "):
        names_in(places, "blk.0.attn_q.weight")
    with pytest.raises(GGUFError, match="block 4000000000, but there are only 1 tensors"):
        names_in(places, "blk.4000000000.attn_q.weight")
    with pytest.raises(GGUFError, match="'warpformer', whose names of tensors"):
        names_in(places, "blk.0.attn_q.weight", architecture="warpformer")


CONFIG: Any = SimpleNamespace(hidden_size=36, num_attention_heads=6, num_key_value_heads=2)
WEIGHT = torch.arange(60.0 * 32).view(60, 32)  # 6 heads, 2 keys and 2 values of 6


def by_loops(order: list[int]) -> torch.Tensor:
    return torch.stack([WEIGHT[row] for row in order])


def test_pairs_of_a_head_are_put_apart() -> None:
    """Row 2 i of a head is the i-th of its first half, row 2 i + 1 that of the second (Llama's permute)."""
    for change, heads in (("permuted_queries", 6), ("permuted_keys", 2)):
        size, half = 60 // heads, 30 // heads
        order = [head * size + 2 * (row % half) + row // half for head in range(heads) for row in range(size)]
        assert torch.equal(CHANGES[change]([WEIGHT], CONFIG), by_loops(order))
        assert torch.equal(CHANGES[change]([WEIGHT[:, 0]], CONFIG), by_loops(order)[:, 0])


def heads_of_groups() -> list[int]:
    """Rows of the file in the checkpoint's order: three queries, their key and their value, then the other group's."""
    heads = [0, 1, 2, 6, 8, 3, 4, 5, 7, 9]
    return [6 * head + row for head in heads for row in range(6)]


def test_a_fused_projection_is_put_together_again() -> None:
    assert torch.equal(CHANGES["by_head"]([WEIGHT], CONFIG), by_loops(heads_of_groups()))


def test_latent_keys_and_values_are_one() -> None:
    kv_b_proj = torch.randn(3 * (4 + 5), 7)
    keys, values = kv_b_proj.view(3, 9, 7).split([4, 5], dim=1)
    assert torch.equal(CHANGES["latent"]([keys.transpose(1, 2), values], CONFIG), kv_b_proj)


def test_other_changes() -> None:
    assert torch.equal(CHANGES["plus_one"]([WEIGHT], CONFIG), WEIGHT - 1)
    assert torch.equal(CHANGES["transposed"]([WEIGHT], CONFIG), WEIGHT.t())


@pytest.mark.parametrize("change", ["permuted_queries", "permuted_keys", "by_head", "transposed"])
def test_blocks_stay_blocks(change: str) -> None:
    blocks = random_blocks("Q4_0", (60, 32))
    changed = CHANGES[change]([BlockTensor(blocks, "Q4_0", torch.float32)], CONFIG)
    assert isinstance(changed, BlockTensor)
    assert torch.equal(plain(changed), CHANGES[change]([values_of(blocks, "Q4_0")], CONFIG))
