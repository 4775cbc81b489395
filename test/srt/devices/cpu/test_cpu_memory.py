"""The memory of packed weights."""

import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rtp_llm.srt.devices.cpu import elementwise, memory
from rtp_llm.srt.devices.cpu.memory import ALIGNMENT, BLOCK_BYTES, Arena, Reused, take_in_background


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


class BusyClock:
    """The module ``time`` in a process whose other threads compute for ``busy_s``."""

    def __init__(self, busy_s: float, on_sleep: Callable[[], None] = lambda: None) -> None:
        self.busy_s, self.on_sleep, self.now, self.sleeps = busy_s, on_sleep, 0.0, 0

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return min(self.now, self.busy_s)

    def thread_time(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        self.on_sleep()
        self.now, self.sleeps = self.now + seconds, self.sleeps + 1
        time.sleep(0)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is not taken elsewhere")
def test_memory_is_taken_once_other_threads_are_idle(monkeypatch: pytest.MonkeyPatch):
    tensor, resident = Arena().empty(memory.PIECE_BYTES, dtype=torch.uint8), []
    clock = BusyClock(3 * memory.WATCHED_S, lambda: resident.append(resident_bytes()))
    monkeypatch.setattr(memory, "time", clock)
    take_in_background([tensor], tensor.nbytes).join()
    assert clock.sleeps == 4  # one more than it is busy
    assert all(seen - resident[0] < memory.PIECE_BYTES // 2 for seen in resident)
    assert resident_bytes() - resident[0] >= memory.PIECE_BYTES // 2 or not populates()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is not taken elsewhere")
def test_memory_that_is_not_taken_yet_can_be_freed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "time", BusyClock(math.inf))
    before, tensor = mapped_bytes(), Arena().empty(BLOCK_BYTES, dtype=torch.uint8)
    thread = take_in_background([tensor], tensor.nbytes)
    assert thread.is_alive()
    del tensor
    thread.join(30)
    assert not thread.is_alive() and mapped_bytes() - before < BLOCK_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="memory is not taken elsewhere")
def test_a_process_may_end_while_memory_is_taken():
    script = (
        "import torch\nfrom rtp_llm.srt.devices.cpu.memory import Arena, take_in_background\n"
        "tensors = [Arena().empty(1 << 20, dtype=torch.uint8) for _ in range(500)]\n"
        "take_in_background(tensors, 500 << 20)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (run.returncode, run.stderr) == (0, "")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_memory_is_used_again_once_nothing_lies_in_it():
    memory = Reused()
    first = memory.empty((3, 5), torch.float32)
    part, address = first[1:, 2], first.data_ptr()
    assert first.is_contiguous() and first.shape == (3, 5) and first.dtype == torch.float32
    del first
    assert memory.empty((3, 5), torch.float32).untyped_storage().data_ptr() != address  # there is a view of it still
    del part
    assert memory.empty((30,), torch.bfloat16).data_ptr() == address
    for shape, dtype in (((0, 4), torch.int8), ((), torch.float64), ((2, 3 << 20), torch.int16)):
        tensor = memory.empty(shape, dtype)
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.fill_(1).sum() == tensor.numel()


def test_lent_memory_is_used_again():
    memory = Reused()
    first = memory.empty((4, 5), torch.float32)[1:, 2:].fill_(3)
    lent, elsewhere = memory.lent(first), torch.ones(3)
    assert torch.equal(lent, first) and lent.stride() == first.stride() and memory.lent(elsewhere) is elsewhere
    assert memory.empty((4, 5), torch.float32).data_ptr() != first.untyped_storage().data_ptr()
    del first
    memory.empty((4, 5), torch.float32).fill_(2)
    assert lent.unique().tolist() == [2]


def test_tensors_of_unequal_sizes_fit_the_same_memory():
    memory = Reused()
    for num_rows in range(16, 8, -1):
        memory.empty((num_rows, 1 << 18), torch.float32)
    assert sum(len(pieces) for pieces in memory._pieces.values()) == 1


def test_a_small_tensor_takes_larger_memory_that_is_unused():
    memory = Reused()
    large, middle = memory.empty((9 << 20,), torch.uint8), memory.empty((3 << 20,), torch.uint8)
    address = middle.data_ptr()
    del large, middle
    first, second = memory.empty((1 << 20,), torch.uint8), memory.empty((1 << 20,), torch.uint8)
    assert first.data_ptr() == address  # the smaller one of those that are large enough
    assert sum(len(pieces) for pieces in memory._pieces.values()) == 2
    assert not torch.equal(first.fill_(1), second.fill_(2))


def test_memory_like_another():
    memory = Reused()
    for tensor in (torch.randn(3, 4).t(), torch.randn(5, 6)[1:, 2:], torch.empty(0, 2)):
        like = memory.like(tensor)
        assert like.shape == tensor.shape and like.stride() == tensor.stride() and like.dtype == tensor.dtype


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_other_sizes_is_given_back():
    memory, before = Reused(most_bytes=100 << 20), mapped_bytes()
    for megabytes in range(30, 60):
        memory.empty((megabytes << 20,), torch.uint8)
    assert mapped_bytes() - before <= 110 << 20
    kept = [memory.empty((40 << 20,), torch.uint8).fill_(i) for i in range(4)]  # more than that is in use
    memory.empty((50 << 20,), torch.uint8).fill_(9)
    assert [tensor.unique().tolist() for tensor in kept] == [[0], [1], [2], [3]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_not_used_is_given_back_when_asked():
    memory = Reused()
    used, before = memory.empty((30 << 20,), torch.uint8).fill_(1), mapped_bytes()
    memory.empty((50 << 20,), torch.uint8)
    assert mapped_bytes() - before >= 50 << 20
    memory.give_back()
    assert mapped_bytes() - before < 1 << 20 and used.unique().tolist() == [1]


def test_results_of_kernels_are_large_ones_of_it(monkeypatch):
    monkeypatch.setattr(memory, "_results", Reused())
    weight = torch.ones(1024).bfloat16()
    for rows, num_pieces in ((8, 0), (600, 1), (600, 1), (1200, 2)):
        elementwise.rms_norm(torch.randn(rows, 1024).bfloat16(), weight, 1e-6)
        assert len(memory._results._pieces) == num_pieces


def populates() -> bool:
    """Whether this kernel has MADV_POPULATE_WRITE."""
    release = [int(number) for number in os.uname().release.split("-")[0].split(".")[:2]]
    return release >= [5, 14]
