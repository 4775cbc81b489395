"""Sorting by expert, grouped products and weighted sums in C++, on every instruction set, against plain torch."""

import random
from typing import Any

import pytest
import torch
from torch import nn

from rtp_llm.srt.device.choice import building_for, provider_named
from rtp_llm.srt.devices.cpu import linear, moe
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.kernels.packed import OneByOne, PlainDense
from rtp_llm.srt.layers.activation import SwigluOAIAndMul
from rtp_llm.srt.layers.moe import FusedMoE
from rtp_llm.srt.layers.quantization.base import process_weights
from rtp_llm.srt.models.building import built_as

FUNCTIONS = [moe._function, moe._grouped_gemm, linear._function]


@pytest.fixture(autouse=True)
def seed() -> None:
    value = random.randrange(1 << 31)
    print(f"seed {value}")
    torch.manual_seed(value)


@pytest.mark.parametrize("num_ids", [0, 1, 10, 1003])
def test_grouping(isa: str, num_ids: int) -> None:
    ids = torch.randint(0, 9, (num_ids,))
    ids[ids == 4] = 5  # a group without rows
    for found, expected in zip(moe.group_rows(ids, 9), reference.group_rows(ids, 9), strict=True):
        assert torch.equal(found, expected)


def test_experts_that_do_not_exist_are_refused(isa: str) -> None:
    for wrong in (-1, 4):
        with pytest.raises(IndexError, match=r"experts must be in \[0, 4\), not"):
            moe.group_rows(torch.tensor([0, wrong, 2]), 4)


@pytest.mark.parametrize("rows_per_group", [[0, 0, 0], [1, 0, 2], [0, 13, 1], [30, 5, 61], [25, 200, 0]])
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (64, 96), (258, 130)])
@pytest.mark.parametrize("dtype", moe.HALVES)
def test_grouped_products(isa: str, rows_per_group: list[int], shape: tuple[int, int], dtype: torch.dtype) -> None:
    counts = torch.tensor(rows_per_group)
    x, weight = torch.randn(int(counts.sum()), shape[1]).to(dtype), torch.randn(3, *shape).to(dtype)
    packed = moe.ExpertPanels(weight)
    single = {torch.bfloat16: linear.BFloat16Panels, torch.float16: linear.Float16Panels}[dtype]
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for bias in (None, torch.randn(3, shape[0]).to(dtype)):
        expected = reference.grouped_linear(x.float(), weight.float(), counts, None if bias is None else bias.float())
        result = packed.apply(x, counts, bias)
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=1e-4)
        for group, rows in enumerate(torch.arange(len(x)).split(rows_per_group)):  # as if it were alone
            alone = single(weight[group]).apply(x[rows], None if bias is None else bias[group])
            assert torch.equal(result[rows], alone)


def experts_in_8_bits(num_experts: int, shape: tuple[int, int]) -> list[linear.Int8Panels]:
    values = torch.randint(-127, 128, (num_experts, *shape), dtype=torch.int8)
    return [linear.Int8Panels(weight, torch.rand(shape[0])) for weight in values]


@pytest.mark.parametrize("rows_per_group", [[0, 0, 0], [1, 0, 2], [0, 13, 1], [25, 60, 0]])
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (258, 130)])
@pytest.mark.parametrize("dtype", moe.DTYPES)
def test_grouped_products_in_8_bits(
    isa: str, rows_per_group: list[int], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    counts = torch.tensor(rows_per_group)
    x = torch.randn(int(counts.sum()), shape[1]).to(dtype)
    experts = experts_in_8_bits(3, shape)
    packed = provider_named("cpu").group_experts(experts)
    assert isinstance(packed, moe.Int8Experts)
    for bias in (None, torch.randn(3, shape[0]), torch.randn(3, shape[0]).bfloat16()):
        result = packed.apply(x, counts, bias)
        assert torch.equal(result, OneByOne(experts).apply(x, counts, bias))


def test_experts_of_several_shapes_are_not_grouped(isa: str) -> None:
    pair = experts_in_8_bits(2, (4, 6))
    for other in (*experts_in_8_bits(1, (4, 8)), PlainDense(torch.randn(4, 6))):
        assert isinstance(provider_named("cpu").group_experts([*pair, other]), OneByOne)


def test_wrong_rows_are_refused_in_8_bits(isa: str) -> None:
    packed, counts = moe.Int8Experts(experts_in_8_bits(2, (4, 6))), torch.tensor([1, 1])
    for x in (torch.zeros(2, 6).double(), torch.zeros(2, 5)):
        with pytest.raises(ValueError, match=r"experts \[2, 4, 6\] take bfloat16 or float32 \[rows, 6\] in 2 groups"):
            packed.apply(x, counts)
    with pytest.raises(ValueError, match=r"groups have \[1, 1\] rows, but x has 3"):
        packed.apply(torch.zeros(3, 6), counts)


def test_wrong_rows_are_refused(isa: str) -> None:
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        packed, counts = moe.ExpertPanels(torch.randn(2, 4, 6).to(dtype)), torch.tensor([1, 1])
        for x in (torch.zeros(2, 6), torch.zeros(2, 5).to(dtype)):
            with pytest.raises(ValueError, match=rf"experts \[2, 4, 6\] take {name} \[rows, 6\] in 2 groups"):
                packed.apply(x, counts)
        with pytest.raises(ValueError, match=r"groups have \[1, 1\] rows, but x has 3"):
            packed.apply(torch.zeros(3, 6).to(dtype), counts)


@pytest.mark.parametrize(("num_tokens", "top_k", "size"), [(0, 2, 8), (1, 8, 33), (7, 3, 100), (300, 4, 64)])
def test_gathering_and_weighted_sums(isa: str, num_tokens: int, top_k: int, size: int) -> None:
    ids = torch.rand(num_tokens, 16).topk(top_k).indices
    x, weights = torch.randn(num_tokens, size).bfloat16(), torch.rand(num_tokens, top_k)
    _, order, places = moe.group_rows(ids.flatten(), 16)
    for source in (x, x.float(), torch.cat([x, x], dim=1)[:, :size]):
        assert torch.equal(moe.gather_rows(source, order, top_k), reference.gather_rows(source, order, top_k))
    rows = torch.randn(num_tokens * top_k, size)
    assert torch.equal(moe.sum_rows(rows, places, weights), reference.sum_rows(rows, places, weights))
    for dtype, tolerance in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        halves = rows.to(dtype)
        expected = reference.sum_rows(halves.double(), places, weights.to(dtype))
        result = moe.sum_rows(halves, places, weights)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=1e-6)
        if num_tokens:
            halves[places[0], 0] = torch.nan
            result = moe.sum_rows(halves, places, weights)
            assert result[0, 0].isnan() and result.isnan().sum() == 1


@pytest.mark.parametrize("activation", ["silu", SwigluOAIAndMul()])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dtype", moe.HALVES)
def test_a_packed_layer(isa: str, activation: str | nn.Module, rank: int, dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = dict(num_experts=6, hidden_size=40, intermediate_size=96, activation=activation)
    options: dict[str, Any] = dict(bias=True, reduce_results=False, params_dtype=dtype, tp_group=RankGroup(rank, 2))
    with built_as(str(dtype).removeprefix("torch."), "cpu"):
        packed = FusedMoE(**sizes, **options)
        with building_for(provider_named("reference")):
            plain = FusedMoE(**sizes, **options)
        for ours, theirs in zip(packed.parameters(), plain.parameters(), strict=True):
            theirs.data = ours.data.normal_(std=0.3).clone()
        process_weights(packed)
    assert [type(weight) for weight in packed.packed.values()] == [moe.ExpertPanels, moe.ExpertPanels]
    assert not hasattr(packed, "w13_weight") and not hasattr(packed, "w2_weight")
    for num_tokens in (0, 1, 50):
        x, ids = torch.randn(num_tokens, 40).to(dtype), torch.rand(num_tokens, 6).topk(3).indices
        weights = torch.rand(num_tokens, 3)
        result, expected = packed(x, weights, ids), plain(x, weights, ids)
        assert result.shape == expected.shape
        assert (result - expected).float().norm() <= 0.01 * expected.float().norm()
        for token in range(min(num_tokens, 3)):
            alone = packed(x[[token]], weights[[token]], ids[[token]])
            assert torch.equal(alone[0], result[token])
