"""The offline API: the engine within the caller's process, without sockets."""

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from queue import SimpleQueue
from typing import Any, Self, Unpack

from rtp_llm.srt.checkpoint import (
    read_end_tokens,
    read_model_config,
    read_pair_template,
    read_placer,
    read_processor,
    read_tokenizer,
)
from rtp_llm.srt.configs.server_args import ServerArgs, ServerArgsError
from rtp_llm.srt.engine.core import EngineCore
from rtp_llm.srt.entrypoints.frontend import Call, Item, Result, Results, completions_of, completions_with_media
from rtp_llm.srt.entrypoints.pooled_engine import PooledMethods
from rtp_llm.srt.managers.engine_client import EngineClient, EngineStopped, FlushResult
from rtp_llm.srt.managers.generate_options import GenerateOptions, check_names, takes_options
from rtp_llm.srt.managers.pooled import PooledRequests
from rtp_llm.srt.managers.tokenizer_manager import TokenizerManager
from rtp_llm.srt.messages import Shutdown
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.utils.ipc import QueueLink
from rtp_llm.srt.utils.logging import configure_logging
from rtp_llm.version import __version__

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]


class Engine(PooledMethods):
    """A model, ready to generate. Use it from any number of threads and event loops at once, but not from a process
    forked after it was made: the engine's threads do not exist there, and calls raise.

    Args:
        model_path: checkpoint directory or hub id.
        server_args: all options at once, instead of ``model_path`` and ``kwargs``.
        inline: step the core in the calling thread instead of on a thread of its own, for a debugger.
        on_progress: called with (bytes loaded, bytes in all) while the weights are loaded, in the loading thread.
        kwargs: fields of ServerArgs. ``log_level`` is "error" unless given.

    Raises:
        ValueError, OSError, RuntimeError: what is wrong with the options, the checkpoint or the machine.

    Example:
        >>> with Engine(model_path="Qwen/Qwen3-0.6B") as engine:
        ...     print(engine.generate("The capital of France is", {"temperature": 0})["text"])
    """

    def __init__(
        self,
        model_path: str | None = None,
        *,
        server_args: ServerArgs | None = None,
        inline: bool = False,
        on_progress: OnProgress | None = None,
        **kwargs: Any,
    ) -> None:
        self.server_args = args = _server_args(model_path, server_args, kwargs)
        if args.dp_size > 1:
            raise ServerArgsError(f"dp_size {args.dp_size} is for a server: an Engine has one core; start several")
        configure_logging(args.log_level)
        self.model_config = read_model_config(args)
        tokenizer = read_tokenizer(args, self.model_config)
        end_tokens = read_end_tokens(args, self.model_config, tokenizer)  # before the weights: errors come early
        pair_template = read_pair_template(args, self.model_config, tokenizer)
        link = QueueLink()
        self._client = EngineClient(link.client)
        build = partial(EngineCore, args, self.model_config, link.core, on_progress=on_progress)
        self._runner = (InlineRunner if inline else ThreadRunner)(build, self._client, link)
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, self._runner.stop)  # at the latest when the interpreter ends
        core = self._runner.core
        self.max_total_tokens: int = core.max_total_tokens
        self.tokenizer_manager = TokenizerManager(
            tokenizer,
            self.model_config.vocab_size,
            core.context_length,
            core.max_req_len,
            args.random_seed,
            read_processor(args, self.model_config, tokenizer, trusted=True),
            args.media_limits,
            end_tokens,
            args.schedule_policy == "priority",
            read_placer(self.model_config, workers_are_here=args.num_ranks == 1),
            core.info.outputs,
            args.grammar_backend,
            pair_template,
        )
        self._pooled = PooledRequests(self.tokenizer_manager, self.model_config.sentence_transformer)

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer; None with ``skip_tokenizer_init``."""
        return self.tokenizer_manager.tokenizer

    @property
    def info(self) -> dict[str, Any]:
        """Return the engine's options, and what was derived from model and machine."""
        return {
            **asdict(self.server_args),
            "version": __version__,
            "architectures": list(self.model_config.architectures),
            "dtype": self.model_config.dtype,
            "context_length": self.model_config.context_length,
            "vocab_size": self.model_config.vocab_size,
            "max_total_num_tokens": self.max_total_tokens,
            "max_req_len": self.tokenizer_manager.max_req_len,
            "end_tokens": [token.to_dict() for token in self.tokenizer_manager.end_tokens],
        }

    @takes_options
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: dict[str, Any] | SamplingParams | Sequence[dict[str, Any] | SamplingParams] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        stream: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Results | Iterator[Result]:
        """Generate for one prompt, or a list of them: texts in ``prompt``, or ids in ``input_ids``.

        For a list, each option is one for all or a list of as many. All are checked before any is started.

        Args:
            sampling_params: fields of SamplingParams.
            stream: return an iterator of results so far instead; closing it ends the requests. Several completions
                come interleaved, with an ``index``.
            options: see GenerateOptions.

        Returns:
            For one prompt and ``n=1`` a dict, else a list in order of prompts, then of completions:
            ``{"text", "output_ids", "meta_info": {"id", "finish_reason", "prompt_tokens", "completion_tokens",
            "cached_tokens", ...}}``. A request that fails by itself ends with the finish reason ``abort`` and a
            message.

        Raises:
            InvalidRequest: a prompt or an option is wrong.
            EngineStopped: the engine was shut down, or failed: then with the cause.
        """
        self._check_process()
        check_names(options)
        given = {"sampling_params": sampling_params, **options}
        call = Call(self._client, *completions_of(self.tokenizer_manager, prompt, input_ids, given))
        if not stream:
            return self._collect(call)
        iterator = self._stream(call)
        next(iterator)  # submits, and makes sure that dropping the iterator ends the requests
        return iterator

    @takes_options
    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: dict[str, Any] | SamplingParams | Sequence[dict[str, Any] | SamplingParams] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        stream: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Results | AsyncIterator[Result]:
        """Do the same as ``generate`` without blocking the event loop; cancelling it ends the requests.

        With ``stream`` the awaited value is an asynchronous iterator:
        ``async for result in await engine.async_generate(prompt, stream=True)``.
        """
        self._check_process()
        check_names(options)
        given = {"sampling_params": sampling_params, **options}
        call = Call(self._client, *await completions_with_media(self.tokenizer_manager, prompt, input_ids, given))
        if not stream:
            return await self._collect_async(call)
        iterator = self._stream_async(call)
        await anext(iterator)
        return iterator

    def abort(self, rid: str | None = None) -> None:
        """End a running request, or all of them. Its caller gets what was generated, with finish reason ``abort``."""
        self._client.abort(rid)

    def flush_cache(self) -> FlushResult:
        """Empty the prefix cache, if no request runs."""
        self._check_process()
        return self._runner.wait_for(self._client.start_flush())

    def shutdown(self) -> None:
        """End the core and every pending call, and free the memory. Further calls are refused. Idempotent."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise EngineStopped("this process was forked from the engine's, without its threads: make an engine here")

    def _collect(self, call: Call) -> Results:
        queue: SimpleQueue[Item] = SimpleQueue()
        with call:
            call.submit(queue.put)
            while call.num_running:
                call.take(self._runner.next_item(queue))
        return call.results()

    def _collect_all(self, calls: Iterable[Call]) -> list[Result]:
        """Submit each call as soon as it is made, and return the results of all."""
        submitted: list[tuple[Call, SimpleQueue[Item]]] = []
        with ExitStack() as running:
            for call in calls:
                queue: SimpleQueue[Item] = SimpleQueue()
                running.enter_context(call)
                call.submit(queue.put)
                submitted.append((call, queue))
            for call, queue in submitted:
                while call.num_running:
                    call.take(self._runner.next_item(queue))
        results: list[Result] = []
        for call, _ in submitted:
            found = call.results()
            results += found if isinstance(found, list) else [found]
        return results

    def _stream(self, call: Call) -> Generator[Result, None, None]:
        queue: SimpleQueue[Item] = SimpleQueue()
        with call:
            call.submit(queue.put)
            yield {}
            while call.num_running:
                if call.take(item := self._runner.next_item(queue)):
                    yield call.result(item[0])

    async def _collect_async(self, call: Call) -> Results:
        queue: asyncio.Queue[Item] = asyncio.Queue()
        with call:
            call.submit(call.threadsafe_put(queue))
            while call.num_running:
                call.take(await self._runner.next_item_async(queue))
        return call.results()

    async def _stream_async(self, call: Call) -> AsyncIterator[Result]:
        queue: asyncio.Queue[Item] = asyncio.Queue()
        with call:
            call.submit(call.threadsafe_put(queue))
            yield {}
            while call.num_running:
                if call.take(item := await self._runner.next_item_async(queue)):
                    yield call.result(item[0])


class ThreadRunner:
    """Builds and runs the core on a thread of its own. The constructor raises what building the core raises."""

    def __init__(self, build: Callable[[], EngineCore], client: EngineClient, link: QueueLink) -> None:
        self._link = link
        ready: Future[EngineCore] = Future()
        self._thread = threading.Thread(target=_run_core, args=(build, ready, client), name="rtp-llm-core", daemon=True)
        self._thread.start()
        try:
            self.core = ready.result()
        except BaseException:
            link.client.send(Shutdown())  # if this thread was interrupted, the core ends once it is built
            if ready.done():
                self._thread.join()
            raise

    def next_item(self, queue: "SimpleQueue[Item]") -> Item:
        return queue.get()

    async def next_item_async(self, queue: "asyncio.Queue[Item]") -> Item:
        return await queue.get()

    def wait_for(self, future: "Future[FlushResult]") -> FlushResult:
        return future.result()

    def stop(self) -> None:
        self._link.client.send(Shutdown())
        if threading.current_thread() is not self._thread:  # the garbage collector may run there
            self._thread.join()
        del self.core


def _run_core(build: Callable[[], EngineCore], ready: "Future[EngineCore]", client: EngineClient) -> None:
    try:
        core = build()
    except BaseException as error:  # raised again in the thread that waits
        ready.set_exception(error)
        return
    ready.set_result(core)
    try:
        core.run()
        client.fail_all(None, "the engine has been shut down")
    except BaseException as error:  # raised again in every thread that waits
        logger.error("the engine core failed: %r", error, exc_info=logger.isEnabledFor(logging.DEBUG))
        client.fail_all(error)
    finally:
        core.shutdown()


class InlineRunner:
    """Steps the core in the thread that waits for a result."""

    def __init__(self, build: Callable[[], EngineCore], client: EngineClient, link: QueueLink) -> None:
        self._client = client
        self._lock = threading.RLock()
        self.core = build()

    def next_item(self, queue: "SimpleQueue[Item]") -> Item:
        while queue.empty():
            self._step()
        return queue.get()

    async def next_item_async(self, queue: "asyncio.Queue[Item]") -> Item:
        while queue.empty():
            self._step()
            await asyncio.sleep(0)
        return queue.get_nowait()

    def wait_for(self, future: "Future[FlushResult]") -> FlushResult:
        while not future.done():
            self._step()
        return future.result()

    def stop(self) -> None:
        with self._lock:
            self._client.fail_all(None, "the engine has been shut down")
            self.core.shutdown()
            del self.core

    def _step(self) -> None:
        with self._lock:
            try:
                self.core.step(block=False)
            except BaseException as error:  # even an interrupt: a half-done step cannot be resumed
                self._client.fail_all(error)
                raise


def _server_args(model_path: str | None, server_args: ServerArgs | None, kwargs: dict[str, Any]) -> ServerArgs:
    if server_args is not None:
        if model_path is not None or kwargs:
            raise TypeError("Engine takes either server_args or single arguments, not both")
        return server_args
    given = {"log_level": "error"} | kwargs
    return ServerArgs.from_dict(given if model_path is None else given | {"model_path": model_path})
