"""Several cores behind one client, against scripted cores on the other ends of their links."""

from dataclasses import replace
from typing import Any

import pytest
from made_requests import generate_request

from rtp_llm.srt.managers.engine_client import EngineClient, EngineStopped
from rtp_llm.srt.managers.prefix_routes import BLOCK_TOKENS
from rtp_llm.srt.managers.replica_client import ReplicaClient, joined_info, joined_stats
from rtp_llm.srt.messages import (
    AbortRequest,
    CoreInfo,
    CoreStats,
    FinishReason,
    FlushCache,
    FlushCacheDone,
    GenerateRequest,
    TokenOutput,
)
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.srt.utils.ipc import MessageError, QueueLink

STOP = FinishReason("stop")


class Cores:
    """Two cores that answer when a test says so."""

    def __init__(self, count: int = 2) -> None:
        self.links = [QueueLink() for _ in range(count)]
        self.ready = [True] * count
        clients = [EngineClient(link.client) for link in self.links]
        self.client = ReplicaClient(clients, [100 * BLOCK_TOKENS] * count, lambda core: self.ready[core])
        self.got: list[list[Any]] = [[] for _ in range(count)]
        self.outputs: dict[str, list[Any]] = {}

    def submit(self, rid: str, prompt: list[int]) -> int:
        """Return the core that got the request."""
        self.client.submit(generate_request(rid, prompt), self.outputs.setdefault(rid, []).append)
        [core] = [core for core in range(len(self.links)) if self.receive(core)]
        return core

    def receive(self, core: int) -> list[Any]:
        messages = self.links[core].core.drain(block=False)
        self.got[core] += messages
        return messages

    def end(self, core: int, rid: str, ids: list[int] | None = None) -> None:
        self.links[core].core.send([TokenOutput(rid, ids or [1], finish_reason=STOP)])


def long(first: int) -> list[int]:
    return list(range(first, first + 3 * BLOCK_TOKENS))


def test_requests_are_spread_and_come_back_for_their_prefix() -> None:
    cores = Cores()
    assert [cores.submit("a", long(0)), cores.submit("b", long(1000))] == [0, 1]
    cores.end(0, "a", [7] * BLOCK_TOKENS)
    cores.end(1, "b")
    assert cores.client.num_live == 0 and cores.client._routes.num_requests == [0, 0]
    assert cores.submit("c", [*long(1000), 5]) == 1
    assert cores.submit("d", [*long(0), *[7] * BLOCK_TOKENS]) == 0  # an answer belongs to the next turn's prefix
    assert cores.client._routes.matched_tokens(0, []) == 0
    assert [output.finish_reason for output in cores.outputs["a"]] == [STOP]


def test_a_core_that_is_not_ready_gets_nothing_new() -> None:
    cores = Cores()
    assert cores.submit("a", long(0)) == 0
    cores.ready[0] = False
    assert cores.submit("b", long(0)) == 1
    cores.client.lost(0)
    cores.ready = [False, False]
    assert cores.submit("c", long(0)) == 1  # where its prefix is; it waits for the core


def test_aborts_go_to_the_requests_core() -> None:
    cores = Cores()
    assert [cores.submit("a", long(0)), cores.submit("b", long(1000))] == [0, 1]
    cores.client.abort("b")
    cores.client.abort("unknown")
    assert cores.receive(0) == [] and cores.receive(1) == [AbortRequest("b")]
    assert cores.submit("b", long(0)) == 1  # the same rid again: after the end of the first
    cores.client.abort(None)
    assert cores.receive(0) == [AbortRequest(None)]


def test_all_of_a_call_are_sent_or_none() -> None:
    cores = Cores()
    heard: list[Any] = []
    entries = [(generate_request(rid, long(1000 * i)), heard.append) for i, rid in enumerate("ab")]
    with pytest.raises(InvalidRequest, match="'a'"):
        cores.client.submit_all([*entries, entries[0]])
    assert cores.client._routes.num_requests == [0, 0]
    broken = cores.links[1].client

    def refuse(messages: Any) -> None:
        raise MessageError("too large")

    broken.send_all = refuse  # type: ignore[method-assign]
    with pytest.raises(InvalidRequest, match="too large"):
        cores.client.submit_all(entries)
    requests = [m for m in cores.receive(0) if isinstance(m, (GenerateRequest, AbortRequest))]
    assert [type(message) for message in requests] == [GenerateRequest, AbortRequest]  # sent, and taken back
    cores.end(0, "a")
    assert heard == [] and cores.client._routes.num_requests == [0, 0]


def test_flushes_of_all_cores_are_one() -> None:
    cores = Cores()
    assert cores.submit("a", long(0)) == 0
    cores.end(0, "a")
    future = cores.client.start_flush()
    for core in range(2):
        [message] = cores.receive(core)
        assert isinstance(message, FlushCache) and not future.done()
        done = FlushCacheDone(message.call_id, core == 0, "" if core == 0 else "one runs")
        cores.links[core].core.send([done])
    assert future.result() == (False, "core 1: one runs")
    assert cores.submit("b", long(500)) == 0
    assert cores.submit("c", long(0)) == 1  # core 0 holds it no more


def test_the_end_of_all() -> None:
    cores = Cores()
    cores.submit("a", long(0))
    cores.client.fail_all(RuntimeError("boom"))
    [end] = cores.outputs["a"]
    assert isinstance(end, EngineStopped) and "boom" in str(end)
    with pytest.raises(EngineStopped):
        cores.submit("b", long(0))
    assert cores.client._routes.num_requests == [0, 0]


def test_figures_of_several_cores() -> None:
    one = CoreStats(num_running=1, num_used_tokens=30, expert_tokens=[1, 2], stage_usage=[0.5, 0.25])
    two = CoreStats(num_running=2, num_used_tokens=10, expert_tokens=[3, 4], stage_usage=[0.5, 0.75])
    both = joined_stats([replace(stats, max_total_tokens=100) for stats in (one, two)])
    assert (both.num_running, both.max_total_tokens, both.token_usage) == (3, 200, 0.2)
    assert (both.expert_tokens, both.stage_usage) == ([4, 6], [0.5, 0.5])
    info = joined_info([CoreInfo(100, 90, 8, 16, 5, 6, "cpu"), CoreInfo(80, 70, 8, 16, 5, 6, "cpu")])
    assert (info.max_total_tokens, info.max_req_len, info.max_running_requests) == (180, 70, 16)
    assert (info.device, info.weight_bytes) == ("2 x cpu", 10)
