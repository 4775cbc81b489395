"""Ranks as Ray actors on a cluster of three nodes, which are processes of this machine."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from programs import result_of

from rtp_llm.srt.configs import server_args
from rtp_llm.srt.configs.server_args import ServerArgs, ServerArgsError
from tiny_server import ROOT, free_port, make_checkpoint

pytestmark = pytest.mark.xdist_group("ray")

SAME_IDS = """
import json, sys
from ray_cluster import nodes_of, three_nodes
PROMPTS = [[5, 6, 7, 8], list(range(20, 60)), [9] * 17]
PARAMS = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}

def ids(**options):
    from rtp_llm import Engine
    with Engine(model_path=MODEL, device="cpu", max_total_tokens=1024, log_level="error", **options) as engine:
        places = sorted(set(nodes_of("RankActor"))) if options else []
        return [a["output_ids"] for a in engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)], places

if __name__ == "__main__":
    alone, _ = ids()
    with three_nodes() as cluster:
        together, places = ids(tp_size=2, distributed_executor_backend="ray")
        one, _ = ids(distributed_executor_backend="ray")
    print("RESULT " + json.dumps({"alone": alone, "together": together, "one": one, "places": places}))
"""

NODE_DIES = """
import json, os, re, subprocess, sys, threading, time, urllib.request
from ray_cluster import nodes_of, three_nodes
BODY = {"prompt": "the cat sat", "max_tokens": 300, "temperature": 0, "ignore_eos": True}

def ask(url, **more):
    data = json.dumps({**BODY, **more}).encode()
    request = urllib.request.Request(url + "/v1/completions", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=600)

def ready(url, process):
    while True:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url + "/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)

if __name__ == "__main__":
    with three_nodes() as cluster:
        url = f"http://127.0.0.1:{PORT}"
        command = [sys.executable, "-m", "rtp_llm", "serve", "--model-path", MODEL, "--port", str(PORT), "--device"]
        command += ["cpu", "--tp-size", "2", "--distributed-executor-backend", "ray", "--max-total-tokens", "4096"]
        server = subprocess.Popen(command)
        try:
            ready(url, server)
            with ask(url) as response:
                expected = json.load(response)["choices"][0]["text"]
            text, killed = "", None
            with ask(url, stream=True) as response:
                for line in response:
                    if not line.startswith(b"data: {"):
                        continue
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if killed is None and len(text) > 20:
                        killed = nodes_of("RankActor")[0]
                        cluster.kill(killed)
            ready(url, server)
            with urllib.request.urlopen(url + "/health_generate", timeout=600) as response:
                health = response.status
        finally:
            server.terminate()
            server.wait(120)
    print("RESULT " + json.dumps({"same": text == expected, "killed": killed, "health": health}))
"""


def test_ray_must_be_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_args, "find_spec", lambda name: None)
    with pytest.raises(ServerArgsError, match=r"pip install 'rtp-llm\[ray\]'"):
        ServerArgs(distributed_executor_backend="ray")


def run(script: str, folder: Path, **values: object) -> dict:
    if find_spec("ray") is None:
        pytest.skip("needs Ray: pip install 'rtp-llm[ray]'")
    model = make_checkpoint(folder / "model")
    head = "".join(f"{name} = {value!r}\n" for name, value in {"MODEL": model, **values}.items())
    path = f"{ROOT}:{ROOT}/test/helpers"
    return result_of(head + script, folder, PYTHONPATH=path, OMP_NUM_THREADS="1", timeout_s=900)


@pytest.mark.slow
def test_ranks_on_two_nodes_answer_as_one_rank(tmp_path: Path):
    result = run(SAME_IDS, tmp_path)
    assert result["together"] == result["alone"] == result["one"]
    assert len(result["places"]) == 2


@pytest.mark.slow
def test_a_stream_outlives_the_node_of_a_rank(tmp_path: Path):
    result = run(NODE_DIES, tmp_path, PORT=free_port())
    assert result["killed"] and result["same"] and result["health"] == 200
