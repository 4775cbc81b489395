"""Products of packed weights, beside each other: ``python benchmark/cpu_products.py [--shape OUTPUTSxINPUTS] ...``.

Every format of a weight [N, K] in turn: bfloat16, int8, int4, fp8 with a scale per output and per 128 inputs of it, and
all types of GGUF's blocks. For one row the speed is told in GB of packed weights per second, which is at best that of
the memory; for more rows in GFLOP per second (a multiplication and an addition are two). Each call takes another copy
of the weight, together more than caches hold, as the layers of a model are. Of several turns the best counts, since
other work on the machine only ever adds.

``RTP_LLM_CPU_ISA=avx2`` (or ``portable``) measures what a processor without AVX-512 has.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch

from rtp_llm.srt.devices.cpu.blocks import NUMBERS, BlockPanels, int4_panels
from rtp_llm.srt.devices.cpu.build import isa
from rtp_llm.srt.devices.cpu.codes import fp8_panels
from rtp_llm.srt.devices.cpu.linear import BFloat16Panels, Int8Panels, PanelWeight
from rtp_llm.srt.kernels.blocks import BLOCK_TYPES

SHAPES = "4096x4096", "3072x1024", "1536x576"  # a large layer, one of Qwen3-0.6B and one of SmolLM2-135M
INT4_GROUPS = {"int4": 32, "int4 in groups of 128": 128}
ROWS = "1,2,4,8,16,64,512"
FP8_GROUPS = {"fp8": 0, "fp8 in groups of 128": 128}  # inputs that share a scale; 0: all
COPIES_BYTES = 100 << 20  # of one weight
TURNS = 3
TURN_S = 0.1  # a turn is as many calls as fit


def weight_in(form: str, num_outputs: int, num_inputs: int) -> PanelWeight:
    """Return a weight of random values; they do not matter to the time."""
    shape = num_outputs, num_inputs
    if form == "bfloat16":
        return BFloat16Panels(torch.randn(shape).bfloat16())
    if form == "int8":
        return Int8Panels(torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(num_outputs))
    if form in INT4_GROUPS:
        levels = torch.randint(256, (num_outputs, num_inputs // 2), dtype=torch.uint8)
        size = INT4_GROUPS[form]
        packed = int4_panels(levels, torch.rand(num_outputs, -(-num_inputs // size)), None, size)
        assert packed is not None  # such groups have blocks
        return packed
    if form in FP8_GROUPS:
        group_size = FP8_GROUPS[form] or num_inputs
        scales = torch.rand(num_outputs, -(-num_inputs // group_size))
        return fp8_panels(torch.randn(shape).to(torch.float8_e4m3fn), scales, group_size)
    size = BLOCK_TYPES[form].row_bytes(num_inputs)
    return BlockPanels(torch.randint(8, 56, (num_outputs, size), dtype=torch.uint8), form, num_inputs)  # finite scales


def fits(form: str, num_inputs: int) -> bool:
    return form not in BLOCK_TYPES or num_inputs % BLOCK_TYPES[form].num_values == 0


def seconds(call: Callable[[], object]) -> float:
    """Per call, of the best turn."""
    best = float("inf")
    for _ in range(TURNS):
        started, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - started < TURN_S:
            call()
            calls += 1
        best = min(best, (time.perf_counter() - started) / calls)
    return best


def measure(form: str, num_outputs: int, num_inputs: int, all_rows: Sequence[int]) -> list[float]:
    """Return seconds of a product for each number of rows, and the bytes of a weight at the end."""
    copies = [weight_in(form, num_outputs, num_inputs)]
    copies += [weight_in(form, num_outputs, num_inputs) for _ in range(COPIES_BYTES // copies[0].nbytes)]
    results: list[float] = []
    for rows in all_rows:
        x = torch.randn(rows, num_inputs).bfloat16()
        place = 0

        def call(x: torch.Tensor = x) -> None:
            nonlocal place
            place = (place + 1) % len(copies)
            copies[place].apply(x)

        results.append(seconds(call))
    return [*results, float(copies[0].nbytes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help=f"outputs x inputs, repeatable; default: {', '.join(SHAPES)}")
    parser.add_argument("--formats", help="comma-separated; default: all")
    parser.add_argument("--rows", default=ROWS, help="comma-separated; default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    forms = args.formats.split(",") if args.formats else ["bfloat16", "int8", *INT4_GROUPS, *FP8_GROUPS, *NUMBERS]
    all_rows = [int(rows) for rows in args.rows.split(",")]
    print(f"{isa()}, {torch.get_num_threads()} threads")
    for shape in args.shape or SHAPES:
        num_outputs, num_inputs = map(int, shape.split("x"))
        columns = " | ".join(f"{rows} row{'s' * (rows > 1)}" for rows in all_rows)
        print(f"\n{num_outputs} outputs, {num_inputs} inputs: GB/s with one row, otherwise GFLOP/s\n")
        print(f"| | bits | {columns} |\n|---|---|{'---|' * len(all_rows)}")
        with torch.inference_mode():
            for form in forms:
                if not fits(form, num_inputs):
                    continue
                *times, size = measure(form, num_outputs, num_inputs, all_rows)
                speeds = [
                    size / taken / 1e9 if rows == 1 else 2 * rows * num_outputs * num_inputs / taken / 1e9
                    for rows, taken in zip(all_rows, times, strict=True)
                ]
                figures = " | ".join(f"{speed:.1f}" if speed < 100 else f"{speed:.0f}" for speed in speeds)
                print(f"| {form} | {size * 8 / num_outputs / num_inputs:.2f} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
