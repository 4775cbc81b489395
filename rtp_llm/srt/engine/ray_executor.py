"""Ranks as Ray actors (``--distributed-executor-backend ray``), on one machine or several.

Ray places the actors, one bundle of a placement group for each, and watches them. Each actor connects back to the core,
over TCP with a secret that Ray carries, and then serves like a worker process does, with the same plans; between the
ranks is torch.distributed as ever. So a step costs what it costs with worker processes, and a message over the network
instead of a socket pair. Needs ``pip install 'rtp-llm[ray]'``.
"""

import fcntl
import os
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.engine.executor import MultiProcessExecutor, WorkerError
from rtp_llm.srt.plan import StepPlan
from rtp_llm.srt.request_spec import MediaFile
from rtp_llm.srt.worker import process as worker_process
from rtp_llm.srt.worker.worker import WorkerConfig

PLACEMENT_TIMEOUT_S = 600.0
ACCEPT_TIMEOUT_S = 1.0
STOP_TIMEOUT_S = 10.0


class RayRank:
    """The actor of one rank, as the executor sees a process of a worker."""

    def __init__(self, actor: Any, running: Any) -> None:
        self.running = running  # what ``RankActor.run`` returns, once it ends
        self._actor = actor

    def poll(self) -> int | None:
        """Return None while the actor runs, 1 afterwards."""
        return 1 if ray.wait([self.running], timeout=0)[0] else None

    def wait(self, timeout: float | None = None) -> int:
        return 1 if ray.wait([self.running], timeout=timeout)[0] else 0

    def kill(self) -> None:
        ray.kill(self._actor)

    def how_it_ended(self) -> str:
        try:
            ray.get(self.running, timeout=STOP_TIMEOUT_S)
        except Exception as error:  # of any kind: it is told
            return str(error).splitlines()[0]
        return "it ended by itself"


class RayExecutor(MultiProcessExecutor):
    """One Ray actor per rank.

    The checkpoint must be at the same path on every node. ``RAY_ADDRESS`` names the cluster; without it, Ray takes the
    one of this machine, or starts one.
    """

    def __init__(self, config: WorkerConfig, dist_timeout_s: float, depth: int = 0) -> None:
        super().__init__(config, dist_timeout_s, depth)
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        self._secret = secrets.token_bytes(32)
        self._listener = socket.create_server((ray.util.get_node_ip_address(), 0))
        self._listener.settimeout(ACCEPT_TIMEOUT_S)
        self._group: Any = None
        self._actors: list[Any] = []
        self._ranks: list[RayRank] = []
        self._watcher: threading.Thread | None = None

    def _start_all(self, count: int) -> None:
        """Place the actors, and wait until each has connected.

        Raises:
            WorkerError: the cluster has no room for them in time.
        """
        on_cpu = provider_named(self._config.device).ranks_share_memory  # else each rank has a GPU of its own
        resources = {"CPU": 1.0} if on_cpu else {"GPU": 1.0, "CPU": 1.0}
        self._group = placement_group([dict(resources) for _ in range(count)], strategy="PACK")
        if not self._group.wait(PLACEMENT_TIMEOUT_S):
            raise WorkerError(
                f"Ray has found no room for {count} ranks of {resources} within {PLACEMENT_TIMEOUT_S:.0f} s"
            )
        for rank in range(count):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            options = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0.0), "max_restarts": 0}
            self._actors.append(ray.remote(RankActor).options(scheduling_strategy=place, **options).remote())
        addresses: list[tuple[str, int]] = ray.get([actor.address.remote() for actor in self._actors])
        self._init_method = "tcp://{}:{}".format(*addresses[0])
        hosts = {host for host, _ in addresses}
        for rank, actor in enumerate(self._actors):
            running = actor.run.remote(self._listener.getsockname()[:2], self._secret, rank, len(hosts) > 1)
            self._ranks.append(RayRank(actor, running))
        self._processes.extend(self._ranks)
        pipes = dict(self._accept() for _ in range(count))
        self._pipes = [pipes[rank] for rank in range(count)]
        self._watcher = threading.Thread(target=self._watch, args=(list(self._pipes),), daemon=True)
        self._watcher.start()

    def _accept(self) -> tuple[int, Connection]:
        """Return the next rank that connects, and the connection to it.

        Raises:
            WorkerError: an actor has ended instead.
        """
        while True:
            try:
                connected, _ = self._listener.accept()
            except TimeoutError:
                for rank, actor in enumerate(self._processes):
                    if actor.poll() is not None:
                        raise self._died(rank) from None
                continue
            connected.settimeout(None)
            pipe = Connection(connected.detach())
            try:
                deliver_challenge(pipe, self._secret)
                answer_challenge(pipe, self._secret)
            except (AuthenticationError, OSError, EOFError):  # somebody else, who does not know the secret
                pipe.close()
                continue
            return int.from_bytes(pipe.recv_bytes(8), "big"), pipe

    def _watch(self, pipes: Sequence[Connection]) -> None:
        """Wake whoever waits for a rank once Ray says that one has died: a lost machine closes no connection."""
        sockets = [socket.socket(fileno=os.dup(pipe.fileno())) for pipe in pipes]
        done, _ = ray.wait([rank.running for rank in self._ranks], num_returns=1)
        for rank, ended in zip(self._ranks, sockets, strict=True):
            with ended, suppress(OSError):  # closed already
                if rank.running in done:
                    ended.shutdown(socket.SHUT_RDWR)

    def _died(self, rank: int) -> WorkerError:
        return WorkerError(f"the Ray actor of rank {rank} died: {self._ranks[rank].how_it_ended()}")

    def _keep_media(self, plan: StepPlan) -> list[str]:
        """Put the media into the plan itself: a rank may be on a machine without the file."""
        for admission in plan.admissions:
            media = admission.spec.media
            if media is not None and isinstance(media.content, MediaFile):
                with open(media.content.path, "rb") as file:
                    admission.spec = replace(admission.spec, media=replace(media, content=file.read()))
        return []

    def shutdown(self) -> None:
        super().shutdown()
        self._listener.close()
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


class RankActor:
    """The actor: one rank."""

    def address(self) -> tuple[str, int]:
        """Return this node's address, and a port that is free there."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    def run(self, core: tuple[str, int], secret: bytes, rank: int, several_hosts: bool) -> None:
        """Serve the core until it closes the connection; this process then ends."""
        if several_hosts:
            os.environ["GLOO_SOCKET_IFNAME"] = interface_of(ray.util.get_node_ip_address())
        pipe = Client(core, authkey=secret)
        pipe.send_bytes(rank.to_bytes(8, "big"))
        worker_process.main(pipe.fileno())


def interface_of(address: str) -> str:
    """Return the name of this machine's network interface with an IPv4 address.

    Raises:
        OSError: none has it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    raise OSError(f"no network interface of this machine has the address {address}")
