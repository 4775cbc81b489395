"""Executors: the core's access to its workers, in its own process or in one process per rank."""

import os
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from rtp_llm.srt.models.loader import check_split
from rtp_llm.srt.models.registrations import pack_by_value, pack_registrations
from rtp_llm.srt.plan import StepPlan, StepResult, TokenMasks
from rtp_llm.srt.request_spec import MediaFile
from rtp_llm.srt.utils.ipc import receive, send
from rtp_llm.srt.utils.process import start_python
from rtp_llm.srt.utils.scratch import ScratchFolder
from rtp_llm.srt.worker.step import WorkerStep, check_masks, waits_for_masks
from rtp_llm.srt.worker.worker import LoadedModel, Worker, WorkerConfig

Progress = Callable[[int, int], None]


class StepHandle(Protocol):
    """A submitted step. ``result()`` waits for it; call it in the order of submission."""

    def result(self) -> StepResult: ...


class Executor(ABC):
    """The port between core and workers.

    At most ``depth`` steps are in flight when the host plans the next one: 0 where the worker computes in ``submit``,
    1 where a device computes on its own, one less than stages where workers are in stages. Steps are executed in the
    order of submission. A step with ``masked_rows`` draws its tokens only when ``sample`` passes the masks, which may
    be after the step before has been committed.
    """

    depth: int

    @abstractmethod
    def load(self, progress: Progress | None = None) -> LoadedModel: ...

    @abstractmethod
    def init_cache(self, num_pages: list[int], max_rows: int, max_len: int, num_state_slots: int = 0) -> None:
        """Reserve the cache; see ModelRunner.init_cache."""

    @abstractmethod
    def submit(self, plan: StepPlan) -> StepHandle: ...

    @abstractmethod
    def sample(self, masks: TokenMasks) -> None:
        """Pass the masks for the ``masked_rows`` of the step that was submitted last."""

    @abstractmethod
    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every rank's worker; return one answer per rank.

        Either no step is in flight, or the method uses neither the device nor the state of steps.
        """

    @abstractmethod
    def shutdown(self) -> None: ...


class DrawnTokens:
    """Tokens that the last stage of a pipeline drew, for the others: with the next plan they are told."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._ids: list[int] = []

    def take(self, plan: StepPlan, result: StepResult) -> None:
        for work, row in zip(plan.work, result.rows, strict=True):
            if work.sample and row.token_ids:
                self._rows.append(work.row)
                self._ids.append(row.token_ids[0])

    def put_into(self, plan: StepPlan) -> None:
        plan.drawn_rows, plan.drawn_ids = self._rows, self._ids
        self._rows, self._ids = [], []


class InProcessExecutor(Executor):
    """One worker in the core's process.

    ``delayed`` defers a step until its result is asked for, as if a device were busy with it: at depth 1 the host then
    plans each step without knowing the tokens of the one before.
    """

    def __init__(self, config: WorkerConfig, depth: int = 0, delayed: bool = False) -> None:
        self.depth = depth
        self._config = config
        self._delayed = delayed
        self._last: WorkerStep | None = None

    def load(self, progress: Progress | None = None) -> LoadedModel:
        self.worker = Worker(self._config, progress)
        return self.worker.loaded()

    def init_cache(self, num_pages: list[int], max_rows: int, max_len: int, num_state_slots: int = 0) -> None:
        self.worker.init_cache(num_pages, max_rows, max_len, num_state_slots)

    def submit(self, plan: StepPlan) -> StepHandle:
        self._last = WorkerStep(plan, self.worker)
        if not self._delayed:
            self._last.launch()
        return self._last

    def sample(self, masks: TokenMasks) -> None:
        if self._last is None:
            raise RuntimeError("masks came before any step was submitted")
        self._last.set_masks(masks)
        if not self._delayed:
            self._last.launch()

    def rpc(self, method: str, *args: Any) -> list[Any]:
        return [getattr(self.worker, method)(*args)]

    def shutdown(self) -> None:
        self._last = None


class RankProcess(Protocol):
    """What runs a rank: a process, or something that can be asked like one."""

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


class WorkerError(RuntimeError):
    """A worker process failed or died. The message contains the worker's own error, a note its traceback."""


class MultiProcessExecutor(Executor):
    """One worker process per rank; all get the same plans.

    The processes are this interpreter running ``rtp_llm.srt.worker.process`` with this process's ``sys.path``; each is
    reached over an inherited socket pair, which no other process can open. They end when the pair closes, and are
    killed when this process ends.

    Workers do not answer when a step is submitted, but when its result is asked for, rank 0 for all. With stages of a
    pipeline, the first rank of the last stage sends each result as soon as it has it, since a worker that computes the
    next step cannot be asked. A worker that fails ends, and with it the executor: every later call, and every step in
    flight, raises its error.
    """

    def __init__(self, config: WorkerConfig, dist_timeout_s: float, depth: int = 0) -> None:
        self.depth = depth
        self._config = config
        self._dist_timeout_s = dist_timeout_s
        self._processes: list[RankProcess] = []
        self._pipes: list[Connection] = []
        self._in_flight: deque[_RemoteStep] = deque()
        self._failure: WorkerError | None = None
        self._in_stages = config.world_shape.pipeline > 1
        self._joins_results = config.world_shape.data > 1
        self._results: deque[StepResult] = deque()  # that stages have sent
        self._drawn = DrawnTokens()
        self._rendezvous = ScratchFolder()
        self._init_method = f"file://{self._rendezvous.path}/store"  # where the ranks meet

    def load(self, progress: Progress | None = None) -> LoadedModel:
        """Start the workers, and wait until each has its part of the model.

        Raises:
            SplitError: the model cannot be divided over so many ranks; no worker was started.
            WorkerError: a worker failed or died.
        """
        args, shape = self._config.server_args, self._config.world_shape
        options = (args.load_format, args.model_impl, args.quantization, args.pp_split)
        check_split(self._config.model_config, shape, *options)
        registrations = pack_registrations()
        self._start_all(shape.size)
        for rank, pipe in enumerate(self._pipes):
            config = replace(self._config, rank=rank)
            send(pipe, (registrations, pack_by_value(config), self._init_method, self._dist_timeout_s))
        return LoadedModel.of_ranks(self._gather(progress))

    def _start_all(self, count: int) -> None:
        """Start a process for each rank, and connect to it."""
        for _ in range(count):
            process, pipe, _ = start_python("rtp_llm.srt.worker.process")
            self._processes.append(process)
            self._pipes.append(pipe)

    def _receive(self, rank: int) -> tuple[str, Any]:
        """Return the rank's next message: ``("result", answer)`` or ``("progress", (bytes done, bytes in all))``.

        Raises:
            WorkerError: the rank sent an error, or died.
        """
        try:
            kind, value = receive(self._pipes[rank])
        except (EOFError, ConnectionResetError) as error:
            self._failure = self._died(rank)
            raise self._failure from error
        if kind == "error":
            self._failure = self._failed(rank, *value)
            raise self._failure
        return kind, value

    def _died(self, rank: int) -> WorkerError:
        return WorkerError(f"the worker process of rank {rank} died with exit code {self._processes[rank].wait()}")

    def _failed(self, rank: int, summary: str, details: str) -> WorkerError:
        """Return the error that a rank sent; if another has died, that one's: it makes the others fail."""
        for other, process in enumerate(self._processes):
            if process.poll():
                return self._died(other)
        error = WorkerError(f"the worker of rank {rank} failed: {summary}")
        error.add_note(details)
        return error

    def _gather(self, progress: Progress | None = None) -> list[Any]:
        """Return one answer per rank, received as they come: the first failure is the cause of those after it."""
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            ready = wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in answers])
            for rank in (rank for rank, pipe in enumerate(self._pipes) if pipe in ready):
                kind, value = self._receive(rank)
                if kind == "result":
                    answers[rank] = value
                elif kind == "step":
                    self._results.append(value)
                elif progress is not None and rank == 0:
                    progress(*value)
        return [answers[rank] for rank in range(len(self._pipes))]

    def _send(self, method: str, *args: Any) -> None:
        self._check_alive()
        for rank, pipe in enumerate(self._pipes):
            try:
                send(pipe, (method, args))
            except (BrokenPipeError, ConnectionResetError):
                self._receive(rank)  # raises the rank's error
                raise

    def init_cache(self, num_pages: list[int], max_rows: int, max_len: int, num_state_slots: int = 0) -> None:
        self.rpc("init_cache", num_pages, max_rows, max_len, num_state_slots)

    def rpc(self, method: str, *args: Any) -> list[Any]:
        self._send(method, *args)
        return self._gather()

    def submit(self, plan: StepPlan) -> StepHandle:
        media_files = self._keep_media(plan)
        if self._in_stages:
            self._drawn.put_into(plan)
        self._send("submit", plan)
        step = _RemoteStep(plan, media_files, self._finish)
        self._in_flight.append(step)
        return step

    def _keep_media(self, plan: StepPlan) -> list[str]:
        """Link the plan's media files under names that last until the step is done: a request may end, and its file
        be deleted, before every worker has read the plan."""
        names = []
        for admission in plan.admissions:
            media = admission.spec.media
            if media is not None and isinstance(media.content, MediaFile):
                name = f"{self._rendezvous.path}/media-{plan.step_id}-{admission.row}"
                _link(media.content.path, name)
                admission.spec = replace(admission.spec, media=replace(media, content=MediaFile(name)))
                names.append(name)
        return names

    def sample(self, masks: TokenMasks) -> None:
        self._check_alive()
        if not self._in_flight:
            raise RuntimeError("masks came, but no step is in flight")
        step = self._in_flight[-1]
        check_masks(step.plan, masks)
        self._send("sample", masks)
        step.has_masks = True

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _finish(self, step: "_RemoteStep") -> StepResult:
        self._check_alive()
        if not self._in_flight or self._in_flight[0] is not step:
            raise RuntimeError("results must be asked for once each, in the order of submission")
        if step.plan.masked_rows and not step.has_masks:
            raise RuntimeError(waits_for_masks(step.plan))
        result: StepResult = self._next_result() if self._in_stages else self._asked_result()
        self._in_flight.popleft()
        if self._in_stages:
            self._drawn.take(step.plan, result)
        for name in step.media_files:
            os.unlink(name)
        return result

    def _asked_result(self) -> StepResult:
        """Ask all ranks; return the first one's result, or of ranks with requests of their own all of them together."""
        results: list[StepResult] = self.rpc("result")
        return joined_results(results) if self._joins_results else results[0]

    def _next_result(self) -> StepResult:
        """Return the oldest result that stages have sent; wait for it, and for the end of any worker."""
        while not self._results:
            ready = wait(self._pipes)
            for rank in (rank for rank, pipe in enumerate(self._pipes) if pipe in ready):
                kind, value = self._receive(rank)
                if kind != "step":
                    raise RuntimeError(f"rank {rank} sent {kind!r} unasked")
                self._results.append(value)
        return self._results.popleft()

    def shutdown(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._pipes, self._processes = [], []
        self._rendezvous.close()


class _RemoteStep:
    def __init__(
        self, plan: StepPlan, media_files: Sequence[str], finish: "Callable[[_RemoteStep], StepResult]"
    ) -> None:
        self.plan = plan
        self.media_files = media_files
        self.has_masks = False
        self._finish = finish

    def result(self) -> StepResult:
        return self._finish(self)


def joined_results(of_ranks: Sequence[StepResult]) -> StepResult:
    """Return the result of a step, of ranks that each have its next rows."""
    return StepResult(of_ranks[0].step_id, [row for result in of_ranks for row in result.rows])


def _link(path: str, name: str) -> None:
    """Give a file a second name; where the file system has no hard links, copy it."""
    try:
        os.link(path, name)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:
        shutil.copyfile(path, name)
