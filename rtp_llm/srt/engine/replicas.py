"""Several cores with the same model behind one server (``--dp-size``), each with a supervisor of its own."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.engine.supervisor import Progress, Supervisor
from rtp_llm.srt.managers.replica_client import ReplicaClient, joined_info, joined_stats
from rtp_llm.srt.messages import CoreInfo, CoreStats
from rtp_llm.srt.utils.process import StartedPython


class Replicas:
    """The interface of a Supervisor, for ``server_args.dp_size`` cores.

    A core that dies is started again, and its requests go on; new ones go to the others meanwhile. If one cannot be
    started again, that is final for all: ``on_dead`` gets the error, and so does every pending call.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        model_config: ModelConfig,
        on_progress: Progress | None = None,
        started: StartedPython | None = None,
    ) -> None:
        """``on_progress``: told of the first core's loading. ``started``: as of a Supervisor, for the first core."""
        self.on_dead: Callable[[BaseException], None] = lambda error: None
        self.client: ReplicaClient
        self.info: CoreInfo
        self.supervisors = [
            Supervisor(
                server_args,
                model_config,
                None if replica else on_progress,
                None if replica else started,
                replica,
            )
            for replica in range(server_args.dp_size)
        ]

    @property
    def is_ready(self) -> bool:
        """Whether any core is there."""
        return any(supervisor.is_ready for supervisor in self.supervisors)

    @property
    def stats(self) -> CoreStats:
        return joined_stats([supervisor.stats for supervisor in self.supervisors])

    def start(self) -> None:
        """Start all cores, at once, and wait until they are ready.

        Raises:
            CoreFailed: with the error of one of them; the others are ended.
        """
        try:
            with ThreadPoolExecutor(len(self.supervisors)) as threads:
                for _ in threads.map(Supervisor.start, self.supervisors):
                    pass
        except BaseException:
            for supervisor in self.supervisors:
                supervisor.stop()
            raise
        infos = [supervisor.info for supervisor in self.supervisors]
        self.info = joined_info(infos)
        self.client = ReplicaClient(
            [supervisor.client for supervisor in self.supervisors],
            [info.max_total_tokens for info in infos],
            lambda core: self.supervisors[core].is_ready,
        )
        for core, supervisor in enumerate(self.supervisors):
            supervisor.on_death = partial(self.client.lost, core)
            supervisor.on_dead = self._give_up

    def _give_up(self, error: BaseException) -> None:
        self.client.fail_all(error)
        self.on_dead(error)

    def stop(self) -> None:
        """End all cores; pending requests fail. Idempotent."""
        with ThreadPoolExecutor(len(self.supervisors)) as threads:
            for _ in threads.map(Supervisor.stop, self.supervisors):
                pass


def make_supervisor(
    server_args: ServerArgs,
    model_config: ModelConfig,
    on_progress: Progress | None = None,
    started: StartedPython | None = None,
) -> Supervisor | Replicas:
    make = Supervisor if server_args.dp_size == 1 else Replicas
    return make(server_args, model_config, on_progress, started)
