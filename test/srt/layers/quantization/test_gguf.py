"""Layers whose weights stay in GGUF's blocks, against float32 arithmetic on the values that the package computes."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gguf_blocks import random_blocks, values_of
from torch import nn

from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.kernels.block_tensor import BlockTensor
from rtp_llm.srt.kernels.blocks import BLOCK_TYPES
from rtp_llm.srt.kernels.packed import PackedWeight, PlainDense, PlainExperts, SideBySide
from rtp_llm.srt.layers.activation import SiluAndMul, SwigluOAIAndMul
from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from rtp_llm.srt.layers.moe import FusedMoE
from rtp_llm.srt.layers.quantization.base import QuantizationConfig, QuantizedModel, process_weights, stored_bytes
from rtp_llm.srt.layers.quantization.registry import quantization_config
from rtp_llm.srt.layers.weights import ShardId, fill
from rtp_llm.srt.models.building import built_as

PLAIN = "BF16"
TYPES = sorted(BLOCK_TYPES)
DEVICES = ("reference", "cpu")


def scheme(dtype: str = "bfloat16") -> QuantizationConfig:
    return quantization_config("gguf", QuantizedModel(settings={"quant_method": "gguf"}, dtype=dtype))


@contextmanager
def building(device: str = "reference", dtype: str = "bfloat16") -> Iterator[None]:
    with built_as(dtype, device), torch.no_grad():
        yield


def weight_of(block_type: str, shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor as a file has it, and its values."""
    if block_type == PLAIN:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return values.bfloat16(), values.bfloat16().float()
    blocks = random_blocks(block_type, shape, seed)
    return BlockTensor(blocks, block_type, torch.bfloat16), values_of(blocks, block_type)


def load(layer: nn.Module, parts: Sequence[tuple[ShardId, torch.Tensor]], name: str = "weight") -> None:
    for shard_id, tensor in parts:
        fill(layer.get_parameter(name), tensor, shard_id)


def inputs(num_rows: int, num_inputs: int) -> torch.Tensor:
    return torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(9)).bfloat16()


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Within what rounding of rows to bytes, and of results to bfloat16, makes of a sum."""
    error = (output.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.01, f"relative error {error:.4f}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_type", [*TYPES, PLAIN])
def test_a_layer_of_each_type(block_type: str, device: str) -> None:
    tensor, values = weight_of(block_type, (37, 768))
    with building(device):
        layer = RowParallelLinear(768, 37, quant_config=scheme(), prefix="model.layers.0.mlp.down_proj")
        load(layer, [(None, tensor)])
        layer.bias.data.fill_(0.5)
        process_weights(layer)
        x = inputs(5, 768)
        assert_close(layer(x)[0], x.float() @ values.T + 0.5)
        assert torch.equal(layer.dequantized_weight(), values.bfloat16())
        assert list(dict(layer.named_parameters())) == ["bias"]
        if block_type != PLAIN:
            panel = 1 if device == "reference" else 64  # rows are filled up to whole panels
            row_bytes = BLOCK_TYPES[block_type].row_bytes(768)
            assert stored_bytes(layer) <= -(-37 // panel) * panel * row_bytes + 37 * 2


@pytest.mark.parametrize(
    ("types", "runs"),
    [
        (("Q4_K", "Q4_K", "Q6_K"), [96, 32]),
        (("Q4_K", "Q6_K", "Q4_K"), [64, 32, 32]),
        (("Q5_0", "Q5_0", "Q5_0"), []),
        (("Q4_K", PLAIN, "Q8_0"), [64, 32, 32]),
    ],
)
def test_parts_of_several_types(types: tuple[str, ...], runs: list[int]) -> None:
    parts = [
        weight_of(kind, (rows, 256), seed) for seed, (kind, rows) in enumerate(zip(types, (64, 32, 32), strict=True))
    ]
    with building():
        layer = QKVParallelLinear(256, 32, 2, 1, bias=False, quant_config=scheme(), prefix="qkv_proj")
        load(layer, list(zip("vqk", (parts[2][0], parts[0][0], parts[1][0]), strict=True)))  # in any order
        process_weights(layer)
        assert [part.num_rows for part in getattr(layer.packed, "parts", ())] == runs
        x = inputs(3, 256)
        assert_close(layer(x)[0], x.float() @ torch.cat([values for _, values in parts]).T)
        assert torch.equal(layer.dequantized_weight(), torch.cat([values for _, values in parts]).bfloat16())


def test_parts_that_the_file_fuses() -> None:
    tensor, values = weight_of("Q5_K", (128, 256))
    with building():
        layer = QKVParallelLinear(256, 32, 2, 1, bias=False, quant_config=scheme(), prefix="qkv_proj")
        load(layer, [(None, tensor)])
        process_weights(layer)
        assert not isinstance(layer.packed, SideBySide)
        assert_close(layer(inputs(3, 256))[0], inputs(3, 256).float() @ values.T)


def test_a_product_of_equal_types_ends_in_the_activation() -> None:
    for types, ends in ((("Q4_0", "Q4_0"), True), (("Q4_0", "Q8_0"), False)):
        gate, up = (weight_of(kind, (64, 96), seed) for seed, kind in enumerate(types))
        with building("cpu"):
            layer = MergedColumnParallelLinear(96, [64, 64], bias=False, quant_config=scheme(), prefix="gate_up_proj")
            load(layer, [(0, gate[0]), (1, up[0])])
            process_weights(layer)
            activation = SiluAndMul()
            assert not ends or layer.quant_method.ends_in(layer, activation)
            x = inputs(4, 96)
            assert_close(layer.activated(x, activation), F.silu(x.float() @ gate[1].T) * (x.float() @ up[1].T))


def test_a_part_that_is_missing_is_named() -> None:
    with building():
        layer = QKVParallelLinear(256, 32, 2, 1, bias=False, quant_config=scheme(), prefix="qkv_proj")
        load(layer, [("q", weight_of("Q4_K", (64, 256))[0]), ("v", weight_of("Q4_K", (32, 256))[0])])
        with pytest.raises(ValueError, match="qkv_proj: its part 'k' was not loaded"):
            process_weights(layer)
        with pytest.raises(ValueError, match=r"expects a tensor of shape \(32, 256\), the checkpoint has \(31, 256\)"):
            load(layer, [("k", weight_of("Q4_K", (31, 256))[0])])


@pytest.mark.parametrize("num_inputs", [512, 256])
def test_two_ranks_cut_rows_and_whole_blocks(num_inputs: int, caplog: pytest.LogCaptureFixture) -> None:
    """With 256 inputs each rank would have half a block."""
    tensor, values = weight_of("Q4_K", (64, num_inputs))
    x = inputs(3, num_inputs)
    summed, rows = torch.zeros(3, 64), []
    with building(), caplog.at_level(logging.WARNING):
        for rank in range(2):
            group: Any = RankGroup(rank, 2)
            options: Any = dict(bias=False, quant_config=scheme(), tp_group=group)
            row = RowParallelLinear(num_inputs, 64, reduce_results=False, prefix="down_proj", **options)
            column = ColumnParallelLinear(num_inputs, 64, prefix="up_proj", **options)
            for layer in (row, column):
                load(layer, [(None, tensor)])
                process_weights(layer)
            assert isinstance(row.packed, PlainDense) == (num_inputs == 256)
            assert not isinstance(column.packed, PlainDense)
            half = num_inputs // 2
            summed += row(x[:, rank * half : (rank + 1) * half])[0].float()
            rows.append(column(x)[0])
    assert_close(summed, x.float() @ values.T)
    assert_close(torch.cat(rows, dim=1), x.float() @ values.T)
    warned = "128 inputs on a rank are no whole blocks of Q4_K" in caplog.text
    assert warned == (num_inputs == 256)


@pytest.mark.parametrize("block_type", ["Q8_0", "Q6_K", PLAIN])
@pytest.mark.parametrize("device", DEVICES)
def test_embeddings_and_heads(block_type: str, device: str) -> None:
    tensor, values = weight_of(block_type, (75, 256))
    with building(device):
        embedding = VocabParallelEmbedding(80, 256, org_num_embeddings=75, quant_config=scheme(), prefix="embed_tokens")
        head = ParallelLMHead(75, 256, quant_config=scheme(), prefix="lm_head")
        tied = VocabParallelEmbedding(75, 256, quant_config=scheme(), prefix="embed_tokens")
        tied.is_head = True
        for layer in (embedding, head, tied):
            load(layer, [(None, tensor)])
            process_weights(layer)
        ids = torch.tensor([0, 74, 3, 3])
        for layer in (embedding, tied):
            assert torch.equal(layer(ids), values[ids].bfloat16())
        assert not embedding(torch.tensor([75, 79])).any()
        x = inputs(2, 256)
        for layer in (head, tied):
            logits = layer.quant_method.logits(layer, x)
            assert logits.dtype == torch.float32
            assert_close(logits, x.float() @ values.T)


def test_ranks_have_their_rows_of_the_vocabulary() -> None:
    tensor, values = weight_of("Q8_0", (75, 64))
    found = []
    with building():
        for rank in range(2):
            layer = VocabParallelEmbedding(
                75, 64, quant_config=scheme(), prefix="embed_tokens", tp_group=RankGroup(rank, 2)
            )
            load(layer, [(None, tensor)])
            process_weights(layer)
            found.append(layer.packed.rows(torch.arange(38)))
    assert torch.equal(torch.cat(found)[:75], values)
    assert not torch.cat(found)[75:].any()


def experts_output(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "types", [("Q4_K", "Q4_K", "Q6_K"), ("Q4_K", "Q5_K", "Q8_0"), ("MXFP4", PLAIN, PLAIN), (PLAIN, PLAIN, PLAIN)]
)
def test_experts(types: tuple[str, str, str], device: str) -> None:
    num_experts, hidden, size = 3, 256, 512
    gate, up = (weight_of(kind, (num_experts, size, hidden), seed) for seed, kind in enumerate(types[:2]))
    down = weight_of(types[2], (num_experts, hidden, size), 7)
    with building(device):
        layer = FusedMoE(num_experts, hidden, size, quant_config=scheme(), prefix="model.layers.0.mlp.experts")
        for expert in range(num_experts):
            load(layer, [((expert, "w1"), gate[0][expert]), ((expert, "w3"), up[0][expert])], "w13_weight")
            load(layer, [((expert, "w2"), down[0][expert])], "w2_weight")
        process_weights(layer)
        assert not list(layer.named_parameters()) or isinstance(layer.packed["w13"], PlainExperts)
        x = inputs(5, hidden)
        ids = torch.tensor([[0, 2], [2, 0], [1, 0], [2, 1], [0, 1]])
        weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(3))
        output = layer(x, weights, ids)
    expected = torch.stack(
        [
            sum(
                weight * experts_output(row, gate[1][expert], up[1][expert], down[1][expert])
                for weight, expert in zip(of_row, chosen.tolist(), strict=True)
            )
            for row, of_row, chosen in zip(x.float(), weights, ids, strict=True)
        ]
    )
    error = (output.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.03


@pytest.mark.parametrize("types", [("MXFP4", "MXFP4"), ("Q4_0", "Q8_0")])
def test_experts_whose_rows_take_turns(types: tuple[str, str]) -> None:
    """Gate and up of gpt-oss, of one type and of two, on two ranks."""
    (gate, gate_values), (up, up_values) = (weight_of(kind, (2, 64, 96), seed) for seed, kind in enumerate(types))
    together = torch.stack((gate_values, up_values), dim=2).flatten(1, 2)
    with building():
        for rank in range(2):
            layer = FusedMoE(
                2, 96, 64, SwigluOAIAndMul(), is_transposed=True, quant_config=scheme(), prefix="experts",
                tp_group=RankGroup(rank, 2),
            )  # fmt: skip
            down = weight_of("Q8_0", (2, 96, 64))[0]
            for expert in range(2):
                load(layer, [((expert, "w1"), gate[expert]), ((expert, "w3"), up[expert])], "w13_weight")
                load(layer, [((expert, "w2"), down[expert])], "w2_weight")
            process_weights(layer)
            packed: Any = layer.packed["w13"]
            experts: list[PackedWeight] = list(packed.experts)
            for expert in range(2):
                rows = experts[expert].rows(torch.arange(64))
                expected = together[expert, rank * 64 : (rank + 1) * 64]
                assert torch.equal(rows.bfloat16(), expected.bfloat16())


def test_what_is_loaded_as_values() -> None:
    tensor, values = weight_of("Q4_K", (64, 256))
    with building():
        split = ColumnParallelLinear(256, 64, bias=False, quant_config=scheme(), prefix="self_attn.kv_b_proj")
        router = ReplicatedLinear(256, 64, bias=False, params_dtype=torch.float32, quant_config=scheme(), prefix="gate")
        for layer, dtype in ((split, torch.bfloat16), (router, torch.float32)):
            load(layer, [(None, tensor)])
            assert torch.equal(layer.get_parameter("weight"), values.to(dtype))
    assert not scheme("float32").quantizes_layers
    assert scheme("bfloat16").quantizes_layers


def test_a_transposed_layer_keeps_blocks() -> None:
    """GPT-2's checkpoint has inputs first: the converter transposes, its change undoes that, the layer too."""

    class Transposed(RowParallelLinear):
        def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
            super().weight_loader(param, tensor.t(), shard_id)

    tensor, values = weight_of("Q4_K", (64, 256))
    with building():
        layer = Transposed(256, 64, bias=False, quant_config=scheme(), prefix="c_proj")
        load(layer, [(None, tensor.t())])
        process_weights(layer)
        assert layer.packed.nbytes == BLOCK_TYPES["Q4_K"].row_bytes(256) * 64
        assert_close(layer(inputs(3, 256))[0], inputs(3, 256).float() @ values.T)
