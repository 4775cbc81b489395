"""Measure where one way of computing a product becomes faster than another, and write the table of gemm_choice.h.

``cpu_kernels.py --tune`` calls it. Both ways are compiled, each into a process of its own, and measured in turn with
more and more rows of x; the best time of each counts. The number of rows that is written is the one with which all
numbers measured take least time together. A process is this file with ``CXX`` naming the way (see ``most_rows``).
"""

import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from typing import IO

import torch

from rtp_llm.srt.devices.cpu.build import SOURCES, compiler, isa
from rtp_llm.srt.devices.cpu.codes import CodePanels, Codes, fp8_panels
from rtp_llm.srt.devices.cpu.linear import BFloat16Panels, Int8Panels, PanelWeight
from rtp_llm.srt.layers.quantization.fp8 import quantize_fp8

TABLE = SOURCES / "gemm_choice.h"
CHOICES = ("DECODE_E4M3", "DECODE_TABLE", "DECODE_INTEGER", "PREPARE_ALONE", "PANEL_BY_PANEL")  # as there
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SHAPE = 1024, 1024  # outputs and inputs
COPIES_BYTES = 100 << 20  # of a weight, more than caches hold: each call takes another one
TURNS, TURN_S = 3, 0.04
ALWAYS = 1 << 20  # rows: the first way for all
LOST = 3  # numbers of rows in turn with which the second way is a tenth faster: with more it will be, too


def weight_of(choice: str) -> PanelWeight:
    """Return a weight whose product makes the choice."""
    weight = torch.randn(SHAPE)
    if choice == "DECODE_E4M3":
        values, scales = quantize_fp8(weight)
        return fp8_panels(values, scales[:, None], SHAPE[1])
    if choice == "DECODE_TABLE":
        nibbles, scales = torch.randint(16, SHAPE, dtype=torch.uint8), torch.rand(SHAPE[0], SHAPE[1] // 64)
        return CodePanels(Codes.TABLE, nibbles, scales, 64, torch.randn(16))
    if choice == "DECODE_INTEGER":
        levels, scales = torch.randint(256, SHAPE, dtype=torch.uint8), torch.rand(SHAPE[0], SHAPE[1] // 128)
        return CodePanels(Codes.INT8, levels, scales, 128)
    if choice == "PREPARE_ALONE":
        return Int8Panels(torch.randint(-127, 128, SHAPE, dtype=torch.int8), torch.rand(SHAPE[0]))
    return BFloat16Panels(weight.bfloat16())


def serve(choice: str) -> None:
    """Answer each number of rows on stdin with the best time of a turn, in seconds."""
    copies = [weight_of(choice)]
    copies += [weight_of(choice) for _ in range(COPIES_BYTES // copies[0].nbytes)]
    packed = itertools.cycle(copies)
    print("ready", flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            x, best = torch.randn(int(line), SHAPE[1]).bfloat16(), math.inf
            end = time.perf_counter() + TURN_S
            while (started := time.perf_counter()) < end:
                next(packed).apply(x)
                best = min(best, time.perf_counter() - started)
            print(json.dumps(best), flush=True)


class Way:
    """A process that computes a choice in one way."""

    def __init__(self, choice: str, rows: int, cache: str) -> None:
        asked = shlex.split(os.environ.get("CXX", "")) or [str(compiler())]
        flags = [f"-DTUNED={CHOICES.index(choice)}", f"-DTUNED_ROWS={rows}"]
        variables = {"CXX": shlex.join([*asked, *flags]), "RTP_LLM_KERNEL_CACHE": cache, "RTP_LLM_CPU_ISA": isa()}
        self._process = subprocess.Popen(
            [sys.executable, __file__, choice, str(torch.get_num_threads())],
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> None:
        if self._output().readline().strip() != "ready":
            raise RuntimeError("a process that measures did not start; its error is above")

    def seconds(self, rows: int) -> float:
        assert self._process.stdin is not None
        print(rows, file=self._process.stdin, flush=True)
        return float(json.loads(self._output().readline()))

    def end(self) -> None:
        self._process.communicate()

    def _output(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout


def measure(choice: str) -> dict[int, float]:
    """Return by the number of rows how many times as fast the first way is as the second."""
    with tempfile.TemporaryDirectory() as cache:
        ways = [Way(choice, rows, cache) for rows in (ALWAYS, 0)]
        for way in ways:
            way.wait()
        ratios: dict[int, float] = {}
        for rows in ROWS:
            turns = [[way.seconds(rows) for way in ways] for _ in range(TURNS)]
            first, second = (min(times) for times in zip(*turns, strict=True))
            ratios[rows] = second / first
            if len(ratios) >= LOST and max(list(ratios.values())[-LOST:]) < 0.9:
                break
        for way in ways:
            way.end()
    return ratios


def best_limit(ratios: dict[int, float]) -> int:
    """Return the number of rows up to which the first way is to be taken: the least sum of logarithms of times."""

    def gain(limit: int) -> float:
        return sum(math.log(ratio) for rows, ratio in ratios.items() if rows <= limit)

    return max((0, *ratios), key=gain)


def limits_of(text: str, target: str) -> list[int]:
    """Return the line of one instruction set in the table's text."""
    return [int(number) for number in _line(text, target)[1].split(",")]


def with_limits(text: str, target: str, limits: list[int]) -> str:
    """Return the table's text with the line of one instruction set replaced."""
    start, end = _line(text, target).span(1)
    return f"{text[:start]}{', '.join(map(str, limits))}{text[end:]}"


def _line(text: str, target: str) -> re.Match[str]:
    found = list(re.finditer(rf"^    (.*)  // {re.escape(target)}$", text, re.MULTILINE))
    if len(found) != 1:
        raise ValueError(f"{TABLE} has {len(found)} lines of {target}, not one")
    return found[0]


def tune() -> None:
    """Measure all choices under this instruction set, print them and write their limits.

    With one thread, which other work on the machine hardly disturbs, PREPARE_ALONE stays as it is.
    """
    print(f"{isa()}, {torch.get_num_threads()} threads: times as fast is the first way, by rows\n")
    print(f"| | up to | {' | '.join(map(str, ROWS))} |\n|---|---|{'---|' * len(ROWS)}", flush=True)
    text = TABLE.read_text(encoding="utf-8")
    limits = limits_of(text, isa())
    for place, choice in enumerate(CHOICES):
        if choice == "PREPARE_ALONE" and torch.get_num_threads() == 1:
            continue
        ratios = measure(choice)
        limits[place] = best_limit(ratios)
        cells = (f"{ratios[rows]:.2f}" if rows in ratios else "" for rows in ROWS)
        print(f"| {choice} | {limits[place]} | {' | '.join(cells)} |", flush=True)
    TABLE.write_text(with_limits(text, isa(), limits), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    serve(sys.argv[1])
