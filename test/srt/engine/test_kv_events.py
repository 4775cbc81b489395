"""Publishing the prefix cache's events: the wire format, replay, and readers that do not read."""

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from rtp_llm.srt.cache.block_events import BlocksRemoved, BlocksStored
from rtp_llm.srt.cache.spec import CacheGroup, CacheSpec
from rtp_llm.srt.configs.kv_events import KvEventsConfig
from rtp_llm.srt.engine.kv_events import END, KvEvents, of_rank

GROUPS = [
    CacheGroup(CacheSpec(1, 8, 8, "float32"), (0,)),
    CacheGroup(CacheSpec(1, 8, 8, "float32", window=20), (1,)),
]
CONTEXT = zmq.Context.instance()


@contextmanager
def publishing(folder: Path, rank: int = 0, **options: Any) -> Iterator[KvEvents]:
    endpoints = {"endpoint": f"ipc://{folder}/events", "replay_endpoint": f"ipc://{folder}/replay"}
    events = KvEvents(KvEventsConfig(**(endpoints | options)), GROUPS, rank)
    try:
        yield events
    finally:
        events.shutdown()
        events.shutdown()


@contextmanager
def connected(kind: int, endpoint: str, **options: int) -> Iterator[zmq.Socket]:
    socket = CONTEXT.socket(kind)
    socket.linger, socket.rcvtimeo = 0, 20_000
    for name, value in options.items():
        setattr(socket, name, value)
    if kind == zmq.SUB:
        socket.subscribe(b"")
    socket.connect(endpoint)
    try:
        yield socket
    finally:
        socket.close()


def send(events: KvEvents, number: int) -> None:
    """Make one batch, as if the cache had stored a block."""
    events.watch._events.append(BlocksStored([number], None, [number] * 16, 16, 0))
    events.publish()


def replayed(socket: zmq.Socket, first: int) -> list[tuple[int, list]]:
    """What the replay socket sends from a number on: numbers and batches. ``socket`` is a DEALER."""
    socket.send_multipart([b"", struct.pack(">Q", first)])
    found = []
    while (parts := socket.recv_multipart())[-2] != END:
        found.append((int.from_bytes(parts[-2], "big"), msgspec.msgpack.decode(parts[-1])))
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def meet(events: KvEvents, socket: zmq.Socket) -> int:
    """Publish until the subscriber, which may not be connected yet, gets something; return the next number."""
    for number in range(1, 1000):
        send(events, number)
        if socket.poll(10):
            while socket.poll(50):
                last = socket.recv_multipart()
            assert int.from_bytes(last[1], "big") == number
            return number + 1
    raise AssertionError("the subscriber got nothing")


def test_a_message_is_three_parts_as_documented(tmp_path: Path):
    with publishing(tmp_path, rank=3, topic="kv@pod") as events, connected(zmq.SUB, events.endpoint) as reader:
        number = meet(events, reader)
        events.watch._events += [
            BlocksStored([7, 1 << 63], 5, list(range(32)), 16, 1, [("salt",), None]),
            BlocksRemoved([7], 0),
        ]
        events.publish()
        topic, sequence, payload = reader.recv_multipart()
        events.publish()  # nothing has happened: nothing is sent
        assert not reader.poll(50)
    assert (topic, sequence) == (b"kv@pod", struct.pack(">Q", number))
    stamp, (stored, removed), rank = msgspec.msgpack.decode(payload)
    assert abs(stamp - time.time()) < 60 and rank == 3
    assert stored == {
        "type": "BlockStored",
        "block_hashes": [7, 1 << 63],
        "parent_block_hash": 5,
        "token_ids": list(range(32)),
        "block_size": 16,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [["salt"], None],
        "group_idx": 1,
        "kv_cache_spec_kind": "sliding_window",
        "kv_cache_spec_sliding_window": 20,
    }
    assert removed == {"type": "BlockRemoved", "block_hashes": [7], "medium": "GPU", "group_idx": 0}


def test_a_late_reader_asks_for_what_it_missed(tmp_path: Path):
    with publishing(tmp_path, buffer_steps=5) as events, connected(zmq.DEALER, f"ipc://{tmp_path}/replay") as asking:
        [(number, (_, [cleared], rank))] = replayed(asking, 0)
        assert (number, cleared, rank) == (0, {"type": "AllBlocksCleared"}, 0), "what a core says first"
        for number in range(1, 9):
            send(events, number)
        wait_until(lambda: replayed(asking, 8) != [])
        assert [number for number, _ in replayed(asking, 0)] == [4, 5, 6, 7, 8], "the last five"
        assert [batch[1][0]["block_hashes"] for _, batch in replayed(asking, 7)] == [[7], [8]]
        assert replayed(asking, 9) == []


def test_a_dealer_and_nonsense_at_the_replay_socket(tmp_path: Path):
    with (
        publishing(tmp_path) as events,
        connected(zmq.DEALER, f"ipc://{tmp_path}/replay") as asking,
        connected(zmq.REQ, f"ipc://{tmp_path}/replay") as asking_once,
    ):
        asking_once.send(struct.pack(">Q", 0))
        assert asking_once.recv_multipart()[:2] == [b"", struct.pack(">Q", 0)], "a REQ reads the first alone"
        for nonsense in ([b"x"], [b"", b"short"], [b"", b"", b"", b""]):
            asking.send_multipart(nonsense)
        asking.send_multipart([b"", struct.pack(">Q", 0)])
        assert asking.recv_multipart()[:3] == [b"", b"", struct.pack(">Q", 0)]
        assert asking.recv_multipart()[:3] == [b"", b"", END]
        send(events, 1)


def test_who_does_not_read_makes_nobody_wait(tmp_path: Path):
    with (
        publishing(tmp_path, hwm=100) as events,
        connected(zmq.SUB, events.endpoint, rcvhwm=5) as sleeper,
        connected(zmq.SUB, events.endpoint, rcvhwm=100_000) as reader,
    ):
        number = meet(events, reader)
        for i in range(number, number + 500):
            # 100 of them are more than the system's buffers hold.
            events.watch._events.append(BlocksStored([i], None, [1 << 20] * 4000, 16, 0))
            events.publish()
            assert int.from_bytes(reader.recv_multipart()[1], "big") == i
        assert events._left_out == 0
        asleep = 0
        while sleeper.poll(100):
            sleeper.recv_multipart()
            asleep += 1
        assert asleep < 500, "what waited for it must have been dropped"


def test_a_full_queue_leaves_out_batches_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with publishing(tmp_path, max_queue_size=2) as events, connected(zmq.DEALER, f"ipc://{tmp_path}/replay") as asking:
        sender, events._queue = events._queue, CONTEXT.socket(zmq.PUSH)
        events._queue.sndhwm = 2
        events._queue.bind("inproc://nobody-reads")  # so that it fills up for sure
        for number in range(1, 9):
            send(events, number)
        events._queue.close(linger=0)
        events._queue = sender
        send(events, 9)
        wait_until(lambda: replayed(asking, 9) != [])
        assert [number for number, _ in replayed(asking, 0)] == [0, 9], "a gap shows what is missing"
    assert "batches of cache events were left out" in caplog.text


def test_addresses_of_ranks():
    assert of_rank("tcp://*:5557", 0) == "tcp://*:5557"
    assert of_rank("tcp://*:5557", 2) == "tcp://*:5559"
    assert of_rank("tcp://*:0", 2) == "tcp://*:0"
    assert of_rank("ipc:///tmp/x", 1) == "ipc:///tmp/x_dp1"


def test_a_free_port_is_told_and_a_taken_one_refused(tmp_path: Path):
    with publishing(tmp_path, endpoint="tcp://127.0.0.1:0", replay_endpoint=None) as connects:
        assert connects.endpoint == "tcp://127.0.0.1:0", "an address without * is connected to"
    with publishing(tmp_path, replay_endpoint="tcp://127.0.0.1:0") as events:
        taken = events.replay_endpoint
        assert taken is not None and taken.startswith("tcp://127.0.0.1:") and not taken.endswith(":0")
        with pytest.raises(OSError, match=r"cannot be used.*choose another address"):
            KvEvents(KvEventsConfig(endpoint=f"ipc://{tmp_path}/b", replay_endpoint=taken), GROUPS)
