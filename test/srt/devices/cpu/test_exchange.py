"""Exchanges through shared memory, between threads that stand for ranks: each has its place in the same memory."""

import mmap
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_ranks import ThreadGroup, _Meeting

from rtp_llm.srt.devices.cpu import exchange
from rtp_llm.srt.devices.cpu.binding import INT64, bind
from rtp_llm.srt.devices.cpu.exchange import SLOT_BYTES, SharedExchange, share_memory
from rtp_llm.srt.distributed.parallel_state import RankGroup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory is Linux's")
PLACE_OF_PROCESS = 16  # in a rank's line


def shared(num_ranks: int, timeout_s: float = 30.0) -> list[SharedExchange]:
    size = bind("exchange", "exchange_bytes", INT64, INT64, result=INT64)(num_ranks, SLOT_BYTES)
    memory = mmap.mmap(-1, size)
    return [SharedExchange(RankGroup(rank, num_ranks), memory, timeout_s) for rank in range(num_ranks)]


def on_all(ranks: list[SharedExchange], call: Callable[[int, SharedExchange], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(call, range(len(ranks)), ranks))


@pytest.mark.parametrize(
    ("num_ranks", "dtype"),
    [
        (2, torch.float32),
        (3, torch.bfloat16),
        *(
            pytest.param(num_ranks, dtype, marks=pytest.mark.slow)
            for num_ranks in (2, 3, 4)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ),
    ],
)
def test_sums(num_ranks: int, dtype: torch.dtype) -> None:
    """Sums are the same on all ranks: within a vector, by one rank alone, in shares of ranks, over several slots."""
    ranks = shared(num_ranks)
    slot = SLOT_BYTES // dtype.itemsize
    for size in (1, 7, 16, 1000, 20_011, slot, slot + 5, 2 * slot + 333):
        parts = [torch.randn(size).to(dtype) for _ in range(num_ranks)]
        expected = parts[0].float()
        for part in parts[1:]:
            expected = expected + part.float()
        sums = [part.clone() for part in parts]
        assert all(on_all(ranks, lambda rank, each, sums=sums: each.all_reduce(sums[rank])))
        assert all(torch.equal(total, expected.to(dtype)) for total in sums), size


def test_concatenations() -> None:
    ranks = shared(3)
    for shape in ((1,), (5, 7), (SLOT_BYTES // 2 + 3,)):
        parts = [torch.randint(100, shape) for _ in ranks]
        for gathered in on_all(ranks, lambda rank, each, parts=parts: each.all_gather(parts[rank])):
            assert torch.equal(gathered, torch.stack(parts))


def sums_of_experts(tokens: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: range) -> torch.Tensor:
    """Expert e multiplies by e + 1; others than these by nothing."""
    is_here = (ids >= experts.start) & (ids < experts.stop)
    factors = ((ids + 1) * weights * is_here).sum(dim=1, keepdim=True)
    return (tokens.float() * factors).to(tokens.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("counts", "width", "top_k"),
    [([1, 1], 5, 1), ([3, 9], 33, 4), ([1, 1, 8, 2], 16, 3), ([1, 150, 40], 4103, 2)],  # the last in several pieces
    ids=str,
)
def test_tokens_reach_their_experts_once(counts: list[int], width: int, top_k: int, dtype: torch.dtype) -> None:
    ranks, num_own, draw = shared(len(counts)), 3, torch.Generator().manual_seed(sum(counts))
    tokens = [torch.randn(count, width, generator=draw).to(dtype) for count in counts]
    weights = [torch.rand(count, top_k, generator=draw) for count in counts]
    scores = [torch.rand(count, num_own * len(counts), generator=draw) for count in counts]
    ids = [each.topk(top_k, dim=1).indices for each in scores]

    def run(rank: int, each: SharedExchange) -> torch.Tensor:
        experts = range(rank * num_own, (rank + 1) * num_own)
        for _ in range(3):  # whatever the turn is
            arrived = each.send_tokens(tokens[rank], weights[rank], ids[rank], counts, num_own)
            assert arrived is not None
            wanted = [(ids[r] // num_own == rank).any(dim=1) for r in range(len(counts))]
            assert len(arrived.tokens) == sum(int(w.sum()) for w in wanted)
            assert {tuple(x[:5].tolist()) for x in arrived.tokens} == {
                tuple(x[:5].tolist()) for own, w in zip(tokens, wanted, strict=True) for x in own[w]
            }
            sums = arrived.sums(sums_of_experts(arrived.tokens, arrived.topk_weights, arrived.topk_ids, experts))
        return sums

    for rank, sums in enumerate(on_all(ranks, run)):
        expected = torch.zeros(counts[rank], width)
        for r in range(len(counts)):
            experts = range(r * num_own, (r + 1) * num_own)
            expected += sums_of_experts(tokens[rank], weights[rank], ids[rank], experts).float()
        torch.testing.assert_close(sums, expected.to(dtype))


def test_other_numbers_of_tokens_than_ranks_know_of_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 0 has 2 tokens to send, but ranks have \[1, 1\]"):
        shared(2)[0].send_tokens(torch.ones(2, 4), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), [1, 1], 1)


def test_rows_that_are_too_long_for_a_slot_are_left_to_others() -> None:
    tokens = torch.ones(1, SLOT_BYTES // 8 + 1)  # of float32, for two ranks
    assert shared(2)[0].send_tokens(tokens, torch.ones(1, 2), torch.tensor([[0, 1]]), [1, 1], 1) is None
    assert shared(2)[0].send_tokens(tokens[:, :4].long(), torch.ones(1, 2), torch.tensor([[0, 1]]), [1, 1], 1) is None


def test_many_exchanges_of_ranks_that_come_at_any_time() -> None:
    ranks = shared(3)

    def run(rank: int, each: SharedExchange) -> list[float]:
        draw, totals = random.Random(rank), []
        for number in range(400):
            if draw.random() < 0.05:
                time.sleep(0.002)
            if number % 3 == 1:  # each rank's token has experts on all
                token = torch.full((1, 5_000), float(rank + number))
                arrived = each.send_tokens(token, torch.ones(1, 3), torch.tensor([[0, 1, 2]]), [1, 1, 1], 1)
                assert arrived is not None
                totals.append(float(arrived.sums(arrived.tokens.sum(dim=0).expand(3, -1))[0, -1]) / 3)
                continue
            if number % 3 == 2:
                gathered = each.all_gather(torch.tensor([rank + number]))
                assert gathered is not None
                totals.append(float(gathered.sum()))
                continue
            x = torch.full((30_000 if number % 2 else 3,), float(rank + number))
            assert each.all_reduce(x)
            totals.append(x[-1].item())
        return totals

    assert on_all(ranks, run) == [[float(3 * number + 3) for number in range(400)]] * 3


def test_other_tensors_are_left_to_others() -> None:
    assert shared(2)[0].all_reduce(torch.ones(3, dtype=torch.int64)) is False


def test_a_rank_that_does_not_come_is_an_error() -> None:
    first, _ = shared(2, timeout_s=0.2)
    with pytest.raises(RuntimeError, match="did not come in time"):
        first.all_reduce(torch.ones(3))


def test_a_rank_that_has_died_is_an_error_at_once() -> None:
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    first, _ = shared(2, timeout_s=60)
    line = 128  # the second rank's
    first._memory[line + PLACE_OF_PROCESS : line + PLACE_OF_PROCESS + 8] = ended.pid.to_bytes(8, "little")
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="another rank has died"):
        first.all_gather(torch.ones(3))
    assert time.monotonic() - started < 30


def groups(num_ranks: int) -> list[ThreadGroup]:
    meeting = _Meeting(num_ranks)
    return [ThreadGroup(rank, meeting) for rank in range(num_ranks)]


def test_ranks_agree_on_a_file_that_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FOLDER", tmp_path)
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda group: share_memory(group, 30.0), groups(2)))
    assert all(isinstance(each, SharedExchange) for each in made) and list(tmp_path.iterdir()) == []
    sums = [torch.ones(5), torch.full((5,), 2.0)]
    assert all(on_all(made, lambda rank, each: each.all_reduce(sums[rank])))  # type: ignore[arg-type]
    assert sums[0].tolist() == sums[1].tolist() == [3.0] * 5


def test_without_room_nobody_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FOLDER", tmp_path / "missing")
    monkeypatch.setattr(exchange.dist, "get_backend", lambda group: "gloo")
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda group: share_memory(group, 30.0), groups(2))) == [None, None]
    assert share_memory(RankGroup(0, 1), 30.0) is None
