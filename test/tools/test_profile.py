"""The profile of a step: parts add up, kernels are seen where they are bound, and nothing is timed afterwards."""

import ctypes
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from rtp_llm.cli import main
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.devices.cpu import build
from rtp_llm.srt.devices.cpu.timing import timed_kernels
from rtp_llm.srt.utils.stopwatch import Part, Stopwatch
from rtp_llm.tools.bench_profile.command import REST, StepTimes, profile_steps
from rtp_llm.tools.bench_profile.options import ProfileArgs, ProfileError
from tiny_models import tiny_model

MODEL = "qwen3-default"


class Clock:
    """Goes on by as much as it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_part_is_timed_without_those_within_it() -> None:
    clock = Clock()
    watch = Stopwatch(clock)

    def inner(seconds: float) -> None:
        clock.now += seconds

    def outer() -> str:
        clock.now += 1
        timed_inner(2)
        timed_inner(3)
        clock.now += 4
        return "result"

    timed_inner = watch.timed(("inner",), inner)
    assert watch.timed(("outer",), outer)() == "result"
    timed_inner(10)
    parts = watch.take()
    assert {name: (part.seconds, part.calls) for name, part in parts.items()} == {
        ("outer",): (5.0, 1),
        ("inner",): (15.0, 3),
    }
    assert watch.take() == {}


def test_nested_names_and_errors() -> None:
    clock = Clock()
    watch = Stopwatch(clock)

    def fail() -> None:
        clock.now += 1
        raise KeyError("x")

    with watch.part(("layer",)):
        with pytest.raises(KeyError):
            watch.timed(("kernel",), fail, nested=True)()
        clock.now += 2
    assert {name: part.seconds for name, part in watch.take().items()} == {("layer", "kernel"): 1.0, ("layer",): 2.0}
    assert watch.name == ()


def test_kernels_bound_within_are_timed_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = ctypes.CDLL(None)
    monkeypatch.setattr(build, "load", lambda name, for_isa=None: libc)
    original = build.load
    watch = Stopwatch()
    with timed_kernels(watch):
        by_attribute, by_item = build.load("gemm").labs, build.load("gemm")["labs"]
    for function in (by_attribute, by_item):
        function.argtypes, function.restype = (ctypes.c_long,), ctypes.c_long
        assert function.argtypes == (ctypes.c_long,) and function.restype is ctypes.c_long
    with watch.part(("linear",)):
        assert by_attribute(-(1 << 40)) == by_item(-(1 << 40)) == 1 << 40
    assert watch.take()["linear", "gemm.labs"].calls == 2
    assert build.load is original and build.load("gemm") is libc


@pytest.fixture(scope="module")
def stages() -> dict[str, StepTimes]:
    server_args = ServerArgs(
        model_path=tiny_model(MODEL), device="cpu", dtype="float32", context_length=300, max_total_tokens=500,
        chunked_prefill_size=16,
    )  # fmt: skip
    start_s = time.perf_counter()
    stages = profile_steps(server_args, ProfileArgs(batch_size=3, input_len=20, output_len=5))
    assert 0 < sum(stage.total_s for stage in stages.values()) < time.perf_counter() - start_s
    return stages


def test_the_parts_of_a_step_are_there_and_add_up(stages: dict[str, StepTimes]) -> None:
    assert stages["prefill"].num_steps == 4  # 60 tokens, 16 at a time
    assert stages["prefill"].num_steps + stages["decode"].num_steps >= 4 + 4
    num_layers = 4
    for stage in stages.values():
        names = {name[0] for name in stage.parts}
        assert {"linear", "norm", "attention", "rotary", "activation", "logits", "embedding", "sampler"} <= names
        assert {"scheduler", "runner", "rest", "messages"} <= names
        for name in [("linear", "qkv_proj"), ("linear", "down_proj"), ("attention",), ("activation",)]:
            assert stage.parts[name].calls % stage.num_steps == 0
            num_layers = stage.parts[name].calls // stage.num_steps
        assert stage.parts["norm", "input_layernorm"].calls == num_layers * stage.num_steps
        rows = stage.rows()
        shown = [row.part.seconds for row in rows if not row.title.startswith("  ")]
        assert sum(shown) == pytest.approx(stage.total_s)
        assert 0 < stage.explained < 1


def test_products_tell_bytes_and_operations(stages: dict[str, StepTimes]) -> None:
    config = AutoConfig.from_pretrained(tiny_model(MODEL))
    decode = stages["decode"]
    down = decode.parts["linear", "down_proj"]
    size = config.hidden_size * config.intermediate_size
    assert down.bytes >= 4 * size * down.calls  # packed weights may be padded
    assert down.operations % (2 * size) == 0 and down.operations >= 2 * size * down.calls
    head = decode.parts["logits",]
    assert head.operations % (2 * config.hidden_size * config.vocab_size) == 0 and head.bytes > 0


def test_kernels_are_shown_below_their_layer_and_counted_once() -> None:
    times = StepTimes()
    times.add(
        {
            REST: Part(1.0, 1),
            ("attention",): Part(2.0, 3),
            ("attention", "plan"): Part(0.5, 1),
            ("attention", "paged.decode"): Part(6.0, 3),
            ("rest", "elementwise.rotary"): Part(0.5, 3),
        },
        num_rows=1,
    )
    rows = [(row.title, row.part.seconds, row.part.calls) for row in times.rows()]
    assert rows == [
        ("attention", 8.0, 3),
        ("  paged.decode", 6.0, 3),
        ("attention plan", 0.5, 1),
        ("elementwise.rotary", 0.5, 3),
        ("rest", 1.0, 1),
    ]
    assert times.explained == pytest.approx(0.9)


def test_what_cannot_be_profiled_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"--batch-size must be at least 1, not 0"):
        ProfileArgs(batch_size=0)
    with pytest.raises(ProfileError, match=r"--pp-size above 1"):
        profile_steps(ServerArgs(model_path=tiny_model(MODEL), tp_size=2), ProfileArgs())
    args = ServerArgs(model_path=tiny_model(MODEL), device="cpu", context_length=64, max_total_tokens=100)
    with pytest.raises(ProfileError, match=r"at most 64 can be served"):
        profile_steps(args, ProfileArgs(input_len=64, output_len=8))


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options: list[Any] = ["--model-path", tiny_model(MODEL), "--device", "cpu", "--max-total-tokens", "300"]
    assert main(["bench", "--input-len", "9", "--profile", "--output-len", "4", *options]) == 0
    out = capsys.readouterr().out
    assert "prefill: batch 1, 9 in, 4 out" in out and "decode: batch 1, 9 in, 4 out; 3 steps" in out
    assert "linear qkv_proj" in out and out.count("explained:") == 2
    assert main(["bench", "--profile", "--input-len", "0", *options]) == 2
    assert "--input-len must be at least 1" in capsys.readouterr().err
