"""Ranks as threads of the test's process: no processes to start, and a debugger sees all of them."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import torch

from rtp_llm.srt.distributed.parallel_state import GROUPS, RankGroup, World, WorldShape, seen_as
from rtp_llm.srt.distributed.unsummed import NormOfSum, Unsummed, plain
from rtp_llm.srt.engine.executor import DrawnTokens, Executor, joined_results
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.plan import StepPlan, StepResult, TokenMasks
from rtp_llm.srt.worker.own_rows import OwnRows
from rtp_llm.srt.worker.step import WorkerStep
from rtp_llm.srt.worker.worker import LoadedModel, Worker, WorkerConfig

TIMEOUT_S = 60.0


class _Meeting:
    """What the threads of a group share."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.tensors = [torch.empty(0)] * size
        self.sent: dict[tuple[int, int], SimpleQueue] = {
            (a, b): SimpleQueue() for a in range(size) for b in range(size)
        }


class _Sent:
    def wait(self) -> None:
        pass

    def is_completed(self) -> bool:
        return True


class ThreadGroup(RankGroup):
    """A rank among threads of this process."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        super().__init__(rank, meeting.barrier.parties)
        self._meeting = meeting

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.world_size == 1 else self._exchange(x, lambda parts: torch.stack(parts).sum(dim=0))

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return x if self.world_size == 1 else self._exchange(x, lambda parts: torch.cat(parts, dim=dim))

    def all_to_all(self, x: torch.Tensor, counts: Sequence[Sequence[int]]) -> torch.Tensor:
        if self.world_size == 1:
            return x
        sent = [list(of_rank) for of_rank in counts]
        place = self.rank
        return self._exchange(
            x, lambda parts: torch.cat([part.split(of)[place] for part, of in zip(parts, sent, strict=True)])
        )

    def _exchange(self, x: torch.Tensor, join: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        self._meeting.tensors[self.rank] = plain(x)
        self._meeting.barrier.wait()
        joined = join(self._meeting.tensors)
        self._meeting.barrier.wait()
        return joined

    def send(self, x: torch.Tensor, rank: int) -> Any:
        self._meeting.sent[self.rank, rank].put(x.clone())
        return _Sent()

    def receive(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        return x.copy_(self._meeting.sent[rank, self.rank].get(timeout=TIMEOUT_S))


class SumsWithNorms:
    """Makes a group's sums wait for norms, as GPUs that read each other's memory do; ``normed`` counts those."""

    def __init__(self) -> None:
        self.normed = 0

    def of(self, group: ThreadGroup, x: torch.Tensor) -> torch.Tensor:
        later = _Later(self, group)
        return Unsummed.of(plain(x).contiguous(), later) if x.dim() > 1 and group.world_size > 1 else later.total(x)


class _Later:
    def __init__(self, sums: SumsWithNorms, group: ThreadGroup) -> None:
        self._sums, self._group = sums, group

    def total(self, x: torch.Tensor) -> torch.Tensor:
        return (
            x if self._group.world_size == 1 else self._group._exchange(x, lambda parts: torch.stack(parts).sum(dim=0))
        )

    def all_reduce(self, x: torch.Tensor) -> bool:
        x.copy_(self.total(x.clone()))
        return True

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, norm: NormOfSum) -> tuple[torch.Tensor, torch.Tensor]:
        self._sums.normed += 1
        kernel = getattr(reference, f"add_{norm.kernel}")
        result: tuple[torch.Tensor, torch.Tensor] = kernel(self.total(x.clone()), residual, norm.weight, norm.eps)
        return result


def thread_worlds(shape: WorldShape) -> list[World]:
    """Return the world of each rank."""
    groups: list[dict[str, RankGroup]] = [{} for _ in range(shape.size)]
    for name in GROUPS:
        for members in shape.members(name):
            meeting = _Meeting(len(members))
            for place, rank in enumerate(members):
                groups[rank][name] = ThreadGroup(place, meeting)
    return [World(shape, rank, of_rank) for rank, of_rank in enumerate(groups)]


def on_thread_ranks(shape: WorldShape, build: Callable[[], Any], run: Callable[[Any], Any]) -> list[Any]:
    """Build something for each rank, one after the other, then run all side by side; return each rank's result."""
    worlds, built = thread_worlds(shape), []
    for world in worlds:
        with seen_as(world):
            built.append(build())

    def run_on(world: World, each: Any) -> Any:
        with seen_as(world), torch.no_grad():
            return run(each)

    with ThreadPoolExecutor(shape.size) as threads:
        return list(threads.map(run_on, worlds, built))


class _ThreadStep:
    """``steps``: of the ranks that have results: of the last, or of all with requests of their own."""

    def __init__(self, steps: list[WorkerStep], drawn: DrawnTokens) -> None:
        self._steps, self._drawn = steps, drawn

    def result(self) -> StepResult:
        if len(self._steps) > 1:
            return joined_results([step.result() for step in self._steps])
        result = self._steps[0].result()
        self._drawn.take(self._steps[0].plan, result)
        return result


class ThreadExecutor(Executor):
    """A worker for each rank, each in a thread of the test's process. Steps are computed when they are submitted."""

    def __init__(self, config: WorkerConfig, depth: int = 0) -> None:
        self.depth = depth
        self._config = config
        self._worlds = thread_worlds(config.world_shape)
        self._threads = [ThreadPoolExecutor(1) for _ in self._worlds]
        self._building = threading.Lock()  # torch's default dtype is of the whole process
        self.workers: list[Worker] = []
        self._in_stages = config.world_shape.pipeline > 1
        self._own_rows: list[OwnRows | None] = [None for _ in self._worlds]
        self._drawn = DrawnTokens()

    def _on_all(self, call: Callable[[int], Any]) -> list[Any]:
        def on_rank(rank: int) -> Any:
            with seen_as(self._worlds[rank]):
                return call(rank)

        futures = [thread.submit(on_rank, rank) for rank, thread in enumerate(self._threads)]
        return [future.result() for future in futures]

    def load(self, progress: Callable[[int, int], None] | None = None) -> LoadedModel:
        def build(rank: int) -> Worker:
            with self._building:
                return Worker(replace(self._config, rank=rank), progress)

        self.workers = self._on_all(build)
        return LoadedModel.of_ranks([worker.loaded() for worker in self.workers])

    def init_cache(self, num_pages: list[int], max_rows: int, max_len: int, num_state_slots: int = 0) -> None:
        self.rpc("init_cache", num_pages, max_rows, max_len, num_state_slots)
        if self._config.world_shape.data > 1:
            self._own_rows = [OwnRows(rank, max_rows) for rank in range(len(self._worlds))]

    def submit(self, plan: StepPlan) -> _ThreadStep:
        if self._in_stages:
            self._drawn.put_into(plan)
        steps = [WorkerStep(plan, worker, own) for worker, own in zip(self.workers, self._own_rows, strict=True)]
        self._on_all(lambda rank: steps[rank].launch())
        self._last = steps
        return _ThreadStep(steps if self._config.world_shape.data > 1 else steps[-1:], self._drawn)

    def sample(self, masks: TokenMasks) -> None:
        for step in self._last:
            step.set_masks(masks)
        self._on_all(lambda rank: self._last[rank].launch())

    def rpc(self, method: str, *args: Any) -> list[Any]:
        return self._on_all(lambda rank: getattr(self.workers[rank], method)(*args))

    def shutdown(self) -> None:
        for thread in self._threads:
            thread.shutdown()
