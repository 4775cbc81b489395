"""A server's events as a router gets them: decoded with vLLM's own structs, beside its answers."""

import ast
import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import zmq

from tiny_server import own_process, wait_for, words

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("server-process")]

VARIABLE = "RTP_LLM_VLLM_SOURCE"


# As vLLM documents the format, for where its source is not at hand.
class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class KVCacheEvent(msgspec.Struct, omit_defaults=True, tag=True):
    pass


class BlockStored(KVCacheEvent):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(KVCacheEvent):
    pass


class DocumentedBatch(EventBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


def vllm_batch() -> type:
    """The struct KVEventBatch of vLLM's own file, of which only the structs are run."""
    source = os.environ.get(VARIABLE)
    if not source:
        pytest.skip(f"needs vLLM's source: set {VARIABLE} to its unpacked folder")
    roots = (Path(source), Path(source).parent)
    path = next(path for root in roots if (path := root / "vllm/distributed/kv_events.py").is_file())
    names = ("EventBatch", "KVCacheEvent", "BlockStored", "BlockRemoved", "AllBlocksCleared", "KVEventBatch")
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]
    assert len(tree.body) == len(names)
    space = {"msgspec": msgspec, "Any": Any, "ExternalBlockHash": bytes | int, "__name__": "vllm_structs"}
    exec(compile(tree, str(path), "exec"), space)
    return space["KVEventBatch"]


class Reader:
    """Reads events, and keeps what a router would: which hashes the server holds."""

    def __init__(self, folder: Path, batch: type) -> None:
        self.decoder = msgspec.msgpack.Decoder(batch)
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.subscribe(b"kv")
        self.socket.connect(f"ipc://{folder}/events")
        self.replay = self.context.socket(zmq.DEALER)
        self.replay.connect(f"ipc://{folder}/replay")
        self.held: set[int] = set()
        self.tokens: dict[int, list[int]] = {}
        self.next = 0

    def read(self, timeout_ms: int = 500) -> list[Any]:
        """Take in what has come, after asking for what was missed."""
        events = []
        while self.socket.poll(timeout_ms):
            topic, number, payload = self.socket.recv_multipart()
            assert topic == b"kv"
            number = int.from_bytes(number, "big")
            if number < self.next:
                continue
            if number > self.next:
                events += self.missed()
            if number == self.next:
                events += self.take(number, payload)
        return events

    def missed(self) -> list[Any]:
        self.replay.send_multipart([b"", struct.pack(">Q", self.next)])
        events: list[Any] = []
        while True:
            _, topic, number, payload = self.replay.recv_multipart()
            if int.from_bytes(number, "big", signed=True) == -1:
                return events
            assert topic == b"kv"
            events += self.take(int.from_bytes(number, "big"), payload)

    def take(self, number: int, payload: bytes) -> list[Any]:
        assert number == self.next
        self.next += 1
        batch = self.decoder.decode(payload)
        assert batch.data_parallel_rank == 0 and abs(batch.ts - time.time()) < 600
        for event in batch.events:
            kind = type(event).__name__
            if kind == "BlockStored":
                assert not set(event.block_hashes) & self.held
                assert event.parent_block_hash is None or event.parent_block_hash in self.held
                assert len(event.token_ids) == len(event.block_hashes) * event.block_size
                self.held |= set(event.block_hashes)
                for i, block in enumerate(event.block_hashes):
                    self.tokens[block] = event.token_ids[i * event.block_size : (i + 1) * event.block_size]
            elif kind == "BlockRemoved":
                assert set(event.block_hashes) <= self.held
                self.held -= set(event.block_hashes)
            else:
                self.held.clear()
        return batch.events

    def close(self) -> None:
        self.context.destroy(linger=0)


def ask(url: str, text: str) -> dict[str, Any]:
    body = {"text": text, "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}}
    return httpx.post(f"{url}/generate", json=body, timeout=300).json()


@pytest.mark.parametrize("theirs", [False, True], ids=["documented", "vllm"])
def test_a_router_follows_a_server(tiny_checkpoint: str, tmp_path: Path, theirs: bool) -> None:
    batch = vllm_batch() if theirs else DocumentedBatch
    config = {"enable_kv_cache_events": True, "endpoint": f"ipc://{tmp_path}/events"}
    config |= {"replay_endpoint": f"ipc://{tmp_path}/replay", "topic": "kv"}
    flags = ("--kv-events-config", json.dumps(config), "--max-total-tokens", "1024")
    with own_process(tmp_path, tiny_checkpoint, *flags) as server:
        server.wait_ready()
        reader = Reader(tmp_path, batch)
        try:
            follow(server, reader)
        finally:
            reader.close()


def follow(server: Any, reader: Reader) -> None:
    text = words(60)
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": text}, timeout=60).json()["tokens"]
    ask(server.url, text)
    events = reader.read()
    assert type(events[0]).__name__ == "AllBlocksCleared", "what was missed came by replay"
    whole = len(ids) // 16
    told = [token_id for block in reader.tokens.values() for token_id in block]
    assert told[: 16 * whole] == ids[: 16 * whole]
    held = set(reader.held)
    ask(server.url, text)
    assert reader.read() == [], "a prompt that is cached is told once"
    for seed in range(1, 20):  # 19 * 60 tokens: more than the cache holds
        ask(server.url, words(60, seed))
    removed = [event for event in reader.read() if type(event).__name__ == "BlockRemoved"]
    assert removed and not held <= reader.held
    again = ask(server.url, text)
    reader.read()
    assert held <= reader.held, "the same tokens have the same hashes"
    assert again["meta_info"]["cached_tokens"] < len(ids)
    wait_for(lambda: httpx.post(f"{server.url}/flush_cache", timeout=60).status_code == 200)
    assert type(reader.read()[-1]).__name__ == "AllBlocksCleared" and not reader.held
