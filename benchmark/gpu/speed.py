"""Part c: prefill and decode of whole models, as shares of what part b measured."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmark.gpu.machine import Machine, Row, Rows, generate, prompts_of, step_seconds
from make_checkpoint import SIZES
from rtp_llm import Engine
from rtp_llm.srt.engine.core import EngineCore

CONTEXT = 1024  # tokens of each prompt


def measure_speed(machine: Machine) -> Rows:
    for shape in machine.pick(("0.6b", "8b"), ("tiny",)):
        for quantization in machine.pick((None, "fp8"), (None,)):
            what = f"{shape}, {quantization or 'bfloat16'}"
            if not machine.has_time(40):
                yield Row(what, "left out: the part's time is over")
                continue
            options = {"quantization": quantization, "max_total_tokens": machine.pick(340_000, 512)}
            with machine.engine(shape, **options) as engine:
                yield from measure_prefill(machine, engine, shape, what)
                yield from measure_decode(machine, engine, shape, what)


def measure_prefill(machine: Machine, engine: Engine, shape: str, what: str) -> Rows:
    length = machine.pick(8192, 24)
    times = [generate(engine, prompts_of(shape, 1, length), 1) for _ in range(machine.pick(4, 2))]
    rate = length / min(times[1:])
    flops = 2 * parameters_of_layers(shape) + 2 * layers_width(shape) * length
    share = f", {rate * flops / machine.flops_per_s:.0%} of the rate of products" if machine.flops_per_s else ""
    yield Row(f"prefill, {what}, {length} tokens", f"{rate:.0f} tokens/s{share}")


def measure_decode(machine: Machine, engine: Engine, shape: str, what: str) -> Rows:
    context = machine.pick(CONTEXT, 8)
    prompts = prompts_of(shape, machine.pick(256, 3), context)
    for batch_size in machine.pick((1, 16, 64, 256), (1, 3)):
        name = f"decode, {what}, {batch_size} x {context}"
        if not machine.has_time(15):
            yield Row(name, "left out: the part's time is over")
            continue
        num_steps = machine.pick(64, 4)
        seconds = step_seconds(engine, prompts[:batch_size], num_steps)
        result = f"{batch_size / seconds:.0f} tokens/s, {seconds * 1e3:.2f} ms a step"
        if machine.bytes_per_s:
            num_bytes = weight_bytes(engine, shape) + batch_size * (context + num_steps // 2) * token_bytes(shape)
            result += f", {num_bytes / machine.bytes_per_s / seconds:.0%} of the bound by memory"
        busy, host_s = watched_run(machine, engine, prompts[:batch_size], num_steps)
        yield Row(name, f"{result}; device busy {busy}, host {host_s * 1e3:.2f} ms a step")


def watched_run(machine: Machine, engine: Engine, prompts: list[list[int]], num_steps: int) -> tuple[str, float]:
    """Return the share of time in which the device computes, while decoding, and the host's own time of a step."""
    with waiting_time() as waited:
        took_s = generate(engine, prompts, num_steps)
    activity = machine.provider.activities.get("GPU", ProfilerActivity.CPU)
    with profile(activities=[activity]) as recorded:
        generate(engine, prompts, num_steps)
    spans = [(event.time_range.start, event.time_range.end) for event in recorded.events() if _is_work(event, activity)]
    return f"{busy_share(spans):.0%}", max(0.0, took_s - waited[0]) / num_steps


def _is_work(event: Any, activity: ProfilerActivity) -> bool:
    return activity == ProfilerActivity.CPU or event.device_type == torch.autograd.DeviceType.CUDA


def busy_share(spans: Sequence[tuple[float, float]]) -> float:
    """Return how much of the time from the middle of the first to the last is covered, of spans that may overlap.

    The first fifth, which computes the prompts' last tokens, is left out.
    """
    if not spans:
        return 0.0
    begin, end = min(start for start, _ in spans), max(stop for _, stop in spans)
    begin += (end - begin) / 5
    covered, through = 0.0, begin
    for start, stop in sorted(spans):
        if stop > through:
            covered += stop - max(start, through)
            through = stop
    return covered / (end - begin) if end > begin else 0.0


@contextmanager
def waiting_time() -> Iterator[list[float]]:
    """Give a list of one number: the seconds for which the host has waited for events of the device."""
    total, wait = [0.0], torch.cuda.Event.synchronize

    def timed(event: torch.cuda.Event) -> None:
        start = time.perf_counter()
        wait(event)
        total[0] += time.perf_counter() - start

    torch.cuda.Event.synchronize = timed  # type: ignore[method-assign]
    try:
        yield total
    finally:
        torch.cuda.Event.synchronize = wait  # type: ignore[method-assign]


def weight_bytes(engine: Engine, shape: str) -> int:
    """Bytes of weights that a decode step reads: of an embedding that is not the head as well, only a few rows."""
    config = SIZES[shape]
    unread = 0 if config.tie_word_embeddings else 2 * config.vocab_size * config.hidden_size
    return core_of(engine).info.weight_bytes - unread


def core_of(engine: Engine) -> EngineCore:
    """Return the core of an engine that this thread steps."""
    return engine._runner.core  # type: ignore[union-attr]


def token_bytes(shape: str) -> int:
    """Bytes of a token's keys and values in 16 bits."""
    config = SIZES[shape]
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def layers_width(shape: str) -> int:
    """Products of a query and a key, and of a weight and a value, per key that is seen; half of a prompt's are."""
    config = SIZES[shape]
    return config.num_hidden_layers * config.num_attention_heads * config.head_dim


def parameters_of_layers(shape: str) -> int:
    """Weights that each token of a prompt is multiplied with."""
    config = SIZES[shape]
    of_heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return config.num_hidden_layers * config.hidden_size * (of_heads + 3 * config.intermediate_size)
