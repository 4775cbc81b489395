"""The memory of packed weights."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from rtp_llm.srt.kernels.cpu.memory import ALIGNMENT, BLOCK_BYTES, Arena


def test_tensors_lie_apart():
    arena = Arena()
    shapes = [(3, 5), (1,), (0, 4), (7, 2, 2), (BLOCK_BYTES // 4,), (BLOCK_BYTES + 1,), (2, 3)]
    tensors = [arena.empty(*shape, dtype=torch.float32).fill_(i) for i, shape in enumerate(shapes)]
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape and tensor.is_contiguous()
        assert tensor.data_ptr() % ALIGNMENT == 0 and bool((tensor == i).all())


def test_a_copy():
    tensor = torch.randn(5, 6).t()
    copy = Arena().copy(tensor)
    assert copy.is_contiguous() and torch.equal(copy, tensor)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_block_is_freed_with_its_last_tensor():
    arena, before = Arena(), mapped_bytes()
    first, second = (arena.empty(BLOCK_BYTES // 2, dtype=torch.int8) for _ in range(2))
    arena.empty(BLOCK_BYTES, dtype=torch.int8)  # so that the arena goes on in a block of its own
    del arena, first
    assert mapped_bytes() - before >= BLOCK_BYTES
    assert second.fill_(1).sum() == BLOCK_BYTES // 2
    del second
    assert mapped_bytes() - before < BLOCK_BYTES


def mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
