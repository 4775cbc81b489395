"""Publishes what the prefix cache holds over ZeroMQ, in the form of vLLM 0.32's KV events.

A message has three parts: topic, sequence number (8 bytes, big-endian), and a batch in msgpack: an array of the time in
seconds, the events and the data-parallel rank. An event is a map whose ``type`` is BlockStored, BlockRemoved or
AllBlocksCleared.

A subscriber that missed messages asks the replay socket, a ROUTER, from a DEALER: an empty part and the number of the
first batch that it wants. It gets an empty part, topic, number and batch for each that is still kept, and at last the
number -1. (A REQ socket can ask, too, but reads only the first of several answers.)
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

import msgspec
import zmq

from rtp_llm.srt.cache.block_events import BlocksCleared, BlocksRemoved, BlocksStored, BlockWatch, CacheEvent
from rtp_llm.srt.cache.spec import CacheGroup
from rtp_llm.srt.configs.kv_events import KvEventsConfig

logger = logging.getLogger(__name__)

MEDIUM = "GPU"  # vLLM's word for the memory that the model computes in, whatever the device
KINDS: dict[str, str] = {"full": "full_attention", "window": "sliding_window", "latent": "mla_attention"}
END = (-1).to_bytes(8, "big", signed=True)
STOP_TIMEOUT_S = 2.0
LINGER_MS = 500  # that the last messages have to leave in


class _Event(msgspec.Struct, tag=True, omit_defaults=True):
    pass


class BlockStored(_Event):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: None
    medium: str
    lora_name: None
    extra_keys: list[tuple[str, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(_Event):
    block_hashes: list[int]
    medium: str
    group_idx: int | None = None


class AllBlocksCleared(_Event):
    pass


class Batch(msgspec.Struct, array_like=True):
    ts: float  # seconds since 1970
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int


class KvEvents:
    """Watches a prefix cache, and publishes its events after each step.

    A thread sends. The core waits for nobody: a subscriber that does not read misses what exceeds its queue, and if the
    thread cannot keep up, batches are left out. Either shows as a gap in the sequence numbers.
    """

    def __init__(self, config: KvEventsConfig, groups: Sequence[CacheGroup], data_parallel_rank: int = 0) -> None:
        """Begin to publish, first of all that the cache is empty.

        Raises:
            OSError: an address cannot be used.
        """
        self.watch = BlockWatch(groups)
        self._groups = list(groups)
        self._rank = data_parallel_rank
        self._encoder = msgspec.msgpack.Encoder()
        self._sequence = 0
        self._left_out = 0
        self._context = zmq.Context()
        self._queue = self._context.socket(zmq.PUSH)
        self._queue.sndhwm = config.max_queue_size
        self._queue.bind("inproc://batches")
        try:
            self._sender = _Sender(self._context, config, data_parallel_rank)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.endpoint, self.replay_endpoint = self._sender.endpoint, self._sender.replay_endpoint
        self._sender.start()
        self.watch.cleared()  # for subscribers of a core that died before
        self.publish()
        logger.info("events of the prefix cache: %s, blocks of %d tokens", self.endpoint, self.watch.block_size)

    def publish(self) -> None:
        """Send the events since the last call, if there are any."""
        events = self.watch.take()
        if not events:
            return
        batch = Batch(time.time(), [self._encoded(event) for event in events], self._rank)
        number, self._sequence = self._sequence, self._sequence + 1
        try:
            self._queue.send_multipart([number.to_bytes(8, "big"), self._encoder.encode(batch)], zmq.NOBLOCK)
        except zmq.Again:
            self._left_out += 1
            if self._left_out & (self._left_out - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
                logger.warning("%d batches of cache events were left out: the queue is full", self._left_out)

    def _encoded(self, event: CacheEvent) -> BlockStored | BlockRemoved | AllBlocksCleared:
        if isinstance(event, BlocksCleared):
            return AllBlocksCleared()
        if isinstance(event, BlocksRemoved):
            return BlockRemoved(event.hashes, MEDIUM, event.group)
        assert isinstance(event, BlocksStored)
        spec = self._groups[event.group].spec
        return BlockStored(
            event.hashes,
            event.parent,
            event.token_ids,
            event.block_size,
            None,
            MEDIUM,
            None,
            event.extra_keys,
            event.group,
            KINDS[spec.kind],
            spec.window,
        )

    def shutdown(self) -> None:
        """Send what is queued, within a short time, and end. Idempotent."""
        if self._queue.closed:
            return
        try:
            self._queue.send(b"", zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("the queue of cache events is full at the end: what waits is lost")
        self._queue.close(linger=0)
        self._sender.join(STOP_TIMEOUT_S)
        if not self._sender.is_alive():
            self._context.term()


class _Sender(threading.Thread):
    """The thread that owns the sockets."""

    def __init__(self, context: zmq.Context, config: KvEventsConfig, rank: int) -> None:
        super().__init__(name="rtp-llm-kv-events", daemon=True)
        self._topic = config.topic.encode()
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._queue = context.socket(zmq.PULL)
        self._queue.rcvhwm = 1  # what waits is counted at the other end
        self._queue.connect("inproc://batches")
        self._publisher = context.socket(zmq.PUB)
        self._publisher.sndhwm = config.hwm
        self.endpoint = _open(self._publisher, of_rank(config.endpoint, rank))
        self._replay: zmq.Socket | None = None
        self.replay_endpoint: str | None = None
        if config.replay_endpoint is not None:
            self._replay = context.socket(zmq.ROUTER)
            self._replay.sndhwm = config.buffer_steps + 2  # for one answer; a ROUTER drops what exceeds it
            self.replay_endpoint = _open(self._replay, of_rank(config.replay_endpoint, rank), bind=True)

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._queue, zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, zmq.POLLIN)
        more = True
        while more:
            ready = dict(poller.poll())
            if self._queue in ready:
                more = self._send()
            if self._replay is not None and self._replay in ready:
                self._answer(self._replay)
        for socket in (self._queue, self._publisher, self._replay):
            if socket is not None:
                socket.close(linger=LINGER_MS)

    def _send(self) -> bool:
        """Send the next batch; False if there will be no more."""
        parts = self._queue.recv_multipart()
        if len(parts) == 1:
            return False
        number, payload = parts
        self._publisher.send_multipart([self._topic, number, payload])
        self._kept.append((number, payload))
        return True

    def _answer(self, replay: zmq.Socket) -> None:
        """Send the kept batches from the number on that is asked for."""
        frames = replay.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            logger.warning("a request to replay cache events is not a number of 8 bytes after an empty part")
            return
        client, _, first = frames
        for number, payload in self._kept:
            if number >= first:
                replay.send_multipart([client, b"", self._topic, number, payload])
        replay.send_multipart([client, b"", b"", END, b""])


def of_rank(endpoint: str, rank: int) -> str:
    """Return an endpoint of a data-parallel rank: port plus rank, or for names a suffix. A port 0 stays."""
    if rank == 0:
        return endpoint
    if not endpoint.startswith("tcp://"):
        return f"{endpoint}_dp{rank}"
    host, port = endpoint.rsplit(":", 1)
    return endpoint if port == "0" else f"{host}:{int(port) + rank}"


def _open(socket: zmq.Socket, endpoint: str, bind: bool = False) -> str:
    """Bind or connect a socket, by the address; return the address with the port that was taken."""
    bind = bind or "*" in endpoint or "::" in endpoint or not endpoint.startswith("tcp://")
    try:
        (socket.bind if bind else socket.connect)(endpoint)
    except zmq.ZMQError as error:
        raise OSError(f"kv_events_config: {endpoint} cannot be used: {error}; choose another address") from error
    if not endpoint.endswith(":0"):
        return endpoint
    taken = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return f"{endpoint.rsplit(':', 1)[0]}:{taken.rsplit(':', 1)[1]}"
