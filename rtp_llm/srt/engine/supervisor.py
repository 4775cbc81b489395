"""Restart a core process when it dies, and resume its requests."""

import logging
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import get_args

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.engine.orders import Orders
from rtp_llm.srt.engine.start import start_core_process
from rtp_llm.srt.managers.engine_client import EngineClient
from rtp_llm.srt.messages import CoreInfo, CoreStats, FromCore, Ping, Shutdown, ToCore
from rtp_llm.srt.models.registrations import pack_registrations
from rtp_llm.srt.utils.ipc import receive, send
from rtp_llm.srt.utils.process import StartedPython
from rtp_llm.srt.utils.scratch import ScratchFolder
from rtp_llm.srt.utils.zmq_link import ZmqClientEnd

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

MAX_DEATHS = 3  # within DEATHS_WINDOW_S: after these the core is not started again
DEATHS_WINDOW_S = 60.0
STOP_TIMEOUT_S = 10.0


class CoreFailed(RuntimeError):
    """The core process failed or died. The message contains its own error."""


class CoreProcess:
    """One process of the core, with its pipe and its link."""

    def __init__(
        self,
        server_args: ServerArgs,
        registrations: bytes,
        started: StartedPython | None = None,
        replica: int = 0,
        free_bytes: int | None = None,
    ) -> None:
        self._folder = ScratchFolder()
        directory = str(self._folder.path)
        self.link = ZmqClientEnd(directory, get_args(ToCore), get_args(FromCore))
        self.process, self._pipe, _ = started or start_core_process()
        self.error: str | None = None
        self._is_ready = False
        self.running: set[str] = set()  # rids that it has begun to compute
        with suppress(BrokenPipeError):  # if it died at once, wait_ready raises its error
            send(self._pipe, Orders(server_args, registrations, directory, replica, free_bytes))

    def wait_ready(self, on_progress: Progress | None) -> CoreInfo:
        """Wait until the core is ready.

        Raises:
            CoreFailed: the process ended before.
        """
        while True:
            event = self._next_event()
            if event is None:
                raise CoreFailed(self.describe_end())
            kind, value = event
            if kind == "ready":
                self._is_ready = True
                return value
            if kind == "progress" and on_progress is not None:
                on_progress(*value)

    def watch(self) -> None:
        """Receive the process's events until it dies."""
        while (event := self._next_event()) is not None:
            kind, value = event
            if kind == "running":
                self.running.update(value)

    def _next_event(self) -> tuple | None:
        """Wait for the next event ``(kind, value)``; return None once the process is dead."""
        try:
            kind, value = receive(self._pipe)
        except (EOFError, OSError):
            self.process.wait()
            return None
        if kind == "error":
            self.error, trace = value
            level = logging.ERROR if self._is_ready else logging.DEBUG  # before, the error alone says what to correct
            logger.log(level, "the engine core fails:\n%s", trace.rstrip())
        return kind, value

    def describe_end(self) -> str:
        if self.error is not None:
            return f"the engine core failed: {self.error}"
        code = self.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the engine core process {how}"

    def kill(self) -> None:
        self.process.kill()

    def close(self, timeout_s: float = 0.0) -> None:
        """End the process, by force after ``timeout_s``, and free its resources."""
        self.link.close()
        self._pipe.close()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._folder.close()


class Supervisor:
    """Starts the core, watches it, and starts another when it dies; live requests go on where they were.

    The core counts as dead when its process ends or is silent for longer than ``watchdog_timeout``. Three deaths within
    a minute, or one before it is ready, are final: ``on_dead`` gets the error, and so does every pending call.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        model_config: ModelConfig,
        on_progress: Progress | None = None,
        started: StartedPython | None = None,
        replica: int = 0,
    ) -> None:
        """
        Args:
            started: a process for the first core, started earlier so that it is ready sooner.
            replica: the core's place among those of the server.
        """
        self._started = started
        self._replica = replica
        self._args = replace(server_args, model_path=model_config.model_path)  # a core downloads nothing
        self._on_progress = on_progress
        self._registrations = pack_registrations()
        self.client = EngineClient()
        self.on_dead: Callable[[BaseException], None] = lambda error: None
        self.on_death: Callable[[], None] = lambda: None  # called when a core has died, before another is started
        self.info: CoreInfo
        self._core: CoreProcess | None = None
        self._lock = threading.Lock()  # guards _core against stop()
        self._stopping = threading.Event()
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._threads = [
            threading.Thread(target=self._supervise, name="rtp-llm-supervisor", daemon=True),
            threading.Thread(target=self._ping, name="rtp-llm-watchdog", daemon=True),
        ]

    @property
    def is_ready(self) -> bool:
        """False while a core is starting, and after the supervisor has stopped or given up."""
        return self._core is not None

    @property
    def stats(self) -> CoreStats:
        return self.client.stats

    def start(self) -> None:
        """Start the core and wait until it is ready.

        Raises:
            CoreFailed: with the core's own error.
        """
        core = self._spawn()
        try:
            self.info = core.wait_ready(self._on_progress)
        except BaseException:
            core.close()
            raise
        self._take_up(core)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the core; pending requests fail. Idempotent."""
        with self._lock:
            self._stopping.set()
            core, self._core = self._core, None
        self.client.fail_all(None, "the engine has been shut down")
        if core is not None:
            core.link.send(Shutdown())
            core.close(STOP_TIMEOUT_S)
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join()

    def _spawn(self) -> CoreProcess:
        started, self._started = self._started, None
        if started is not None and not started.is_current:
            started.discard()
            started = None
        # What others have taken meanwhile must not make the cache of a core smaller that takes another's place.
        free_bytes = self.info.free_bytes if self._deaths else None
        return CoreProcess(self._args, self._registrations, started, self._replica, free_bytes)

    def _take_up(self, core: CoreProcess) -> bool:
        """Let a ready core serve; return False if ``stop`` came first."""
        with self._lock:
            if self._stopping.is_set():
                return False
            self._core = core
        self.client.attach(core.link)
        return True

    def _supervise(self) -> None:
        try:
            while (core := self._core) is not None:
                core.watch()
                if self._stopping.is_set():
                    return
                self._detach(core)
                if not self._restart(core):
                    return
        except BaseException as error:
            self._give_up(error)

    def _detach(self, core: CoreProcess) -> None:
        """Release what a dead core held, and record its death."""
        self._core = None
        self._deaths.append(time.monotonic())
        self.on_death()
        logger.error("%s while %d requests were live", core.describe_end(), self.client.num_live)
        core.close()
        self.client.detach(core.running)

    def _restart(self, dead: CoreProcess) -> bool:
        """Start another core after ``dead``; return False if there were too many deaths or the start failed."""
        if len(self._deaths) == MAX_DEATHS and self._deaths[-1] - self._deaths[0] <= DEATHS_WINDOW_S:
            window = f"{DEATHS_WINDOW_S:.0f} s"
            text = f"the engine core died {MAX_DEATHS} times within {window}; at last: {dead.describe_end()}"
            self._give_up(CoreFailed(text))
            return False
        logger.warning("starting another engine core")
        core = self._spawn()
        try:
            core.wait_ready(None)
        except CoreFailed as error:
            core.close()
            self._give_up(error)
            return False
        if not self._take_up(core):
            core.close()
            return False
        logger.warning("the engine core is back: %d requests go on", self.client.num_live)
        return True

    def _give_up(self, error: BaseException) -> None:
        self._stopping.set()
        self._core = None
        self.client.fail_all(error)
        self.on_dead(error)

    def _ping(self) -> None:
        """Send pings, and kill a core that does not answer in time: the watchdog."""
        timeout_s = self._args.watchdog_timeout
        while not self._stopping.wait(timeout_s / 4):
            core = self._core
            if core is None:
                continue
            core.link.send(Ping())
            silence_s = time.monotonic() - core.link.heard_at
            if silence_s > timeout_s:
                logger.error("the engine core has been silent for %.0f s: it is killed", silence_s)
                core.kill()
