"""The link between the client side and a core in another process: the port of ``ipc.py`` over ZeroMQ.

One pair of Unix sockets in a private directory per core process; a restarted core gets a new pair, so that messages
to and from the core before are lost. Messages are dataclasses, encoded by msgspec
here and nowhere else: a frame per message, its first byte the index of its class.
"""

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from rtp_llm.srt.utils.ipc import MessageError, Receiver

logger = logging.getLogger(__name__)


class MessageCodec:
    """Encodes messages of some dataclasses; both ends must name the same classes in the same order."""

    def __init__(self, classes: Sequence[type]) -> None:
        self._kinds = {cls: bytes([index]) for index, cls in enumerate(classes)}
        self._decoders: list[msgspec.msgpack.Decoder] = [msgspec.msgpack.Decoder(cls) for cls in classes]
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, message: Any) -> bytes:
        return self._kinds[type(message)] + self._encoder.encode(message)

    def encode_checked(self, message: Any) -> bytes:
        """Encode a message with users' values, and check that the other end can decode it.

        Raises:
            MessageError: it cannot be encoded, or could not be decoded.
        """
        try:
            frame = self.encode(message)
            self.decode(frame)
        except (TypeError, ValueError, OverflowError, LookupError, RecursionError, msgspec.MsgspecError) as error:
            raise MessageError(f"{type(message).__name__} cannot be sent: {error}") from error
        return frame

    def decode(self, frame: bytes) -> Any:
        return self._decoders[frame[0]].decode(memoryview(frame)[1:])


def socket_addresses(directory: str) -> tuple[str, str]:
    """Return ``(to the core, from the core)``. Raise OSError if the directory's name is too long for sockets."""
    if len(directory) > 90:
        raise OSError(f"{directory} is too long a name for sockets; set TMPDIR to a shorter one")
    return f"ipc://{Path(directory) / 'to-core'}", f"ipc://{Path(directory) / 'from-core'}"


class ZmqCoreEnd:
    """The core's end. Used by the core's thread alone."""

    def __init__(self, directory: str, to_core: Sequence[type], from_core: Sequence[type]) -> None:
        incoming, outgoing = socket_addresses(directory)
        self._codec_in, self._codec_out = MessageCodec(to_core), MessageCodec(from_core)
        self._context = zmq.Context()
        self._incoming = _socket(self._context, zmq.PULL)
        self._incoming.bind(incoming)
        self._outgoing = _socket(self._context, zmq.PUSH)
        self._outgoing.connect(outgoing)

    def drain(self, block: bool) -> list[Any]:
        messages = [self._codec_in.decode(self._incoming.recv())] if block else []
        while True:
            try:
                messages.append(self._codec_in.decode(self._incoming.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def send(self, messages: list[Any]) -> None:
        if messages:
            self._outgoing.send_multipart([self._codec_out.encode(message) for message in messages], copy=True)

    def close(self) -> None:
        """Close the sockets; messages already sent are delivered for up to a second."""
        self._context.destroy(linger=1000)


class ZmqClientEnd:
    """The client's end. ``send`` from any thread; received messages are delivered in a thread of its own."""

    def __init__(self, directory: str, to_core: Sequence[type], from_core: Sequence[type]) -> None:
        outgoing, incoming = socket_addresses(directory)
        self._codec_out, self._codec_in = MessageCodec(to_core), MessageCodec(from_core)
        self._context = zmq.Context()
        self._lock = threading.Lock()
        self._outgoing: zmq.Socket | None = _socket(self._context, zmq.PUSH)
        self._outgoing.connect(outgoing)
        self._incoming = _socket(self._context, zmq.PULL)
        self._incoming.bind(incoming)
        self._receive: Receiver | None = None
        self.heard_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="rtp-llm-link", daemon=True)

    def on_messages(self, receive: Receiver) -> None:
        self._receive = receive
        self.heard_at = time.monotonic()
        self._thread.start()

    def send(self, message: Any) -> None:
        """Send one message: see ``send_all``."""
        self.send_all([message])

    def send_all(self, messages: Sequence[Any]) -> None:
        """Send all of them, or none. After ``close`` they are dropped: the closer handles the requests.

        Raises:
            MessageError: see MessageCodec.encode_checked.
        """
        frames = [self._codec_out.encode_checked(message) for message in messages]
        with self._lock:
            if self._outgoing is not None and frames:
                self._outgoing.send_multipart(frames)  # parts arrive together; the core reads them one by one

    def close(self) -> None:
        """End the receiving thread; after this, no message is delivered."""
        with self._lock:
            if self._outgoing is None:
                return
            self._outgoing.close(linger=0)
            self._outgoing = None
        if not self._thread.is_alive():
            self._incoming.close(linger=0)
        self._context.term()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        assert self._receive is not None
        try:
            while True:
                frames = self._incoming.recv_multipart()
                self.heard_at = time.monotonic()
                self._receive([self._codec_in.decode(frame) for frame in frames])
        except zmq.ContextTerminated:
            pass  # closed: the thread ends
        finally:
            self._incoming.close(linger=0)


def _socket(context: zmq.Context, kind: int) -> zmq.Socket:
    """Create a socket without a limit of queued messages: a full queue would block the core."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    return socket
