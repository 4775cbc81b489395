"""What routers, autoscalers and dashboards ask a server for: loads, sources of events, vLLM's metrics."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import prometheus_client.parser
import pytest

from rtp_llm.srt.engine.replicas import Replicas
from rtp_llm.srt.entrypoints.loads import SECTIONS, LoadEndpoints
from rtp_llm.srt.managers.vllm_metrics import NAMES
from rtp_llm.srt.messages import CoreInfo, CoreStats
from tiny_server import InProcess, in_process, wait_for

pytestmark = pytest.mark.xdist_group("server-in-process")


def loads(server: InProcess, **query: Any) -> dict[str, Any]:
    return httpx.get(f"{server.url}/v1/loads", params=query).json()


def test_an_idle_server(server: InProcess) -> None:
    wait_for(lambda: server.core.client.num_live == 0)
    answer = loads(server)
    assert answer["dp_rank_count"] == len(answer["loads"]) == 1 and answer["timestamp"] and answer["version"]
    load = answer["loads"][0]
    names = "dp_rank num_running_reqs num_waiting_reqs num_total_reqs num_used_tokens num_total_tokens "
    names += "max_total_num_tokens token_usage gen_throughput cache_hit_rate utilization max_running_requests"
    assert sorted(load) == sorted(names.split())
    assert [load[name] for name in ("num_total_reqs", "num_total_tokens", "utilization")] == [0, 0, 0]
    assert load["max_total_num_tokens"] == 4096
    assert httpx.get(f"{server.url}/load").json() == {"server_load": 0}
    idle = [{"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}]
    assert httpx.get(f"{server.url}/get_load").json() == idle
    assert httpx.get(f"{server.url}/kv_event_sources").json() == {}


def fake_core(num_live: int, num_waiting: int) -> SimpleNamespace:
    stats = CoreStats(num_waiting=num_waiting, num_used_tokens=40, token_usage=0.5, gen_throughput=8.0)
    client = SimpleNamespace(num_live=num_live, num_live_tokens=10 * num_live)
    return SimpleNamespace(client=client, info=CoreInfo(80, 40, 4, 2048, 0, 0, "cpu"), stats=stats)


def answer_of(endpoint: Any) -> Any:
    return json.loads(asyncio.run(endpoint()).body)


def test_a_busy_core() -> None:
    endpoints = LoadEndpoints(SimpleNamespace(core=fake_core(num_live=6, num_waiting=2)))  # type: ignore[arg-type]
    told = answer_of(endpoints.loads)
    [load] = told["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"], load["num_total_reqs"]) == (4, 2, 6)
    assert (load["num_total_tokens"], load["utilization"], load["gen_throughput"]) == (60, 1.0, 8.0)
    assert told["aggregate"]["total_reqs"] == 6 and told["aggregate"]["avg_token_usage"] == 0.5
    assert answer_of(endpoints.server_load) == {"server_load": 6}
    busy = [{"dp_rank": 0, "num_reqs": 6, "num_waiting_reqs": 2, "num_tokens": 60}]
    assert answer_of(endpoints.get_load) == busy


def test_what_the_core_has_not_told_of_yet_counts_at_once() -> None:
    endpoints = LoadEndpoints(SimpleNamespace(core=fake_core(num_live=5, num_waiting=0)))  # type: ignore[arg-type]
    [load] = answer_of(endpoints.loads)["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (4, 1), "no more run than can"


def test_several_cores_tell_of_themselves() -> None:
    replicas = Replicas.__new__(Replicas)
    replicas.supervisors = [fake_core(1, 0), fake_core(3, 1)]  # type: ignore[list-item]
    endpoints = LoadEndpoints(SimpleNamespace(core=replicas))  # type: ignore[arg-type]
    told = answer_of(endpoints.loads)
    assert [(load["dp_rank"], load["num_total_reqs"]) for load in told["loads"]] == [(0, 1), (1, 3)]
    assert told["dp_rank_count"] == 2 and told["aggregate"]["total_reqs"] == 4
    assert told["aggregate"]["avg_throughput"] == 8.0
    [second] = json.loads(asyncio.run(endpoints.loads(dp_rank=1)).body)["loads"]
    assert second["dp_rank"] == 1


def test_sections_are_those_that_are_asked_for(server: InProcess) -> None:
    # What smg asks for, every second.
    [load] = loads(server, include="core,disagg,queues,memory")["loads"]
    assert load["queues"] == {"waiting": 0, "grammar": 0, "paused": 0, "retracted": 0}
    assert load["memory"]["token_capacity"] == 4096 and load["memory"]["kv_cache_gb"] > 0
    assert set(loads(server, include="all")["loads"][0]) == {*loads(server)["loads"][0], "queues", "memory"}
    for name in SECTIONS:
        assert "loads" in loads(server, include=name, dp_rank=0)
    assert "no section 'lod'" in loads(server, include="core,lod")["error"]["message"]
    assert "dp_rank must be from 0 to 0, got 1" in loads(server, dp_rank=1)["error"]["message"]


def families(server: InProcess) -> dict[str, Any]:
    text = httpx.get(f"{server.url}/metrics").text
    return {family.name: family for family in prometheus_client.parser.text_string_to_metric_families(text)}


def test_without_the_flag_there_are_no_names_of_vllm(server: InProcess) -> None:
    assert not [name for name in families(server) if name.startswith("vllm:")]


def test_names_of_vllm_and_sources_of_events(tiny_checkpoint: str, tmp_path: Path) -> None:
    config = {"publisher": "zmq", "endpoint": f"ipc://{tmp_path}/events", "topic": "kv"}
    options = {"vllm_metrics": True, "page_size": 4, "kv_events_config": json.dumps(config)}
    with in_process(tiny_checkpoint, **options) as server:
        body = {"prompt": "the cat sat on the mat", "max_tokens": 5, "ignore_eos": True, "temperature": 0}
        for _ in range(2):
            usage = httpx.post(f"{server.url}/v1/completions", json=body).json()["usage"]
        found = families(server)
        for own, names in NAMES.items():
            for name in names:
                ours, theirs = found[f"rtp_llm:{own}"], found[f"vllm:{name}"]
                assert (theirs.type, len(theirs.samples)) == (ours.type, len(ours.samples))
                assert all(s.labels["engine"] == "0" and s.labels["model_name"] == "tiny" for s in theirs.samples)
        assert found["vllm:prompt_tokens"].samples[0].value == 2 * usage["prompt_tokens"]
        assert found["vllm:prefix_cache_hits"].samples[0].value == usage["prompt_tokens_details"]["cached_tokens"] > 0
        ends = {
            s.labels["finished_reason"]: s.value for s in found["vllm:request_success"].samples if "_total" in s.name
        }
        assert ends == {"length": 2}
        assert found["vllm:cache_config_info"].samples[0].labels["block_size"] == "4"
        sources = httpx.get(f"{server.url}/kv_event_sources").json()
        assert sources["0"]["endpoint"] == config["endpoint"] and sources["0"]["topic"] == "kv"
        assert (sources["0"]["publisher"], sources["0"]["enable_kv_cache_events"]) == ("zmq", True)
