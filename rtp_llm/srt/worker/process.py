"""A worker in a process of its own: ``main`` serves one rank over an inherited socket until it closes."""

import logging
import os
import pickle
import signal
import sys
import traceback
from collections import deque
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.distributed.parallel_state import DATA, TENSOR, WorldShape, init_world
from rtp_llm.srt.kernels.block_tensor import leave_out_distributed_tensors
from rtp_llm.srt.models.registrations import unpack_registrations
from rtp_llm.srt.models.registry import reason
from rtp_llm.srt.plan import StepPlan, StepResult, TokenMasks
from rtp_llm.srt.utils.freed_memory import drop_library_pages, give_back_once
from rtp_llm.srt.utils.ipc import receive, send
from rtp_llm.srt.utils.logging import configure_logging
from rtp_llm.srt.worker.own_rows import OwnRows
from rtp_llm.srt.worker.step import WorkerStep
from rtp_llm.srt.worker.worker import Worker, WorkerConfig

logger = logging.getLogger(__name__)


class RankServer:
    """Serves the executor's calls with one rank's worker. Those in ``UNANSWERED`` get no answer.

    Nothing but ``result`` waits for the device, so that the next step is launched while it computes. In a pipeline of
    stages, ``finished`` gives the results instead.

    Args:
        rank, shape: this rank's place; without them it is alone.
    """

    UNANSWERED = ("submit", "sample")

    def __init__(self, worker: Worker, rank: int = 0, shape: WorldShape = WorldShape()) -> None:  # noqa: B008
        self._worker = worker
        self._in_stages = shape.pipeline > 1
        # The first rank of the last stage; ranks with requests of their own each.
        self._tells = shape.data > 1 or rank == shape.size - shape.tensor
        self._rank, self._has_own_requests = rank, shape.data > 1
        self._own_rows: OwnRows | None = None
        self._steps: deque[WorkerStep] = deque()  # whose results were not asked for yet

    def init_cache(self, num_pages: list[int], max_rows: int, max_len: int, num_state_slots: int = 0) -> None:
        self._worker.init_cache(num_pages, max_rows, max_len, num_state_slots)
        if self._has_own_requests:
            self._own_rows = OwnRows(self._rank, max_rows)

    def submit(self, plan: StepPlan) -> None:
        self._steps.append(WorkerStep(plan, self._worker, self._own_rows))
        self._steps[-1].launch()

    def sample(self, masks: TokenMasks) -> None:
        """Draw the tokens of the step that was submitted last."""
        self._steps[-1].set_masks(masks)
        self._steps[-1].launch()

    def result(self) -> StepResult | None:
        """Return the earliest step's result, of own requests; where all ranks have the same, None on all but one."""
        result = self._steps.popleft().result()
        return result if self._tells else None

    def finished(self) -> list[StepResult]:
        """Return, in a pipeline of stages, results that are there and that the executor waits for."""
        results = []
        while self._in_stages and self._steps and self._steps[0].is_launched:
            results.append(self._steps.popleft().result())
        return results if self._tells else []

    def call(self, method: str, args: tuple) -> Any:
        own = getattr(self, method, None) if not method.startswith("_") else None
        return (own or getattr(self._worker, method))(*args)


class ParentGone(Exception):
    """The other end of the pipe is closed, so the worker must end."""


class Parent:
    """The pipe to the parent process. ``send`` and ``receive`` raise ParentGone when it is closed."""

    def __init__(self, fd: int) -> None:
        self._pipe = Connection(fd)

    def receive(self) -> Any:
        try:
            return receive(self._pipe)
        except (EOFError, ConnectionResetError):
            raise ParentGone from None

    def send(self, kind: str, value: Any) -> None:
        try:
            send(self._pipe, (kind, value))
        except (BrokenPipeError, ConnectionResetError):
            raise ParentGone from None


def main(fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    parent = Parent(fd)
    try:
        _serve(parent)
    except ParentGone:  # this is how a worker is told to end
        logger.debug("the parent process has gone: the worker ends")
    except Exception as error:
        with suppress(ParentGone):
            parent.send("error", (reason(error), traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without the interpreter's finalization, which takes seconds


def _serve(parent: Parent) -> None:
    registrations, packed, init_method, timeout_s = parent.receive()
    leave_out_distributed_tensors()
    unpack_registrations(registrations)
    config: WorkerConfig = pickle.loads(packed)
    configure_logging(config.server_args.log_level)
    _join(config, init_method, timeout_s)
    drop_library_pages()  # before the weights come
    worker = Worker(config, lambda done, total: parent.send("progress", (done, total)))
    give_back_once()  # what loading needed, before the cache takes memory
    parent.send("result", worker.loaded())
    server = RankServer(worker, config.rank, config.world_shape)
    while True:
        method, args = parent.receive()
        answer = server.call(method, args)
        if method not in RankServer.UNANSWERED:
            parent.send("result", answer)
        for result in server.finished():
            parent.send("step", result)


def _join(config: WorkerConfig, init_method: str, timeout_s: float) -> None:
    provider = provider_named(config.device)
    device = provider.prepare_rank(config.place, config.num_places)
    world = init_world(config.rank, config.world_shape, provider.process_group, init_method, timeout_s, device)
    provider.share_memory(world.group(DATA if world.shape.data > 1 else TENSOR), timeout_s)
