"""The memory of packed weights."""

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rtp_llm.srt.kernels.cpu.memory import ALIGNMENT, BLOCK_BYTES, Arena, take_in_background


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_and_keeps_what_it_contains():
    arena = Arena()
    tensors = [arena.empty(32 << 20, dtype=torch.uint8) for _ in range(2)]
    tensors[1][1000:2000] = 7
    before = resident_bytes()
    take_in_background(tensors, 48 << 20).join()
    taken = resident_bytes() - before
    assert 40 << 20 <= taken <= 56 << 20 or not populates()
    assert tensors[1][1000:2000].eq(7).all() and not tensors[1][2000:].any() and not tensors[0].any()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


FAULTS = """
import resource, torch
from rtp_llm.srt.kernels.cpu import memory

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (20, 3, 30, 7) * 4:
        torch.empty(size << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
memory.keep_freed()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_kept():
    """In a process of its own: it is for the whole process and for good."""
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, run.stdout.split())
    assert after < 100 < before


def populates() -> bool:
    """Whether this kernel has MADV_POPULATE_WRITE."""
    release = [int(number) for number in os.uname().release.split("-")[0].split(".")[:2]]
    return release >= [5, 14]
