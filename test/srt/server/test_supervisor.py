"""The death of the core process: streams pause and go on, the request that kills is found out, nothing is orphaned."""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killer_model
import pytest
from made_requests import generate_request

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.engine.supervisor import CoreFailed, Supervisor
from rtp_llm.srt.managers.engine_client import EngineStopped
from rtp_llm.srt.messages import GenerateRequest, TokenOutput
from rtp_llm.srt.models.registry import ModelRegistry
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.utils.ipc import QueueLink
from tiny_models import random_prompts, tiny_model

MODEL = "llama-default"
VOCAB_SIZE = 131


def start(model_path: str, **options: Any) -> Supervisor:
    args = ServerArgs(
        **{"model_path": model_path, "device": "cpu", "dtype": "float32", "context_length": 256}
        | {"max_total_tokens": 4000, "log_level": "warning"}
        | options
    )
    supervisor = Supervisor(args, config_of(args.model_path))
    supervisor.start()
    return supervisor


def config_of(model_path: str) -> ModelConfig:
    return ModelConfig.from_pretrained(model_path, dtype="float32", context_length=256)


@pytest.fixture
def supervise() -> Iterator[Callable[..., Supervisor]]:
    started: list[Supervisor] = []

    def make(model_path: str = tiny_model(MODEL), **options: Any) -> Supervisor:
        started.append(start(model_path, **options))
        return started[-1]

    yield make
    for supervisor in started:
        supervisor.stop()


@pytest.fixture
def killer_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[type], str]:
    """A checkpoint whose architecture is a class that only this process's registry knows."""

    def make(model_class: type) -> str:
        folder = tmp_path / model_class.__name__
        shutil.copytree(tiny_model(MODEL), folder)
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = [model_class.__name__]
        (folder / "config.json").write_text(json.dumps(config))
        monkeypatch.setitem(ModelRegistry.models, model_class.__name__, model_class)
        return str(folder)

    return make


class Stream:
    """What came for one request."""

    def __init__(self, supervisor: Supervisor, request: GenerateRequest) -> None:
        self.outputs: list[TokenOutput] = []
        self.ended = threading.Event()
        self.error: EngineStopped | None = None
        self._news: queue.SimpleQueue = queue.SimpleQueue()
        supervisor.client.submit(request, self._take)

    def _take(self, output: TokenOutput | EngineStopped) -> None:
        if isinstance(output, EngineStopped):
            self.error = output
        else:
            self.outputs.append(output)
        self._news.put(output)
        if self.error or output.finish_reason:
            self.ended.set()

    def wait_for_tokens(self, count: int) -> None:
        while len(self.ids) < count:
            self._news.get(timeout=30)

    @property
    def ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    def answer(self) -> dict[str, Any]:
        assert self.ended.wait(60), "no end came"
        assert self.error is None, self.error
        return {
            "ids": self.ids,
            "finish": self.outputs[-1].finish_reason.to_dict(),
            "cached": self.outputs[-1].cached_tokens,
            "logprob_ids": [entry.token_id for o in self.outputs for entry in o.logprobs],
            "logprobs": [entry.logprob for o in self.outputs for entry in o.logprobs],
            "prompt_logprobs": [entry.logprob for o in self.outputs for entry in o.prompt_logprobs],
        }


def assert_same(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for answer, other in zip(answers, expected, strict=True):
        for key, value in other.items():
            assert answer[key] == (pytest.approx(value, abs=1e-4) if "logprobs" in key else value), key


def requests(count: int = 8, max_new_tokens: int = 120) -> list[GenerateRequest]:
    """Greedy and sampled ones, with penalties, minimum lengths and logprobs."""
    variants: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "frequency_penalty": 0.4, "top_p": 0.95},
        {"temperature": 0.0, "repetition_penalty": 1.3, "min_new_tokens": 100},
        {"temperature": 1.1, "presence_penalty": 0.5, "top_k": 20},
    ]
    result = []
    for i, prompt in enumerate(random_prompts(VOCAB_SIZE, [20 + 3 * i for i in range(count)], seed=7)):
        prompt = [token if token != killer_model.DEADLY_ID else 1 for token in prompt]
        params = SamplingParams(
            max_new_tokens=max_new_tokens, ignore_eos=True, logit_bias={killer_model.DEADLY_ID: -1e4}, **variants[i % 4]
        )
        logprobs = {"return_logprob": True, "logprob_start_len": 3} if i % 2 else {}
        result.append(generate_request(f"r{i}", prompt, params, seed=50 + i, **logprobs))
    return result


def core_pid(supervisor: Supervisor) -> int:
    return supervisor._core.process.pid


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def children_of(pid: int) -> list[int]:
    """What any thread of a process started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.mark.slow
def test_a_killed_core_breaks_no_stream(supervise):
    supervisor = supervise()
    undisturbed = [stream.answer() for stream in [Stream(supervisor, r) for r in requests()]]
    supervisor.client.flush_cache()
    streams = [Stream(supervisor, request) for request in requests()]
    for stream in streams:
        stream.wait_for_tokens(20)
    first = core_pid(supervisor)
    os.kill(first, signal.SIGKILL)
    answers = [stream.answer() for stream in streams]
    assert core_pid(supervisor) != first and not is_alive(first)
    assert_same(answers, undisturbed)


@pytest.mark.usefixtures("warm_processes")
def test_the_request_that_kills_is_found_and_the_others_finish(supervise, killer_checkpoint):
    supervisor = supervise(killer_checkpoint(killer_model.KillerForCausalLM))
    undisturbed = [stream.answer() for stream in [Stream(supervisor, r) for r in requests()]]
    supervisor.client.flush_cache()
    streams = [Stream(supervisor, request) for request in requests()]
    for stream in streams:
        stream.wait_for_tokens(5)
    deadly = Stream(supervisor, generate_request("deadly", [1, 2, killer_model.DEADLY_ID], SamplingParams(), 0))
    answers = [stream.answer() for stream in streams]
    assert deadly.ended.wait(30)
    reason = deadly.outputs[-1].finish_reason
    assert (reason.type, reason.status_code) == ("abort", 500) and "died twice" in reason.message
    assert_same(answers, undisturbed)
    deadline = time.monotonic() + 60
    while not supervisor.is_ready and time.monotonic() < deadline:  # the others may have ended before its second death
        time.sleep(0.05)
    assert supervisor.is_ready


class DyingCore:
    """Stands in for a core process: ready at once, and dead at once."""

    def __init__(self) -> None:
        self.link = QueueLink().client
        self.running: frozenset[str] = frozenset()

    def wait_ready(self, on_progress: Any) -> None:
        pass

    def watch(self) -> None:
        pass

    def describe_end(self) -> str:
        return "the core was killed"

    def close(self, timeout_s: float = 0.0) -> None:
        pass


def test_three_deaths_within_a_minute_are_final(monkeypatch: pytest.MonkeyPatch) -> None:
    spawned: list[DyingCore] = []
    dead: queue.SimpleQueue = queue.SimpleQueue()
    model_path = tiny_model(MODEL)
    supervisor = Supervisor(ServerArgs(model_path=model_path, device="cpu"), config_of(model_path))
    monkeypatch.setattr(supervisor, "_spawn", lambda: spawned.append(DyingCore()) or spawned[-1])
    supervisor.on_dead = dead.put
    supervisor.start()
    error = dead.get(timeout=60)
    assert isinstance(error, CoreFailed)
    assert "died 3 times within 60 s; at last: the core was killed" in str(error)
    assert len(spawned) == 3 and not supervisor.is_ready
    with pytest.raises(EngineStopped, match="at last: the core was killed"):
        Stream(supervisor, requests(1)[0])
    supervisor.stop()


@pytest.mark.slow
def test_three_deaths_end_it_with_the_cores_own_error(supervise, killer_checkpoint):
    supervisor = supervise(killer_checkpoint(killer_model.FailingForCausalLM))
    dead: queue.SimpleQueue = queue.SimpleQueue()
    supervisor.on_dead = dead.put
    deadly = SamplingParams(max_new_tokens=5)
    streams = [
        Stream(supervisor, generate_request(f"d{i}", [1, killer_model.DEADLY_ID, i], deadly, 0)) for i in range(4)
    ]
    error = dead.get(timeout=60)
    assert isinstance(error, CoreFailed) and "died 3 times within 60 s" in str(error)
    assert "RuntimeError: seventy-seven is too much" in str(error)
    for stream in streams:
        assert stream.ended.wait(10)
    assert any(stream.error is not None for stream in streams)
    assert not supervisor.is_ready
    with pytest.raises(EngineStopped, match="seventy-seven"):
        Stream(supervisor, requests(1)[0])


@pytest.mark.usefixtures("warm_processes")
def test_a_core_that_cannot_start_says_why(tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model(MODEL), folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CoreFailed, match=r"model\.safetensors"):
        start(str(folder))


@pytest.mark.slow
def test_a_silent_core_is_replaced(supervise):
    supervisor = supervise(watchdog_timeout=2.0)
    first = core_pid(supervisor)
    os.kill(first, signal.SIGSTOP)
    stream = Stream(supervisor, requests(1, max_new_tokens=5)[0])
    assert len(stream.answer()["ids"]) == 5
    assert not is_alive(first)


@pytest.mark.slow
def test_aborts_and_flushes_while_no_core_is_there(supervise):
    supervisor = supervise()
    streams = [Stream(supervisor, request) for request in requests(3)]
    for stream in streams:
        stream.wait_for_tokens(3)
    os.kill(core_pid(supervisor), signal.SIGKILL)
    while supervisor.is_ready:
        time.sleep(0.001)
    late = Stream(supervisor, generate_request("late", [4, 5], SamplingParams(max_new_tokens=3, ignore_eos=True), 0))
    supervisor.client.abort("r1")
    assert not supervisor.client.flush_cache()
    assert streams[1].ended.wait(5) and streams[1].outputs[-1].finish_reason.type == "abort"
    assert len(late.answer()["ids"]) == 3
    assert len(streams[0].answer()["ids"]) == len(streams[2].answer()["ids"]) == 120


@pytest.mark.slow
def test_stop_leaves_nothing_behind(supervise):
    supervisor = supervise(tp_size=2)
    pid = core_pid(supervisor)
    children = children_of(pid)
    directory = supervisor._core._folder.path
    assert len(children) == 2 and Path(directory).is_dir()
    stream = Stream(supervisor, requests(1)[0])
    stream.wait_for_tokens(3)
    supervisor.stop()
    assert stream.ended.wait(5) and stream.error is not None
    deadline = time.monotonic() + 10
    while any(is_alive(int(child)) for child in [pid, *children]):
        assert time.monotonic() < deadline, "a process was left"
        time.sleep(0.02)
    assert not Path(directory).exists()


@pytest.mark.parametrize("tp_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_core_ends_with_its_parent(tp_size: int) -> None:
    """And its workers do, even if all of them are stopped and notice nothing."""
    code = (
        "import time\n"
        "import test_supervisor as t\n"
        f"s = t.start(t.tiny_model(t.MODEL), tp_size={tp_size})\n"
        "print(t.core_pid(s), flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    core = int(parent.stdout.readline())
    children = children_of(core)
    assert len(children) == (0 if tp_size == 1 else tp_size)
    for pid in [core, *children]:
        assert is_alive(pid)
        os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(map(is_alive, [core, *children])):
        assert time.monotonic() < deadline, "a process outlived its parent"
        time.sleep(0.02)
