"""A server under hostile requests: it answers all of them, stays well, and forgets them."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmark.health_watch import HealthWatch, Look
from benchmark.soak_server import is_core, resident_bytes
from fuzzer import Fuzzer, fuzzing
from hostile_requests import Case
from rtp_llm.srt.configs.server_args import DEMO_MODEL
from tiny_models import make_tiny
from tiny_server import Process, free_port, make_checkpoint, python_process

pytestmark = pytest.mark.xdist_group("hostile")

NUM_QUICK = 300
NUM_SLOW = 10_000
NUM_POOLED = 3_000
NUM_WARM_UP = 500
MAX_GROWTH_BYTES = 50 << 20
MAX_SILENCE_S = 1.0
WATCH_S = 0.1
FLAGS = (
    "--device", "cpu", "--max-total-tokens", "8192", "--max-running-requests", "32", "--context-length", "256",
    "--served-model-name", "rtp-llm-demo", "--mm-embedding-cache-size-mb", "4",
)  # fmt: skip
# Of the embedded model's template, with a place for what chat_template_kwargs bring.
TEMPLATE_EXTRAS = (
    "{{ suffix|default('') }}{% for i in range(rounds|default(0)) %}.{% endfor %}{{ names|default([])|join }}"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """The embedded model, with a chat template that uses variables, in a process of its own."""
    folder, port = tmp_path_factory.mktemp("hostile"), free_port()
    template = folder / "template.jinja"
    template.write_text((Path(DEMO_MODEL) / "chat_template.jinja").read_text() + TEMPLATE_EXTRAS)
    command = ["-m", "rtp_llm.launch_server", "--port", str(port), "--chat-template", str(template), *FLAGS]
    with python_process(folder, command, port, anew=True) as running:  # its processes are told by their command lines
        running.wait_ready()
        yield running


@pytest.fixture
def fuzzer(server: Process, request: pytest.FixtureRequest) -> Iterator[Fuzzer]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with fuzzing((host, int(port)), request.param, server.log) as made:
        yield made


def memory_bytes(server: Process) -> dict[str, int]:
    """Resident bytes of the HTTP process and of the core."""
    return {"HTTP process": resident_bytes(server.process.pid), "core": resident_bytes(core_of(server))}


def core_of(server: Process) -> int:
    [core] = filter(is_core, server.children())
    return core


def attack(fuzzer: Fuzzer, numbers: range) -> None:
    fuzzer.run(numbers)
    fuzzer.retry_given_up()
    assert not fuzzer.report.failures, fuzzer.told()


@pytest.mark.parametrize("fuzzer", [0], indirect=True)
def test_some_hostile_requests(server: Process, fuzzer: Fuzzer) -> None:
    attack(fuzzer, range(NUM_QUICK))
    problems = fuzzer.check_after()
    assert not problems, "\n".join([*problems, fuzzer.told()])
    assert fuzzer.report.num_right > NUM_QUICK / 20
    assert server.process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("fuzzer", [1], indirect=True)
def test_ten_thousand_hostile_requests(server: Process, fuzzer: Fuzzer, tmp_path: Path) -> None:
    core = core_of(server)
    attack(fuzzer, range(NUM_WARM_UP))
    assert fuzzer.wait_idle(60) is None
    before = memory_bytes(server)
    with HealthWatch(tmp_path / "health", fuzzer.address, WATCH_S) as watch:
        attack(fuzzer, range(NUM_WARM_UP, NUM_SLOW))
    problems = fuzzer.check_after()
    problems += silences(watch.looks(), fuzzer)
    problems += [] if core_of(server) == core else ["the core died"]
    problems += settled_growth(before, server)
    assert not problems, "\n".join([*problems, fuzzer.told()])


@pytest.mark.slow
@pytest.mark.parametrize("fuzzer", [2], indirect=True)
def test_heavy_requests(server: Process, fuzzer: Fuzzer, tmp_path: Path) -> None:
    with HealthWatch(tmp_path / "health", fuzzer.address, WATCH_S) as watch:
        fuzzer.run_heavy()
    problems = fuzzer.check_after() + silences(watch.looks(), fuzzer)
    assert not fuzzer.report.failures and not problems, "\n".join([*problems, fuzzer.told(30)])


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A tiny BERT."""
    folder, port = tmp_path_factory.mktemp("hostile-bert"), free_port()
    tokenizer = AutoTokenizer.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("with-tokenizer")))
    make_tiny("BertModel", folder, vocab_size=len(tokenizer), max_position_embeddings=64)
    tokenizer.save_pretrained(folder)
    options = ("--device", "cpu", "--dtype", "float32", "--served-model-name", "rtp-llm-demo")
    command = ["-m", "rtp_llm.launch_server", "--port", str(port), "--model-path", str(folder), *options]
    with python_process(folder, command, port, anew=True) as running:
        running.wait_ready()
        yield running


@pytest.mark.slow
def test_hostile_requests_for_vectors(embedder: Process) -> None:
    host, _, port = embedder.url.removeprefix("http://").partition(":")
    with fuzzing((host, int(port)), 3, embedder.log, pools=True) as fuzzer:
        attack(fuzzer, range(NUM_POOLED))
        problems = fuzzer.check_after()
        assert not problems, "\n".join([*problems, fuzzer.told()])
        assert fuzzer.report.num_right > NUM_POOLED / 20
        assert embedder.process.poll() is None


def silences(looks: list[Look], fuzzer: Fuzzer) -> list[str]:
    """When /health was not answered for a second; longer where the machine let the watcher itself wait, who does
    nothing but sleep."""
    assert len(looks) > 50
    found = [f"/health was answered {look.status}" for look in looks if look.status != 200]
    for i, look in enumerate(looks):
        late_s = max(near.late_s for near in looks[max(0, i - 5) : i + 6])
        limit_s = MAX_SILENCE_S + 20 * late_s
        if look.took_s > limit_s:
            numbers = fuzzer.report.in_flight(look.at_s - look.took_s, look.at_s)
            shown = [named(fuzzer.generator.case(number)) for number in numbers]
            found.append(
                "\n".join(
                    [f"/health was silent for {look.took_s:.2f} s of {limit_s:.2f} s, and under way were", *shown]
                )
            )
    return found


def named(case: Case) -> str:
    return f"  request {case.number}, {case.kind}: {len(case.plan.sent)} bytes, {case.plan.sent[:300]!r}"


def settled_growth(before: dict[str, int], server: Process) -> list[str]:
    """How the processes have grown, once they have given back what they do not use."""
    deadline = time.monotonic() + 30
    while (grown := growth(before, memory_bytes(server))) and time.monotonic() < deadline:
        time.sleep(0.5)
    return grown


def growth(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return [
        f"the {name} has grown from {size / 2**20:.0f} to {after[name] / 2**20:.0f} MiB"
        for name, size in before.items()
        if after[name] - size > MAX_GROWTH_BYTES
    ]
