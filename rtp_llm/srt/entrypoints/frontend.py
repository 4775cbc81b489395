"""Calls, as the offline API and the server share them: from arguments to completions and back.

A call is checked and turned into completions (``completions_of``), which a ``Call`` submits, feeds and, when left,
ends. ``Frontend`` runs calls for one event loop: outputs are decoded as they come, however slowly they are read: a
slow reader finds one longer delta, and does not delay the others.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol, Self, TypeVar, cast

from rtp_llm.srt.managers.detokenizer import Completion, Delta
from rtp_llm.srt.managers.engine_client import Client, EngineStopped
from rtp_llm.srt.managers.generate_options import GenerateOptions, per_prompt
from rtp_llm.srt.managers.tokenizer_manager import MEDIA_FIELDS, Prompt, TokenizerManager
from rtp_llm.srt.messages import TokenOutput
from rtp_llm.srt.sampling_params import InvalidRequest

logger = logging.getLogger(__name__)

PROMPT_FIELDS = ("sampling_params", *MEDIA_FIELDS.values())  # options of a call that are fields of Prompt

T = TypeVar("T")
Result = dict[str, Any]
Results = Result | list[Result]
Item = tuple[int, TokenOutput | EngineStopped]  # (index of a completion in its call, output for it)


def completions_of(
    manager: TokenizerManager, prompt: Any, input_ids: Any, options: Mapping[str, Any]
) -> tuple[list[Completion], bool]:
    """Return the completions of a call, in order of prompts, and whether its answer is a list.

    Args:
        prompt: one text, or a list of them.
        input_ids: instead, one prompt's token ids, or a list of them.
        options: GenerateOptions, and ``sampling_params``.

    Raises:
        InvalidRequest: names the prompt, if it is one of a list.
    """
    prompts, batched = _prompts(prompt, input_ids, options)
    if any(item.has_media for item in prompts):
        prompts = run_in_thread(partial(_with_media, manager, prompts, batched))
    return _completions(manager, prompts, batched)


async def completions_with_media(
    manager: TokenizerManager, prompt: Any, input_ids: Any, options: Mapping[str, Any]
) -> tuple[list[Completion], bool]:
    """Do the same as ``completions_of`` without blocking the event loop while media are fetched and decoded."""
    prompts, batched = _prompts(prompt, input_ids, options)
    return _completions(manager, await _with_media(manager, prompts, batched), batched)


async def _with_media(manager: TokenizerManager, prompts: list[Prompt], batched: bool) -> list[Prompt]:
    manager.check_media(prompts)
    done = []
    for i, item in enumerate(prompts):
        with _numbered(i, batched):
            done.append(await manager.with_media(item))
    return done


def _completions(manager: TokenizerManager, prompts: list[Prompt], batched: bool) -> tuple[list[Completion], bool]:
    completions = []
    for i, item in enumerate(prompts):
        with _numbered(i, batched):
            requests = manager.requests(item)
        completions += [manager.completion(request) for request in requests]
    return completions, batched or len(completions) > 1


@contextmanager
def _numbered(i: int, batched: bool) -> Iterator[None]:
    """Put the prompt's index into an InvalidRequest raised within, if the prompt is one of a list."""
    try:
        yield
    except InvalidRequest as error:
        raise type(error)(f"prompt {i}: {error}", error.param) if batched else error from None


def run_in_thread(make_coroutine: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in a new thread and wait for its result: the caller's thread may run an event loop."""
    with ThreadPoolExecutor(1, thread_name_prefix="rtp-llm-media") as pool:
        return pool.submit(lambda: asyncio.run(make_coroutine())).result()


class Call:
    """The completions of one ``generate``. Leaving its context aborts the requests that still run."""

    def __init__(self, client: Client, completions: list[Completion], many: bool) -> None:
        self._client = client
        self._completions = completions
        self.many = many  # whether the answer is a list
        self._submitted = False
        self.num_running = len(completions)

    def submit(self, put: Callable[[Item], None]) -> None:
        """Start all requests; ``put`` gets their outputs in the core's thread."""
        self._submitted = True
        try:
            self._client.submit_all(
                [(item.request, partial(_put_item, put, i)) for i, item in enumerate(self._completions)]
            )
        except Exception:
            self._submitted = False  # none was sent, and the rids may be those of another call
            raise

    def threadsafe_put(self, queue: "asyncio.Queue[Item]") -> Callable[[Item], None]:
        """Return a ``put`` into the running event loop's ``queue``. If the loop is closed, the request is aborted."""
        loop = asyncio.get_running_loop()
        client, rids = self._client, [item.request.rid for item in self._completions]

        def put(item: Item) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, item)
            except RuntimeError:  # the event loop is closed
                client.abort(rids[item[0]])

        return put

    def take(self, item: Item) -> bool:
        """Add an output to its completion; return False if that has finished already."""
        i, output = item
        if isinstance(output, EngineStopped):
            raise output
        completion = self._completions[i]
        if completion.finished:
            return False
        completion.add(output)
        if completion.finished:
            self.num_running -= 1
            if output.finish_reason is None:  # by a stop string, which the core does not look for
                self._client.abort(completion.request.rid)
        return True

    def result(self, i: int) -> Result:
        """Return the result so far of completion ``i``, for a stream."""
        result = self._completions[i].result()
        return {**result, "index": i} if self.many else result

    def results(self) -> Results:
        results = [completion.result() for completion in self._completions]
        return results if self.many else results[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._submitted:
            for completion in self._completions:
                if not completion.finished:
                    self._client.abort(completion.request.rid)


def _put_item(put: Callable[[Item], None], i: int, output: TokenOutput | EngineStopped) -> None:
    put((i, output))


class Observer(Protocol):
    """Gets the events of a Frontend's requests, in the event loop."""

    def started(self, completion: Completion) -> None: ...

    def progressed(self, completion: Completion, num_new: int, elapsed_s: float, is_first: bool) -> None:
        """``num_new`` tokens came ``elapsed_s`` after the ones before, or after the start if they are the first."""
        ...

    def ended(self, completion: Completion, elapsed_s: float) -> None:
        """The request finished, or its caller cancelled it: then ``completion.finished`` is false."""
        ...


class Frontend:
    """Starts calls from one event loop. Every method but the constructor runs in that loop."""

    def __init__(
        self,
        client: Client,
        manager: TokenizerManager,
        loop: asyncio.AbstractEventLoop,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.client = client
        self.manager = manager
        self._mailbox = LoopMailbox(loop)
        self._observers = observers

    def start(self, completions: list[Completion], many: bool = True) -> "LiveCall":
        """Submit a call and return it. Use it in a ``with`` block, which aborts what still runs.

        Raises:
            EngineStopped, InvalidRequest: see EngineClient.submit_all.
        """
        call = LiveCall(self.client, completions, many, self._observers)
        call.submit(partial(self._mailbox.put, call.deliver))
        return call


class LoopMailbox:
    """Hands items from any thread to the event loop, which is woken once for all that have come by then."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._items: list[tuple[Callable[[Item], None], Item]] = []

    def put(self, deliver: Callable[[Item], None], item: Item) -> None:
        with self._lock:
            self._items.append((deliver, item))
            if len(self._items) > 1:
                return  # a wake-up is under way
        try:
            self._loop.call_soon_threadsafe(self._deliver_all)
        except RuntimeError:  # the loop is closed, and with it every call that waits
            logger.debug("an output came after the event loop was closed")

    def _deliver_all(self) -> None:
        with self._lock:
            items, self._items = self._items, []
        for deliver, item in items:
            deliver(item)


class LiveCall(Call):
    """A submitted call of a Frontend. Read it with one of ``changes``, ``deltas`` and ``wait``."""

    def __init__(
        self, client: Client, completions: list[Completion], many: bool, observers: Sequence[Observer]
    ) -> None:
        super().__init__(client, completions, many)
        self._observers = observers
        self._changed: dict[int, None] = {}
        self._wake = asyncio.Event()
        self._error: Exception | None = None
        self._is_left = False  # outputs that still come are ignored
        self._start_s = time.perf_counter()
        self._last_s: list[float | None] = [None] * len(completions)  # when tokens came last

    @property
    def completions(self) -> Sequence[Completion]:
        return self._completions

    def submit(self, put: Callable[[Item], None]) -> None:
        super().submit(put)
        try:
            for completion in self._completions:
                for observer in self._observers:
                    observer.started(completion)
        except BaseException:
            super().__exit__()  # the caller gets no call to read: abort its requests
            raise

    def deliver(self, item: Item) -> None:
        """Take an output, in the event loop. Never raise: errors are raised where the call is read."""
        if self._is_left:  # its observers know how each request ended
            return
        try:
            num_before = len(self._completions[item[0]].output_ids)
            if not self.take(item):
                return
            self._observe(item[0], num_before)
            self._changed[item[0]] = None
        except Exception as error:
            self._error = error
        self._wake.set()

    def _observe(self, i: int, num_before: int) -> None:
        completion, last_s, now_s = self._completions[i], self._last_s[i], time.perf_counter()
        if (num_new := len(completion.output_ids) - num_before) > 0:
            since_s = self._start_s if last_s is None else last_s
            for observer in self._observers:
                observer.progressed(completion, num_new, now_s - since_s, last_s is None)
            self._last_s[i] = now_s
        if completion.finished:
            for observer in self._observers:
                observer.ended(completion, now_s - self._start_s)

    async def changes(self) -> AsyncIterator[list[int]]:
        """Yield the indices of completions with new output, until all have finished."""
        num_left = len(self._completions)
        while num_left:
            await self._wake.wait()
            self._wake.clear()
            if self._error is not None:
                raise self._error
            changed, self._changed = list(self._changed), {}
            num_left -= sum(self._completions[i].finished for i in changed)
            if changed:
                yield changed

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (index of a completion, its delta). The last delta of each comes even if it is empty."""
        async for changed in self.changes():
            for i in changed:
                finished = self._completions[i].finished
                delta = self._completions[i].take_delta()
                if delta.text or delta.token_ids or finished:
                    yield i, delta

    async def wait(self) -> Literal[True]:
        """Return when all completions have finished."""
        async for _ in self.changes():
            pass
        return True

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._is_left = True
        elapsed_s = time.perf_counter() - self._start_s
        for completion in self._completions:
            if not completion.finished:
                for observer in self._observers:
                    observer.ended(completion, elapsed_s)


def _prompts(prompt: Any, input_ids: Any, options: Mapping[str, Any]) -> tuple[list[Prompt], bool]:
    """Return the prompts of a call, and whether it gave a list of them."""
    if (prompt is None) == (input_ids is None):
        given = "neither" if prompt is None else "both"
        raise InvalidRequest(f"give either prompt or input_ids; {given} is given", "prompt")
    name, value = ("prompt", prompt) if input_ids is None else ("input_ids", input_ids)
    field_name = "text" if name == "prompt" else "input_ids"
    if not _is_batch(name, value):
        return [_prompt(field_name, value, options)], False
    if not value:
        raise InvalidRequest(f"{name} is an empty list", name)
    columns = {key: per_prompt(key, option, len(value)) for key, option in options.items()}
    rows = [{key: column[i] for key, column in columns.items()} for i in range(len(value))]
    return [_prompt(field_name, item, row) for item, row in zip(value, rows, strict=True)], True


def _prompt(field_name: str, value: Any, options: Mapping[str, Any]) -> Prompt:
    own = {key: option for key, option in options.items() if key in PROMPT_FIELDS}
    others = {key: option for key, option in options.items() if key not in PROMPT_FIELDS}
    return Prompt(**{field_name: value}, **own, options=cast(GenerateOptions, others))


def _is_batch(name: str, value: Any) -> bool:
    if not isinstance(value, (list, tuple)):
        return False
    return name == "prompt" or (len(value) > 0 and isinstance(value[0], (list, tuple)))
