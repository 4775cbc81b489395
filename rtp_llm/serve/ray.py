"""A Ray Serve application: replicas of a server, scaled by Ray, behind an ingress. ``pip install 'rtp-llm[ray]'``.

    serve run rtp_llm.serve.ray:build_openai_app server_args='{model_path: Qwen/Qwen3-0.6B}'

Each replica is a whole server but for its socket: it supervises a core in a process of its own. The ingress knows no
model. Ray's router chooses the replica, by the prompt's beginning.
"""

import asyncio
import logging
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from rtp_llm.serve.asgi_client import answer
from rtp_llm.serve.calls import Answer, Call
from rtp_llm.serve.ingress import Ingress, NoReplica, ReplicaLost
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.entrypoints.access import Access
from rtp_llm.srt.entrypoints.asgi import Gate
from rtp_llm.srt.entrypoints.http_server import make_app, start_supervisor
from rtp_llm.srt.utils.logging import configure_logging

logger = logging.getLogger(__name__)

# By Ray: compares the prompt with those that each replica has had. It needs no other part of ray.llm.
PREFIX_ROUTER = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router:PrefixCacheAffinityRouter"
MAX_QUEUE_DIFFERENCE = 16  # requests; if replicas differ by more, the less busy one is taken
REPLICA_OPTIONS: dict[str, Any] = {
    "max_ongoing_requests": 256,
    "health_check_period_s": 5,
    "health_check_timeout_s": 20,
    "graceful_shutdown_timeout_s": 60,
}


class Replica:
    """A server without a socket. Constructed in Ray's process for one replica; ready when the model is loaded."""

    async def __init__(self, server_args: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray awaits it
        args = ServerArgs.from_dict(server_args)
        configure_logging(args.log_level)
        self._failure: BaseException | None = None
        config, tokenizer, self._supervisor = await asyncio.to_thread(start_supervisor, args, self._on_dead)
        self._gate = Gate(Access.from_server_args(args))
        self._gate.app = make_app(args, config, tokenizer, self._supervisor, asyncio.get_running_loop())

    def _on_dead(self, error: BaseException) -> None:
        self._failure = error

    async def answer(self, call: Call) -> Answer:
        async for piece in answer(self._gate, call):
            yield piece

    async def check_health(self) -> None:
        """Raise if the core has died for good; Ray then replaces this replica."""
        if self._failure is not None:
            raise RuntimeError(f"the engine core has died: {self._failure}") from self._failure

    def __del__(self) -> None:
        supervisor = getattr(self, "_supervisor", None)
        if supervisor is not None:
            supervisor.stop()


@serve.ingress()
class HttpIngress:
    """The ASGI application that Ray's proxies forward requests to."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(stream=True)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Ingress(self._ask)

    async def _ask(self, call: Call) -> Answer:
        try:
            async for piece in self._replicas.answer.remote(call):  # type: ignore[union-attr]
                yield piece
        except BackPressureError as error:
            raise NoReplica(str(error)) from error
        except (RayTaskError, TaskCancelledError):
            raise  # the replica is well: its code raised, or the client has gone
        except (RayError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
            reason, *_ = str(error).split("\n")
            raise ReplicaLost(f"{type(error).__name__}: {reason}") from error


def build_openai_app(args: dict[str, Any]) -> serve.Application:
    """Return the application for Ray Serve.

    Args:
        args: ``server_args``: the fields of ServerArgs; those about the socket, TLS and signals are not used.
            ``replicas``, ``ingress``: options of the two deployments, as ``serve.deployment`` takes them, such as
            ``autoscaling_config`` and ``ray_actor_options``. ``prefix_affinity``: whether requests go to the replica
            that has had the beginning of their prompts; else to the less busy of two.

    Raises:
        ValueError: an unknown entry, or a wrong option of the server.
    """
    known = {"server_args", "replicas", "ingress", "prefix_affinity"}
    if unknown := sorted(set(args) - known):
        raise ValueError(f"build_openai_app has no argument {unknown[0]!r}; have {', '.join(sorted(known))}")
    server_args = dict(args.get("server_args", {}))
    ServerArgs.from_dict(server_args)  # what is wrong is told here, not by each replica
    options = REPLICA_OPTIONS | dict(args.get("replicas", {}))
    if args.get("prefix_affinity", True) and "request_router_config" not in options:
        router = {"request_router_class": PREFIX_ROUTER}
        options["request_router_config"] = {
            **router, "request_router_kwargs": {"imbalanced_threshold": MAX_QUEUE_DIFFERENCE, "do_eviction": True}
        }  # fmt: skip
    replicas = serve.deployment(name="Replica")(Replica).options(**options).bind(server_args)
    ingress = serve.deployment(name="Ingress")(HttpIngress)
    return ingress.options(**{"max_ongoing_requests": 4096, **args.get("ingress", {})}).bind(replicas)
