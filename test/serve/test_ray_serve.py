"""The Ray Serve application on a cluster of three nodes, which are processes of this machine."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from programs import result_of

from tiny_server import ROOT, free_port, make_checkpoint

pytestmark = pytest.mark.xdist_group("ray")

SCRIPT = '''
import json, random, threading, time, urllib.error, urllib.request
from ray_cluster import nodes_of, three_nodes

PROMPTS = ["the cat sat on the mat", "a dog is not a cat", "hello hello world", "the dog sat", "world of cats"]
URL = f"http://127.0.0.1:{PORT}"
WITHIN_S = 300


def ask(prompt, stream):
    """Return the text, or None for a stream that ended by an error event."""
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": stream}
    request = urllib.request.Request(
        URL + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=WITHIN_S) as response:
        if not stream:
            return json.load(response)["choices"][0]["text"]
        text = ""
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    assert event["error"]["code"] == "replica_lost", event
                    return None
                text += event["choices"][0]["text"]
        assert line.strip() == b"" and text
        return text


class Load:
    """Clients that ask one request after the other, and compare each answer with the first to its prompt."""

    def __init__(self, count):
        self.expected = {prompt: ask(prompt, False) for prompt in PROMPTS}
        self.counts = {"whole": 0, "streamed": 0, "broken": 0}
        self.problems = []
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(seed,)) for seed in range(count)]
        for thread in self.threads:
            thread.start()

    def run(self, seed):
        draw = random.Random(seed)
        while not self.ended.is_set():
            prompt, stream = draw.choice(PROMPTS), draw.random() < 0.5
            try:
                text = ask(prompt, stream)
            except Exception as error:
                detail = error.read() if isinstance(error, urllib.error.HTTPError) else b""
                self.problems.append(f"{type(error).__name__}: {error} {detail[:300]} stream={stream}")
                continue
            if text is None:
                self.counts["broken"] += 1
            elif text == self.expected[prompt]:
                self.counts["streamed" if stream else "whole"] += 1
            else:
                self.problems.append(f"{prompt!r}: {text!r} is not {self.expected[prompt]!r}")

    def stop(self):
        self.ended.set()
        for thread in self.threads:
            thread.join(WITHIN_S)
            if thread.is_alive():
                self.problems.append("a request hangs")


def replicas():
    """Return the nodes of the running replicas."""
    return nodes_of("default:Replica")


def wait_for(condition, what):
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WITHIN_S} s: {what}; replicas on {replicas()}"
        time.sleep(1)


def main():
    import ray
    from ray import serve
    from rtp_llm.serve.ray import build_openai_app
    seen = {}
    with three_nodes() as cluster:
        ray.init(log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
        scaling = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 1, "upscale_delay_s": 2}
        scaling |= {"downscale_delay_s": 5, "metrics_interval_s": 1, "look_back_period_s": 3}
        options = {"autoscaling_config": scaling, "ray_actor_options": {"num_cpus": 1}, "health_check_timeout_s": 120}
        options |= {"graceful_shutdown_timeout_s": 60}
        args = {"model_path": MODEL, "device": "cpu", "max_total_tokens": 4096, "log_level": "warning"}
        ingress = {"ray_actor_options": {"num_cpus": 0, "resources": {"head": 0.1}}}  # on the node that stays
        serve.run(build_openai_app({"server_args": args, "replicas": options, "ingress": ingress}))
        with urllib.request.urlopen(URL + "/health", timeout=60) as response:
            seen["health"] = response.status
        seen["at_first"] = len(replicas())
        load = Load(8)
        try:
            wait_for(lambda: len(set(replicas())) == 3, "three replicas")
            seen["at_most"] = len(replicas())
            cluster.kill(replicas()[0])
            wait_for(lambda: len(replicas()) == 2, "the loss of one")
            before = dict(load.counts)
            time.sleep(10)
            seen["answered_by_two"] = load.counts["whole"] > before["whole"]
            cluster.add()
            wait_for(lambda: len(set(replicas())) == 3, "a replica on a new node")
        finally:
            load.stop()
        wait_for(lambda: len(replicas()) == 1, "one replica without load")
        seen["in_the_end"] = len(replicas())
        seen["answers"] = ask(PROMPTS[0], True) == load.expected[PROMPTS[0]]
        serve.shutdown()
    print("RESULT " + json.dumps({**seen, "counts": load.counts, "problems": load.problems[:10]}))


if __name__ == "__main__":
    main()
'''


@pytest.mark.slow
def test_replicas_scale_and_a_node_may_die(tmp_path: Path):
    if find_spec("ray") is None:
        pytest.skip("needs Ray: pip install 'rtp-llm[ray]'")
    head = f"MODEL = {make_checkpoint(tmp_path / 'model')!r}\nPORT = {free_port()}\n"
    path = f"{ROOT}:{ROOT}/test/helpers"
    result = result_of(head + SCRIPT, tmp_path, PYTHONPATH=path, OMP_NUM_THREADS="1", timeout_s=1500)
    print(result)
    assert result["problems"] == [], result
    assert (result["health"], result["at_first"], result["at_most"], result["in_the_end"]) == (200, 1, 3, 1)
    assert result["answered_by_two"] and result["answers"]
    assert result["counts"]["whole"] > 10 and result["counts"]["streamed"] > 10


def build(**args: Any) -> Any:
    if find_spec("ray") is None:
        pytest.skip("needs Ray: pip install 'rtp-llm[ray]'")
    from rtp_llm.serve.ray import build_openai_app

    return build_openai_app(args)


@pytest.mark.slow  # importing Ray Serve takes seconds, and it warns
@pytest.mark.filterwarnings("ignore")
def test_wrong_arguments_are_told_before_anything_starts():
    with pytest.raises(ValueError, match="no argument 'model'; have ingress, prefix_affinity, replicas, server_args"):
        build(model="x")
    with pytest.raises(ValueError, match="unknown engine argument 'tp'"):
        build(server_args={"tp": 2})
