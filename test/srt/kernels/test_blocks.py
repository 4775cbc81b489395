"""Blocks of GGUF against the ``gguf`` package's own dequantization, bit for bit."""

import gguf
import numpy as np
import pytest
import torch

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.kernels.blocks import BLOCK_TYPES, PlainBlocks, dequantize_blocks, dequantize_into

TYPES = sorted(BLOCK_TYPES)


def random_blocks(block_type: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Bytes of any value: also scales that are infinite, not numbers, subnormal or negative."""
    generator = torch.Generator().manual_seed(seed)
    size = (*shape[:-1], BLOCK_TYPES[block_type].row_bytes(shape[-1]))
    return torch.randint(256, size, generator=generator, dtype=torch.uint8)


def expected_values(blocks: torch.Tensor, block_type: str) -> torch.Tensor:
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(blocks.contiguous().numpy(), gguf.GGMLQuantizationType[block_type])
    return torch.from_numpy(values)


def assert_same_bits(values: torch.Tensor, expected: torch.Tensor) -> None:
    assert values.dtype == expected.dtype == torch.float32
    assert values.shape == expected.shape
    assert torch.equal(values.isnan(), expected.isnan())
    is_number = ~expected.isnan()
    assert torch.equal(values[is_number].view(torch.int32), expected[is_number].view(torch.int32))


@pytest.mark.parametrize("block_type", TYPES)
def test_sizes_are_those_of_the_package(block_type: str) -> None:
    layout = BLOCK_TYPES[block_type]
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block_type]]
    assert (layout.num_values, layout.num_bytes) == sizes
    assert layout.row_bytes(3 * layout.num_values) == 3 * layout.num_bytes


@pytest.mark.parametrize("block_type", TYPES)
@pytest.mark.parametrize("shape", [(1, 256), (7, 768), (300, 512)])
def test_random_bytes_have_the_values_of_the_package(block_type: str, shape: tuple[int, int]) -> None:
    blocks = random_blocks(block_type, shape, seed=shape[0])
    assert_same_bits(dequantize_blocks(blocks, block_type), expected_values(blocks, block_type))


@pytest.mark.parametrize("block_type", TYPES)
def test_extreme_bytes_have_the_values_of_the_package(block_type: str) -> None:
    layout = BLOCK_TYPES[block_type]
    of_each_byte = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, layout.num_bytes)
    one_set = torch.zeros(layout.num_bytes * 8, layout.num_bytes, dtype=torch.uint8)
    bits = torch.arange(layout.num_bytes * 8)
    one_set[bits, bits // 8] = (1 << bits % 8).to(torch.uint8)
    for blocks in (of_each_byte, one_set, ~one_set):
        assert_same_bits(dequantize_blocks(blocks, block_type), expected_values(blocks, block_type))


@pytest.mark.parametrize("block_type", ["Q4_0", "Q5_1", "Q8_0"])
def test_what_the_package_quantized_comes_back(block_type: str) -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    blocks = torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[block_type]))
    values = dequantize_blocks(blocks, block_type)
    assert_same_bits(values, expected_values(blocks, block_type))
    assert (values - weight).abs().max() < 0.5


def test_views_rows_and_experts_are_dequantized() -> None:
    blocks = random_blocks("Q4_K", (3, 6, 512))
    every = expected_values(blocks, "Q4_K")
    assert_same_bits(dequantize_blocks(blocks, "Q4_K"), every)
    assert_same_bits(dequantize_blocks(blocks[1, ::2], "Q4_K"), every[1, ::2])
    assert_same_bits(dequantize_blocks(blocks[..., 144:], "Q4_K"), every[..., 256:])
    assert_same_bits(dequantize_blocks(blocks[2, 3], "Q4_K"), every[2, 3])
    assert dequantize_blocks(blocks[:, :0], "Q4_K").shape == (3, 0, 512)


def test_values_are_written_in_another_dtype() -> None:
    blocks = random_blocks("Q6_K", (600, 256))
    out = torch.empty(600, 256, dtype=torch.bfloat16)
    dequantize_into(out, blocks, "Q6_K")
    expected = expected_values(blocks, "Q6_K").bfloat16()
    assert torch.equal(out.view(torch.int16)[~expected.isnan()], expected.view(torch.int16)[~expected.isnan()])


def quantized(num_rows: int, num_inputs: int, block_type: str = "Q8_0") -> torch.Tensor:
    weight = torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(2))
    return torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[block_type]))


@pytest.mark.parametrize("num_rows", [1, 33, 2500])  # more than are multiplied at once
def test_plain_blocks_multiply_and_give_rows(num_rows: int) -> None:
    blocks, num_inputs = quantized(num_rows, 96), 96
    packed = provider_named("reference").pack_blocks(blocks, "Q8_0", num_inputs)
    weight = expected_values(blocks, "Q8_0")
    x, bias = torch.randn(2, 3, num_inputs), torch.randn(num_rows)
    torch.testing.assert_close(packed.apply(x, bias), x @ weight.T + bias, rtol=1e-5, atol=1e-4)
    assert packed.apply(x.bfloat16()).dtype == torch.bfloat16
    assert packed.apply(x.bfloat16(), out_dtype=torch.float32).dtype == torch.float32
    ids = torch.tensor([num_rows - 1, 0, num_rows - 1])
    assert torch.equal(packed.rows(ids), weight[ids])
    assert packed.num_rows == num_rows
    assert packed.nbytes == blocks.nbytes


def test_what_cannot_be_blocks_is_refused() -> None:
    blocks = torch.zeros(2, 36, dtype=torch.uint8)
    with pytest.raises(ValueError, match="unknown type of blocks 'Q9_K'; have Q4_0, "):
        dequantize_blocks(blocks, "Q9_K")
    with pytest.raises(ValueError, match=r"whole blocks of 20 bytes, not torch\.uint8 \[2, 36\]"):
        dequantize_blocks(blocks, "Q4_1")
    with pytest.raises(ValueError, match=r"not torch\.int8"):
        PlainBlocks(blocks.view(torch.int8), "Q4_0")
    with pytest.raises(ValueError, match=r"have values \[2, 64\], not \[2, 32\]"):
        dequantize_into(torch.empty(2, 32), blocks, "Q4_0")
    with pytest.raises(ValueError, match=r"32 inputs.*\[2, 36\]"):
        provider_named("reference").pack_blocks(blocks, "Q4_0", 32)
