"""The link between the client side and the core, within one process.

The port, which the link between processes implements too:

- The core's end: ``drain(block)`` returns the messages that came since the last call, in order; with ``block`` it waits
  until there is at least one. ``send(messages)`` hands a step's messages over, in order.
- The client's end: ``send(message)``, from any thread, in order per thread. ``send_all(messages)`` sends all, or raises
  and sends none: MessageError for one that cannot be encoded, or that the core could not decode. ``on_messages``
  registers the one callable that gets the core's messages, as lists; it runs in the thread that receives (here: the
  core's) and must be quick.

Messages are those of ``rtp_llm.srt.messages``; the link does not interpret them.
"""

import pickle
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, Protocol

Receiver = Callable[[list[Any]], None]


class MessageError(ValueError):
    """A message that cannot be encoded, or that the other end could not decode; nothing was sent."""


class CoreEnd(Protocol):
    """The core loop's end of a link."""

    def drain(self, block: bool) -> list[Any]: ...

    def send(self, messages: list[Any]) -> None: ...


class ClientEnd(Protocol):
    """The client side's end of a link."""

    def send(self, message: Any) -> None: ...

    def send_all(self, messages: Sequence[Any]) -> None: ...

    def on_messages(self, receive: Receiver) -> None: ...


class QueueLink:
    """A link to a core on another thread, or on the same one (inline). ``core`` and ``client`` are its ends."""

    def __init__(self) -> None:
        to_core: SimpleQueue[Any] = SimpleQueue()
        self.client = QueueClientEnd(to_core)
        self.core = QueueCoreEnd(to_core, self.client)


class QueueClientEnd:
    def __init__(self, to_core: SimpleQueue[Any]) -> None:
        self._to_core = to_core
        self._receive: Receiver | None = None

    def send(self, message: Any) -> None:
        self._to_core.put(message)

    def send_all(self, messages: Sequence[Any]) -> None:
        for message in messages:
            self._to_core.put(message)

    def on_messages(self, receive: Receiver) -> None:
        self._receive = receive

    def deliver(self, messages: list[Any]) -> None:
        if self._receive is None:
            raise RuntimeError(f"{len(messages)} messages from the core, but nobody called on_messages()")
        self._receive(messages)


class QueueCoreEnd:
    def __init__(self, to_core: SimpleQueue[Any], client: QueueClientEnd) -> None:
        self._to_core = to_core
        self._client = client

    def drain(self, block: bool) -> list[Any]:
        messages = [self._to_core.get()] if block else []
        while True:
            try:
                messages.append(self._to_core.get_nowait())
            except Empty:
                return messages

    def send(self, messages: list[Any]) -> None:
        if messages:
            self._client.deliver(messages)


def send(pipe: Connection, message: Any) -> None:
    """Send a message to a child process by value: ``Connection.send`` would pass tensors through shared memory."""
    pipe.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(pipe: Connection) -> Any:
    """Receive the next message of ``send``. Raise EOFError once the other end is closed."""
    return pickle.loads(pipe.recv_bytes())
