"""The HTTP server: from options to a running server, and to its end.

    launch_server(ServerArgs(model_path="Qwen/Qwen3-0.6B"))   # blocks until the server ends

The socket is opened first, so that a port in use is an error at once and probes get an answer (503) while the model
is loaded. The core runs in a child process, which ends with this one.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.datastructures import State
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from rtp_llm.srt.checkpoint import (
    read_chat_template,
    read_end_tokens,
    read_model_config,
    read_pair_template,
    read_placer,
    read_processor,
    read_tokenizer,
)
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.engine.replicas import Replicas, make_supervisor
from rtp_llm.srt.engine.supervisor import Supervisor
from rtp_llm.srt.entrypoints.access import Access
from rtp_llm.srt.entrypoints.asgi import Bodies, Gate, StrictRoute
from rtp_llm.srt.entrypoints.connections import Uvicorn
from rtp_llm.srt.entrypoints.dialects import apis, spoken
from rtp_llm.srt.entrypoints.errors import ErrorBody, add_handlers
from rtp_llm.srt.entrypoints.frontend import Frontend, Observer
from rtp_llm.srt.entrypoints.llama_cpp.slots import Slots
from rtp_llm.srt.entrypoints.request_log import RequestLog
from rtp_llm.srt.entrypoints.routes import ERROR_STATUSES, add_routes, dialect_lines
from rtp_llm.srt.entrypoints.serving import Core, Serving
from rtp_llm.srt.managers.end_tokens import EndToken
from rtp_llm.srt.managers.metrics import CoreMetrics, RequestMetrics
from rtp_llm.srt.managers.tokenizer_manager import TokenizerManager
from rtp_llm.srt.managers.vllm_metrics import VllmMetrics
from rtp_llm.srt.parser.response_template import read_response_template
from rtp_llm.srt.utils.freed_memory import drop_library_pages, give_back_freed_memory, give_back_once
from rtp_llm.srt.utils.logging import LOG_FORMAT, RateLimit, configure_logging
from rtp_llm.srt.utils.process import StartedPython
from rtp_llm.version import __version__

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnProgress = Callable[[int, int], None]

BACKLOG = 2048
ABORT_GRACE_S = 2.0  # for aborted requests to send their last answer
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class AddressError(OSError):
    """The address cannot be listened on."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came twice: the server did not wait for running requests."""


def launch_server(
    server_args: ServerArgs,
    *,
    on_progress: OnProgress | None = None,
    launch_callback: Callable[[], None] | None = None,
    core_process: StartedPython | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then let running requests finish within ``shutdown_timeout``.

    Works at a script's module level, without an ``if __name__ == "__main__"`` guard.

    Args:
        on_progress: called with (bytes loaded, bytes in all) while the weights are read, on another thread.
        launch_callback: called once requests are taken.
        core_process: from ``start_core_process``, where the caller started it before importing this module, which takes
            as long as the core's own imports.

    Raises:
        AddressError: the address is in use, or not one of this machine's.
        KeyboardInterrupt: Ctrl-C came twice.
        ValueError, OSError, RuntimeError: what is wrong with the options, the checkpoint or the machine; or how the
            core died, if it died for good.
    """
    configure_logging(server_args.log_level)
    _configure_http_logging(server_args.log_level_http or server_args.log_level)
    listener = open_listener(server_args.host, server_args.port)
    with listener:
        asyncio.run(HTTPServer(server_args, listener, on_progress, launch_callback, core_process).run())


def open_listener(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raise AddressError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise AddressError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --host or --port"
        ) from error
    return listener


class HTTPServer:
    """One run of the server, within one event loop."""

    def __init__(
        self,
        server_args: ServerArgs,
        listener: socket.socket,
        on_progress: OnProgress | None,
        launch_callback: Callable[[], None] | None,
        core_process: StartedPython | None = None,
    ) -> None:
        self._args = server_args
        self._core_process = core_process
        self._listener = listener
        self._on_progress = on_progress
        self._launch_callback = launch_callback
        self._gate = Gate(Access.from_server_args(server_args))
        self._uvicorn = Uvicorn(with_cors(self._gate, server_args.allowed_origins), server_args)
        self._supervisor: Supervisor | Replicas | None = None
        self._error: BaseException | None = None
        self._ending: asyncio.Task[None] | None = None

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self._uvicorn.serve([self._listener]))
        trimming = asyncio.create_task(give_back_freed_memory())
        with self._signals():
            try:
                loading = asyncio.create_task(self._load())
                await asyncio.wait((serving, loading), return_when=asyncio.FIRST_COMPLETED)
                if loading.done() and loading.exception() is not None:
                    self._stop(loading.exception())
                loading.cancel()
                await serving
            finally:
                trimming.cancel()
                if self._supervisor is not None:
                    await asyncio.to_thread(self._supervisor.stop)
        if self._error is not None:
            raise self._error

    async def _load(self) -> None:
        """Open the gate once the core is ready."""
        start_s = time.perf_counter()
        config, tokenizer, supervisor = await on_daemon_thread(self._start_core)
        self._supervisor = supervisor
        startup_s = time.perf_counter() - start_s
        app = make_app(self._args, config, tokenizer, supervisor, self._loop, startup_s)
        self._gate.app = app
        if self._launch_callback is not None:
            self._launch_callback()
        ends = read_end_tokens(self._args, config, tokenizer)
        seconds = time.perf_counter() - start_s
        summary = _summary(self._args, config, supervisor, self._address(), seconds, ends)
        print("\n".join([summary, *dialect_lines(app, supervisor.info.outputs)]), file=sys.stderr)

    def _start_core(self) -> tuple[ModelConfig, object, Supervisor | Replicas]:
        return start_supervisor(self._args, self._on_core_dead, self._on_progress, self._core_process)

    def _on_core_dead(self, error: BaseException) -> None:
        """Stop the server; called in the supervisor's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended already
            self._loop.call_soon_threadsafe(self._stop, error)

    def _address(self) -> str:
        host, port = self._listener.getsockname()[:2]
        scheme = "http" if self._args.ssl_certfile is None else "https"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Handle signals by ``_on_signal``, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in SIGNALS:
                self._loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._drain())
        elif number == signal.SIGINT:
            self._uvicorn.force_exit = True
            self._stop(Interrupted())

    async def _drain(self) -> None:
        self._gate.draining = True
        if self._supervisor is not None and (num_live := self._supervisor.client.num_live):
            logger.warning(
                "ending: %d requests have %.0f s to finish (Ctrl-C ends at once)", num_live, self._args.shutdown_timeout
            )
        if not await self._gate.wait_empty(self._args.shutdown_timeout) and self._supervisor is not None:
            logger.warning("%d requests have not finished, and are aborted", self._supervisor.client.num_live)
            self._supervisor.client.abort(None)
            await self._gate.wait_empty(ABORT_GRACE_S)
        self._stop(None)

    def _stop(self, error: BaseException | None) -> None:
        """End the server; ``run`` raises the first error."""
        self._error = self._error or error
        self._gate.draining = True
        self._uvicorn.should_exit = True


def start_supervisor(
    args: ServerArgs,
    on_dead: Callable[[BaseException], None],
    on_progress: OnProgress | None = None,
    core_process: StartedPython | None = None,
) -> tuple[ModelConfig, object, Supervisor | Replicas]:
    """Read what the server needs of a model and start its core; return when that is ready.

    ``on_dead`` is called when the core has died for good. Raises as ``launch_server`` does.
    """
    config = read_model_config(args)
    tokenizer = read_tokenizer(args, config)
    read_chat_template(args, config, tokenizer)  # before the weights: errors come early
    read_pair_template(args, config, tokenizer)
    give_back_once()  # what the tokenizer's file needed
    drop_library_pages()  # before the weights come
    supervisor = make_supervisor(args, config, on_progress, core_process)
    supervisor.on_dead = on_dead
    supervisor.start()
    return config, tokenizer, supervisor


async def on_daemon_thread(function: Callable[[], T]) -> T:
    """Run ``function()`` on a thread that does not keep the program alive."""
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # a waiter that gives up must not make set_result() raise

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # raised again where it is awaited
            done.set_exception(error)

    threading.Thread(target=run, name="rtp-llm-load", daemon=True).start()
    return await asyncio.wrap_future(done)


def make_app(
    args: ServerArgs,
    config: ModelConfig,
    tokenizer: object,
    core: Core,
    loop: asyncio.AbstractEventLoop,
    startup_s: float = 0.0,
) -> FastAPI:
    """Build the application for a ready core, which started in ``startup_s``. Requests are handled in ``loop``."""
    info = core.info
    slots = Slots(info.max_running_requests, info.max_req_len)
    registry, observers = _metrics(args, config, core, startup_s)
    observers.append(slots)
    manager = TokenizerManager(
        tokenizer,
        config.vocab_size,
        config.context_length if info.outputs.generates else info.max_req_len,
        info.max_req_len,
        args.random_seed,
        read_processor(args, config, tokenizer),
        args.media_limits,
        read_end_tokens(args, config, tokenizer),
        args.schedule_policy == "priority",
        read_placer(config, workers_are_here=False),
        info.outputs,
        args.grammar_backend,
        read_pair_template(args, config, tokenizer),
    )
    frontend = Frontend(core.client, manager, loop, observers)
    template = read_chat_template(args, config, tokenizer)
    serving = Serving(args, config, core, frontend, template, read_response_template(tokenizer))
    app = FastAPI(
        title="RTP-LLM",
        version=__version__,
        description=f"An inference engine for language models, by the APIs of {apis()}.",
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        responses={status: {"model": ErrorBody} for status in ERROR_STATUSES},
    )
    app.router.route_class = StrictRoute
    app.state = State(
        {"bodies": Bodies(args.max_body_size), "strict_requests": args.strict_requests, "workers": serving.workers}
    )
    add_handlers(app, spoken)
    add_routes(app, serving, registry, slots)
    return app


def _metrics(
    args: ServerArgs, config: ModelConfig, core: Core, startup_s: float
) -> tuple[CollectorRegistry, list[Observer]]:
    """Return what /metrics shows, and what observes requests for it and for the log."""
    info, registry, name = core.info, CollectorRegistry(), args.model_name
    num_pages = info.max_total_tokens // args.page_size
    constants: dict[str, float] = {
        "context_len": config.context_length,
        "page_size": args.page_size,
        "num_pages": num_pages,
        "startup_time_seconds": startup_s,
    }
    registry.register(CoreMetrics(lambda: core.stats, name, constants, info.max_running_requests))
    observers: list[Observer] = [RequestMetrics(registry, name)]
    if args.vllm_metrics:
        named = VllmMetrics(registry, name, args.page_size, num_pages)
        observers.append(named)
        registry = CollectorRegistry()
        registry.register(named)
    if args.log_requests:
        observers.append(RequestLog(args.log_requests_level))
    return registry, observers


def with_cors(app: ASGIApp, allowed_origins: list[str] | None) -> ASGIApp:
    """Allow pages of these origins: preflights need no key, and pages can read errors."""
    if not allowed_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=allowed_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )


def _summary(
    args: ServerArgs, config: ModelConfig, core: Core, address: str, seconds: float, ends: Sequence[EndToken]
) -> str:
    info = core.info
    name = args.model_name
    states = f", and {_size(info.state_bytes)} of states a request" if info.state_bytes else ""
    lines = [
        f"RTP-LLM {__version__} serves {name} at {address} (ready after {seconds:.1f} s)",
        f"  model     {config.architectures[0]}, {config.dtype} on {info.device}",
        f"  weights   {_size(info.weight_bytes)}",
        f"  cache     {_size(info.cache_bytes)} for {info.max_total_tokens} tokens{states}"
        if info.cache_bytes
        else "  cache     none: each input is computed in one step",
        f"  capacity  {info.max_running_requests} requests at once, each of at most {info.max_req_len} tokens",
    ]
    if info.outputs.tasks:
        lines.append(f"  outputs   {', '.join(info.outputs.names)}{' and text' if info.outputs.generates else ''}")
    if info.outputs.generates:
        lines.append(f"  ends      {', '.join(map(str, ends)) or 'none: texts go on to their limit'}")
    return "\n".join(lines)


def _size(num_bytes: int) -> str:
    if num_bytes < 2**10:
        return f"{num_bytes} bytes"
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.0f} KiB"
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"


def _configure_http_logging(level: str) -> None:
    logger = logging.getLogger("uvicorn")
    logger.setLevel(level.upper())
    errors = logging.getLogger("uvicorn.error")
    if not any(isinstance(known, RateLimit) for known in errors.filters):
        errors.addFilter(RateLimit())
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logger.addHandler(handler)
