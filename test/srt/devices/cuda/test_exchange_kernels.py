"""Sums over ranks that read each other's memory, in Triton's interpreter, with ranks as tensors; and compiled."""

from importlib import import_module
from typing import Any

import pytest
import torch

from rtp_llm.srt.distributed.unsummed import NormOfSum
from rtp_llm.srt.kernels import reference
from triton_compile import check_compiled, launches_of
from triton_process import compiled, interpreted


def module(name: str) -> Any:
    return import_module(f"rtp_llm.srt.devices.cuda.{name}")


class Ranks:
    """Ranks of one thread: all launch the halves of their kernels that tell the others, then those that sum."""

    def __init__(self, num_ranks: int) -> None:
        self.kernels = module("kernels.exchange")
        num_bytes = self.kernels.memory_bytes(num_ranks)
        memories = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(num_ranks)]
        self.exchanges = [module("exchange").PeerExchange(rank, memories, "cpu") for rank in range(num_ranks)]

    def sums(self, parts: list[torch.Tensor], norm: Any = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        results = []
        for halves in ((True, False), (False, True)):
            for rank, (each, part) in enumerate(zip(self.exchanges, parts, strict=True)):
                own = part.clone() if halves[0] else part
                args = own, each._addresses, each._exchanges, rank, norm, halves
                results.append(self.kernels.sum_rows(*args))
        return results[len(parts) :]


def total_of(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


@interpreted
@pytest.mark.parametrize(
    ("num_ranks", "dtype"),
    [
        (2, torch.float16),
        (3, torch.float32),
        pytest.param(2, torch.float32, marks=pytest.mark.slow),
        pytest.param(3, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_sums(num_ranks: int, dtype: torch.dtype) -> None:
    """In float32, in the order of ranks: of several shapes one after the other, in the same places."""
    ranks = Ranks(num_ranks)
    for num_rows, size in [(3, 40), (1, 4096), (5, 7), (3, 40), (64, 1), (2, 333)]:
        parts = [torch.randn(num_rows, size, dtype=dtype) for _ in range(num_ranks)]
        expected = total_of(parts)
        for result, _ in ranks.sums(parts):
            assert torch.equal(result, expected)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kernel", ["rms_norm", "gemma_rms_norm"])
def test_norms_of_sums(kernel: str, dtype: torch.dtype) -> None:
    ranks, norms = Ranks(2), module("kernels.exchange")
    kind = {"rms_norm": norms.RMS.value, "gemma_rms_norm": norms.GEMMA.value}[kernel]
    for num_rows, size in [(1, 64), (4, 100), (2, 2050)]:
        parts = [torch.randn(num_rows, size, dtype=dtype) for _ in range(2)]
        residual, weight = torch.randn(num_rows, size, dtype=dtype), torch.randn(size, dtype=dtype)
        expected = getattr(reference, f"add_{kernel}")(total_of(parts), residual, weight, 1e-6)
        before = [part.clone() for part in parts]
        for normed, added in ranks.sums(parts, (kind, residual, weight, 1e-6)):
            assert torch.equal(added, expected[1])
            torch.testing.assert_close(normed, expected[0], rtol=2e-3 if dtype == torch.float16 else 2e-6, atol=1e-5)
        assert all(torch.equal(*pair) for pair in zip(parts, before, strict=True)), "the summands stay as they are"


@interpreted
def test_what_is_summed_here() -> None:
    exchange = Ranks(2).exchanges[0]
    assert (
        exchange.takes(torch.zeros(())) and exchange.takes(torch.zeros(64, 100)) and exchange.defers(torch.zeros(2, 9))
    )
    assert not exchange.defers(torch.zeros(9)), "votes and the like are summed at once"
    assert not exchange.takes(torch.zeros(65, 4)), "more rows than there are places"
    assert not exchange.takes(torch.zeros(1, 4097)) and exchange.takes(torch.zeros(1, 4097).half()), (
        "longer than a place"
    )
    assert not exchange.takes(torch.zeros(2, dtype=torch.int64)) and not exchange.takes(torch.zeros(0, 4))
    assert not exchange.takes(torch.zeros(40, 4000)), "more bytes than one step is good for"
    layer_norm = NormOfSum("layer_norm", torch.ones(4), 1e-6)
    assert exchange.add_norm(torch.zeros(2, 4), torch.zeros(2, 4), layer_norm) is None
    assert exchange.all_reduce(torch.zeros(65, 4)) is False and exchange.all_gather(torch.zeros(2, 4)) is None


def launch_all() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        addresses, exchanges = torch.zeros(8, dtype=torch.int64), torch.zeros(64, dtype=torch.int32)
        for size in (1, 2048, 4096, 8192 * 2 // dtype.itemsize):
            x = torch.zeros(4, size, dtype=dtype)
            for norm in (None, (1, x, x[0], 1e-6), (2, x, x[0], 1e-6)):
                module("kernels.exchange").sum_rows(x, addresses, exchanges, 3, norm)


@compiled
@pytest.mark.parametrize("capability", [90, *(pytest.param(each, marks=pytest.mark.slow) for each in (80, 100))])
def test_sums_compile(capability: int) -> None:
    launches = launches_of(launch_all)
    assert len(launches) > 10
    for launch in launches[9:11] if capability == 90 else launches:
        made = check_compiled(launch, capability)
        assert ".global.sys.acquire" in made.ptx and "atom.global.sys.release" in made.ptx
        wide = ".v4.b32" if dict(launch.constants)["BLOCK"] > 1 else ""
        assert f"ld.volatile.global{wide}" in made.ptx, (
            "what others wrote is not read from a cache, and 16 bytes at once"
        )
