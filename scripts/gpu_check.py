"""What a machine with a GPU should run: is it right there, and how fast is it, beside what the GPU can do?

    python scripts/gpu_check.py [a b c d e f] [--dry-run]

Parts, of at most three minutes each, the most telling first: (a) kernels, attention, models and recorded steps beside
their references; (b) ceilings of the device; (c) prefill and decode of whole models as shares of them; (d) requests
with a common prefix; (e) transformers' continuous batching, and vLLM where it is installed; (f) sums of two ranks, on
one GPU or two. It prints rows for docs/performance.md. Nothing is downloaded; torch, triton and transformers suffice.

Exit code: 0 all right, 1 something is wrong, 2 no CUDA. ``--dry-run`` goes through all of it on a CPU that behaves like
a GPU, with tiny shapes: its figures mean nothing.
"""

import argparse
import datetime
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "test" / "helpers"), str(ROOT / "benchmark")]

from fake_cuda import fake_cuda, registered

from benchmark.gpu.ceilings import measure_ceilings
from benchmark.gpu.correct import check_correctness
from benchmark.gpu.machine import Machine, Rows
from benchmark.gpu.peers import compare_peers
from benchmark.gpu.ranks import check_ranks
from benchmark.gpu.shared import measure_shared_prefix
from benchmark.gpu.speed import measure_speed

PARTS: dict[str, Callable[[Machine], Rows]] = {
    "a": check_correctness,
    "b": measure_ceilings,
    "c": measure_speed,
    "d": measure_shared_prefix,
    "e": compare_peers,
    "f": check_ranks,
}


def run_part(part: str, machine: Machine, name: str) -> bool:
    """Print a part's rows as they come; return whether all is right."""
    today, start, right = datetime.date.today().isoformat(), time.monotonic(), True
    machine.begin_part()
    try:
        for row in PARTS[part](machine):
            right &= row.right is not False
            result = f"WRONG: {row.result}" if row.right is False else row.result
            print(f"| {today} | {name} | {part} | {row.what} | {result} |", flush=True)
    except Exception:
        traceback.print_exc()
        print(f"| {today} | {name} | {part} | the part ended with an error | WRONG: see above |", flush=True)
        right = False
    print(f"part {part}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the engine on a GPU, and measure it.")
    parser.add_argument("parts", nargs="*", metavar="PART", help="a to f; all of them if none is named")
    parser.add_argument("--dry-run", action="store_true", help="go through it on a CPU that behaves like a GPU")
    args = parser.parse_args()
    if unknown := sorted(set(args.parts) - PARTS.keys()):
        parser.error(f"there is no part {unknown[0]!r}; have {', '.join(PARTS)}")
    if not args.dry_run and not torch.cuda.is_available():
        print(
            "gpu_check needs CUDA, and torch finds none here "
            f"(torch {torch.__version__}, built for CUDA {torch.version.cuda}). "
            "Run it where there is a GPU and a CUDA build of torch; --dry-run tries the script.",
            file=sys.stderr,
        )
        return 2
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if args.dry_run:
            stack.enter_context(registered())
            stack.enter_context(fake_cuda())
        machine = Machine("fake_cuda" if args.dry_run else "cuda", args.dry_run, Path(folder))
        name = "dry run" if args.dry_run else torch.cuda.get_device_name()
        print("| date | machine | part | what | result |\n|---|---|---|---|---|")
        right = [run_part(part, machine, name) for part in args.parts or PARTS]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
