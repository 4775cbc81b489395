"""What this machine's memory bus and multipliers allow, with a number of threads.

    python benchmark/peers/ceilings.py --threads 2

read_gb_s         reading memory, all threads together (ceilings.cpp)
bf16_gflops       oneDNN's bfloat16 matrix product, by torch, the best of some shapes
int8_gops         its int8 product with int32 sums, likewise
bf16_peak_gflops  the processor's dot product instruction out of registers, where it has AVX-512-BF16
int8_peak_gops    likewise, AVX-512-VNNI
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("ceilings.cpp")
SECONDS_PER_SHAPE = 0.5
# tokens, inputs, outputs: layers of models of about a billion parameters, and square ones
SHAPES = [(512, 1024, 3072), (2048, 1024, 4096), (512, 2048, 8192), (2048, 2048, 2048), (1024, 4096, 1024)]


def measure(threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    return memory_and_registers(threads) | {
        "bf16_gflops": best_rate(bf16_product),
        "int8_gops": best_rate(int8_product),
    }


def memory_and_registers(threads: int) -> dict[str, float]:
    """Builds and runs ceilings.cpp. Exits with what is missing if there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        sys.exit("no C++ compiler; install g++ or name one in CXX")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ceilings"
        options = ["-O3", "-march=native", "-fopenmp", "-std=c++17"]
        subprocess.run([compiler, *options, str(SOURCE), "-o", str(program)], check=True)
        variables = os.environ | {"OMP_NUM_THREADS": str(threads)}
        return json.loads(subprocess.run([program], check=True, stdout=subprocess.PIPE, env=variables).stdout)


def bf16_product(tokens: int, inputs: int, outputs: int) -> Callable[[], torch.Tensor]:
    x = torch.randn(tokens, inputs).to(torch.bfloat16)
    weight = torch.randn(outputs, inputs).to(torch.bfloat16)
    return lambda: torch.nn.functional.linear(x, weight)


def int8_product(tokens: int, inputs: int, outputs: int) -> Callable[[], torch.Tensor]:
    x = torch.randint(-128, 128, (tokens, inputs), dtype=torch.int8)
    weight = torch.randint(-128, 128, (inputs, outputs), dtype=torch.int8)
    return lambda: torch._int_mm(x, weight)


@torch.inference_mode()
def best_rate(product: Callable[[int, int, int], Callable[[], torch.Tensor]]) -> float:
    """1e9 operations a second, of the fastest call of any shape; a multiplication and its addition are two."""
    return max(2 * tokens * ins * outs / fastest_s(product(tokens, ins, outs)) / 1e9 for tokens, ins, outs in SHAPES)


def fastest_s(call: Callable[[], torch.Tensor]) -> float:
    call()
    end_s = time.perf_counter() + SECONDS_PER_SHAPE
    fastest = float("inf")
    while (start_s := time.perf_counter()) < end_s:
        call()
        fastest = min(fastest, time.perf_counter() - start_s)
    return fastest


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what memory and multipliers of this machine allow.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args()
    ceilings = measure(args.threads)
    if args.json:
        print(json.dumps(ceilings))
        return
    for name, value in ceilings.items():
        print(f"{name:18} {value:10.1f}")


if __name__ == "__main__":
    main()
