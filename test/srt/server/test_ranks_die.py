"""Cores of several ranks, and several cores: whichever process dies, no stream breaks."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from made_requests import generate_request

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.engine.replicas import Replicas, make_supervisor
from rtp_llm.srt.engine.supervisor import Supervisor
from rtp_llm.srt.managers.engine_client import EngineStopped
from rtp_llm.srt.messages import GenerateRequest, TokenOutput
from rtp_llm.srt.sampling_params import SamplingParams
from tiny_models import make_tiny, random_prompts, tiny_model
from tiny_server import own_process, wait_for

pytestmark = pytest.mark.usefixtures("warm_processes")
VOCAB_SIZE = 90  # ids of prompts lie below it
NEW_TOKENS = 60
Served = Supervisor | Replicas


class Answer:
    """What came for one request."""

    def __init__(self, served: Served, request: GenerateRequest) -> None:
        self.ids: list[int] = []
        self.ended, self.begun = threading.Event(), threading.Event()
        self.error: Any = None
        served.client.submit(request, self._take)

    def _take(self, output: TokenOutput | EngineStopped) -> None:
        if isinstance(output, EngineStopped):
            self.error = output
        else:
            self.ids += output.token_ids
            reason = output.finish_reason
            self.error = reason if reason is not None and reason.type != "length" else None
        if len(self.ids) > 5:
            self.begun.set()
        if isinstance(output, EngineStopped) or output.finish_reason is not None:
            self.ended.set()

    def result(self) -> list[int]:
        assert self.ended.wait(60), "no end came"
        assert self.error is None, self.error
        return self.ids


def requests(count: int) -> list[GenerateRequest]:
    """Greedy and drawn, of several lengths: more than one step's worth of prompts."""
    prompts = random_prompts(VOCAB_SIZE, [10 + 13 * i for i in range(count)], seed=3)
    params = [SamplingParams(temperature=i % 2, max_new_tokens=NEW_TOKENS, ignore_eos=True) for i in range(count)]
    return [generate_request(f"r{i}", prompts[i], params[i], seed=i) for i in range(count)]


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(**options: Any) -> Served:
        model_path = options.pop("model_path", tiny_model("llama-tp"))
        args = ServerArgs(
            **{"model_path": model_path, "device": "cpu", "dtype": "float32", "context_length": 256}
            | {"max_total_tokens": 3000, "log_level": "error", "chunked_prefill_size": 32}
            | options
        )
        config = ModelConfig.from_pretrained(model_path, dtype="float32", context_length=256)
        started.append(make_supervisor(args, config))
        started[-1].start()
        return started[-1]

    yield start
    for served in started:
        served.stop()


def expected(serve: Callable[..., Served], **options: Any) -> list[list[int]]:
    served = serve(**options)
    answers = [Answer(served, request) for request in requests(6)]
    return [answer.result() for answer in answers]


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sorted(int(child) for task in tasks for child in (task / "children").read_text().split())


def kill_while_answering(served: Served, pid: int, count: int = 6) -> list[list[int]]:
    answers = [Answer(served, request) for request in requests(count)]
    for answer in answers:
        assert answer.begun.wait(60)
    os.kill(pid, signal.SIGKILL)
    return [answer.result() for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tp_size": 2, "pp_size": 2}, {"tp_size": 4}, {"pp_size": 2}], ids=str)
def test_a_core_of_several_ranks_outlives_each_of_them(serve: Callable[..., Served], options: dict) -> None:
    whole = expected(serve)
    served = serve(**options)
    assert isinstance(served, Supervisor)
    count = options.get("tp_size", 1) * options.get("pp_size", 1)
    for rank in (0, count - 1):  # of two deaths within a minute, not three
        before = served._core
        assert before is not None
        ranks = children_of(before.process.pid)
        assert len(ranks) == count
        assert kill_while_answering(served, ranks[rank]) == whole
        assert served._core is not before


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "backend"), [(0, "all_to_all"), (1, "all_to_all"), (1, "none")])
def test_ranks_with_requests_of_their_own_die(
    serve: Callable[..., Served], tmp_path: Path, rank: int, backend: str
) -> None:
    model_path = make_tiny("DeepseekV3ForCausalLM", tmp_path)
    whole = expected(serve, model_path=model_path)
    served = serve(model_path=model_path, tp_size=2, enable_dp_attention=True, moe_a2a_backend=backend)
    assert isinstance(served, Supervisor) and served._core is not None
    assert kill_while_answering(served, children_of(served._core.process.pid)[rank]) == whole


@pytest.mark.slow
def test_a_replica_in_stages_outlives_a_rank(serve: Callable[..., Served]) -> None:
    """Each of two cores has two ranks; while one restarts, the other goes on."""
    whole = expected(serve)
    served = serve(dp_size=2, pp_size=2)
    assert isinstance(served, Replicas)
    cores = [supervisor._core for supervisor in served.supervisors]
    for core, rank in zip(cores, (0, 1), strict=True):  # one after the other
        assert core is not None
        assert kill_while_answering(served, children_of(core.process.pid)[rank], count=8)[:6] == whole
    assert all(s._core is not core for s, core in zip(served.supervisors, cores, strict=True))


@pytest.mark.slow
def test_replicas_share_requests_and_outlive_each_other(serve: Callable[..., Served]) -> None:
    whole = expected(serve)
    served = serve(dp_size=2)
    assert isinstance(served, Replicas)
    room = served.info.max_total_tokens
    assert room == 6000 and served.info.max_running_requests == 512
    cores = [supervisor._core for supervisor in served.supervisors]
    assert kill_while_answering(served, cores[0].process.pid) == whole
    stats = served.stats
    assert served.supervisors[1]._core is cores[1] and served.supervisors[0]._core is not cores[0]
    assert served.is_ready and stats.max_total_tokens <= room
    first = [Answer(served, request) for request in requests(6)]
    assert [answer.result() for answer in first] == whole
    served.client.flush_cache()


@pytest.mark.slow
def test_a_prefix_goes_to_one_core(serve: Callable[..., Served]) -> None:
    """Requests with one prefix go to one core, others to the other; both answer as one core does."""
    served = serve(dp_size=2)
    assert isinstance(served, Replicas)
    prompts = random_prompts(VOCAB_SIZE, [70, 70])
    params = SamplingParams(temperature=0, max_new_tokens=4)
    cached = []
    for turn in range(2):
        for place, prompt in enumerate(prompts):
            outputs: list[Any] = []
            ended = threading.Event()

            def take(output: Any, outputs: list[Any] = outputs, ended: threading.Event = ended) -> None:
                outputs.append(output)
                if output.finish_reason is not None:
                    ended.set()

            served.client.submit(generate_request(f"{turn}-{place}", [*prompt, turn], params), take)
            if turn or place:
                assert ended.wait(60)
            cached.append((ended, outputs))
    assert all(ended.wait(60) for ended, _ in cached)
    assert [outputs[0].cached_tokens for _, outputs in cached] == [0, 0, 70, 70]
    deadline = time.monotonic() + 30
    while [s.stats.prompt_tokens for s in served.supervisors] != [142, 142] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [s.stats.prompt_tokens for s in served.supervisors] == [142, 142]


@pytest.mark.slow
def test_a_server_of_replicas(tmp_path: Path) -> None:
    """It answers by one core while the other is started again, and sums up both."""
    flags = ["--dp-size", "2", "--skip-tokenizer-init", "--dtype", "float32"]
    prompts = random_prompts(VOCAB_SIZE, [20, 33, 50])

    def ask(url: str) -> list[list[int]]:
        params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        body = {"input_ids": prompts, "sampling_params": params}
        return [each["output_ids"] for each in httpx.post(f"{url}/generate", json=body, timeout=60).json()]

    with own_process(tmp_path, tiny_model("llama-tp"), *flags) as server:
        server.wait_ready()
        first = ask(server.url)
        assert all(len(ids) == 8 for ids in first)
        assert httpx.get(f"{server.url}/server_info").json()["max_total_tokens"] == 2 * 4096
        cores = server.children()
        assert len(cores) == 2
        os.kill(cores[0], signal.SIGKILL)
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert ask(server.url) == first
        wait_for(lambda: len([pid for pid in server.children() if pid not in cores]) == 1)
        assert ask(server.url) == first
