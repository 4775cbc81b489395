"""Random weights in GGUF's blocks, of every type; the package ``gguf`` can make only some of them of values."""

from pathlib import Path

import gguf
import numpy as np
import torch

from rtp_llm.srt.kernels.blocks import BLOCK_TYPES

# Where a block has its float16 numbers.
_HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def random_blocks(block_type: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """[..., bytes per row] uint8 of weights of ``shape``, whose values are about as large as 1."""
    generator = torch.Generator().manual_seed(seed)
    layout = BLOCK_TYPES[block_type]
    size = (*shape[:-1], shape[-1] // layout.num_values, layout.num_bytes)
    blocks = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    if block_type == "MXFP4":
        blocks[..., 0] = torch.randint(124, 128, size[:-1], generator=generator, dtype=torch.uint8)
    for place in _HALVES.get(block_type, ()):
        numbers = 0.5 + torch.rand(*size[:-1], 1, generator=generator)
        blocks[..., place : place + 2] = numbers.half().view(torch.uint8)
    largest = values_of(blocks.flatten(-2), block_type).abs().max()
    for place in _HALVES.get(block_type, ()):
        numbers = blocks[..., place : place + 2].contiguous().view(torch.float16).float() / largest
        blocks[..., place : place + 2] = numbers.half().view(torch.uint8)
    return blocks.flatten(-2)


def values_of(blocks: torch.Tensor, block_type: str) -> torch.Tensor:
    """As the package computes them, in float32."""
    values = gguf.quants.dequantize(blocks.contiguous().numpy(), gguf.GGMLQuantizationType[block_type])
    return torch.from_numpy(np.ascontiguousarray(values))


def write_tensors(path: Path, architecture: str, tensors: dict[str, tuple[str, torch.Tensor]]) -> Path:
    """Write a GGUF of tensors, each of a type and its bytes, or its float32 values, and without other metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
