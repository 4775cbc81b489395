"""Kernels that keep a state: ``python benchmark/cpu_recurrent.py [--threads N] [--only WORD]``.

Each kernel at three kinds of a step: 64 rows of a token each, one row, one prompt of 512 tokens. Beside it what plain
torch takes, and for single tokens how near the kernel comes to the memory: the time to copy its states (which are read
and written once) over its own. Calls take turns with the states of several layers, together more than caches hold. Of
several turns the best counts, since other work on the machine only ever adds.

``RTP_LLM_CPU_ISA=avx2`` (or ``portable``) measures what a processor without AVX-512 has.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from rtp_llm.srt.devices.cpu import recurrent
from rtp_llm.srt.devices.cpu.build import isa
from rtp_llm.srt.forward_batch import StateWave
from rtp_llm.srt.kernels import recurrent as plain

STATE_BYTES = 192 << 20  # of all layers together
TURNS = 3
TURN_S = 0.15  # a turn is as many calls as fit
STEPS = {"64 rows": [1] * 64, "1 row": [1], "512 tokens": [512]}


class Kernel(NamedTuple):
    name: str
    state: tuple[int, ...]  # of a sequence in a layer
    dtype: torch.dtype  # of the state
    ours: Callable[..., torch.Tensor]  # called with states and rows
    plain: Callable[..., torch.Tensor]


def kernels(tokens: int) -> Iterator[Kernel]:
    """Sizes of Qwen3.5-0.8B, of Mamba 2's 2.7B and of Mamba's 2.8B."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(tokens, *shape).bfloat16()

    q, k, v, g, beta = random(16, 128), random(16, 128), random(16, 128), -torch.rand(tokens, 16), random(16).sigmoid()
    gates = -torch.rand(tokens, 16, 128)
    wide, taps = random(6144), torch.randn(4, 6144).bfloat16()
    x, dt, b, c = random(80, 64), random(80), random(1, 128), random(1, 128)
    numbers = -torch.rand(80), torch.rand(80), torch.rand(80)
    x1, dt1, b1, c1 = random(5120), random(5120), random(16), random(16)
    numbers1 = -torch.rand(16, 5120), torch.rand(5120), torch.rand(5120)
    f32, bf16 = torch.float32, torch.bfloat16
    for name, module_call in {
        "gated delta rule": (
            (16, 128, 128),
            f32,
            lambda of: lambda states, rows: of.gated_delta_rule(q, k, v, g, beta, states, rows),
        ),
        "gates of channels": (
            (16, 128, 128),
            f32,
            lambda of: lambda states, rows: of.gated_delta_rule(q, k, v, gates, beta, states, rows),
        ),
        "ssd": (
            (80, 128, 64),
            f32,
            lambda of: lambda states, rows: of.ssd(x, dt, numbers[0], b, c, *numbers[1:], states, rows),
        ),
        "selective scan": (
            (16, 5120),
            f32,
            lambda of: (
                lambda states, rows: of.selective_scan(x1, dt1, numbers1[0], b1, c1, *numbers1[1:], states, rows)
            ),
        ),
        "convolution": (
            (3, 6144),
            bf16,
            lambda of: lambda states, rows: of.causal_conv1d(wide, taps, None, states, rows, "silu"),
        ),
    }.items():
        state, dtype, call = module_call
        yield Kernel(name, state, dtype, call(recurrent), call(plain))


def seconds(calls: Iterator[Callable[[], object]]) -> float:
    """Per call, of the best turn."""
    best = float("inf")
    for _ in range(TURNS):
        started, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - started < TURN_S:
            next(calls)()
            count += 1
        best = min(best, (time.perf_counter() - started) / count)
    return best


def measure(kernel: Kernel, lengths: list[int]) -> tuple[float, float, float]:
    """Return the seconds of the kernel, of plain torch, and of a copy of the states from one place to another."""
    count = len(lengths)
    slots = torch.arange(1, count + 1)
    bounds = [0, *itertools.accumulate(lengths)]
    rows = StateWave(slots, slots, torch.tensor(bounds), bounds)
    size = (count + 1) * torch.Size(kernel.state).numel() * kernel.dtype.itemsize
    layers = [torch.zeros(count + 1, *kernel.state, dtype=kernel.dtype) for _ in range(max(2, STATE_BYTES // size))]

    def calls(of: Callable[..., object]) -> Iterator[Callable[[], object]]:
        return itertools.cycle([lambda states=states: of(states, rows) for states in layers])

    pairs = list(zip(layers, layers[1:] + layers[:1], strict=True))
    copies = itertools.cycle([lambda a=a, b=b: a[1:].copy_(b[1:]) for a, b in pairs])
    return seconds(calls(kernel.ours)), seconds(calls(kernel.plain)), seconds(copies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--only", default="", help="kernels that have this in their name")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{isa()}, {torch.get_num_threads()} threads\n")
    print("| kernel | step | µs | plain torch, µs | ratio | of the memory's speed |\n|---|---|---|---|---|---|")
    with torch.inference_mode():
        for step, lengths in STEPS.items():
            for kernel in kernels(sum(lengths)):
                if args.only in kernel.name:
                    ours, theirs, copy = measure(kernel, lengths)
                    share = f"{copy / ours:.0%}" if lengths[0] == 1 else ""
                    times = f"{ours * 1e6:,.0f} | {theirs * 1e6:,.0f} | {theirs / ours:.1f}"
                    print(f"| {kernel.name} | {step} | {times} | {share} |", flush=True)


if __name__ == "__main__":
    main()
