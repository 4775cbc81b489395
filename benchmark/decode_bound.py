"""A decode step beside reading the model's weights once, in one process, taking turns (A B A B).

    python benchmark/decode_bound.py --model-path DIR_OR_GGUF --quantization int8

A step of one request reads every weight of a dense model, so that the time of reading them is its bound. The rate of
memory differs between processes, and within one between its pages: so the very memory in which this engine keeps the
weights is read, with as many threads, between the steps. Caches of keys and values are not counted. Prints for each
round the milliseconds of reading and of a step (medians), and the median of the rounds' shares.

``RTP_LLM_CPU_ISA=avx2`` (or ``portable``) measures what a processor without AVX-512 has.
"""

import argparse
import ctypes
import itertools
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from rtp_llm import Engine
from rtp_llm.srt.devices.cpu.build import isa
from rtp_llm.srt.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from rtp_llm.srt.layers.quantization.base import tensors_of

SOURCE = Path(__file__).with_name("read_memory.cpp")
PASSES = 5
FIRST_STEPS = 8  # of a request, which are not counted


def weights_of(model: nn.Module) -> dict[int, int]:
    """Return address and bytes of what a step reads: all tensors but an embedding that is not the head as well."""
    modules = list(model.modules())
    heads = {t.data_ptr() for m in modules if isinstance(m, ParallelLMHead) for t in tensors_of(m)}
    tables = [m for m in modules if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)]
    tied = not heads  # the head uses the table's weight
    left_out = set() if tied else {t.data_ptr() for table in tables for t in tensors_of(table)} - heads
    return {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(model) if tensor.data_ptr() not in left_out}


def reader(weights: dict[int, int], threads: int, folder: str) -> Callable[[], float]:
    """Return what reads all weights, and returns the milliseconds of its fastest pass."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        sys.exit("no C++ compiler; install g++")
    library = Path(folder) / "read_memory.so"
    options = ["-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, str(SOURCE), "-o", str(library)], check=True)
    read = ctypes.CDLL(str(library)).read_all
    read.restype = ctypes.c_double
    pieces, sizes = (ctypes.c_void_p * len(weights))(*weights), (ctypes.c_int64 * len(weights))(*weights.values())
    return lambda: float(read(pieces, sizes, ctypes.c_int64(len(weights)), threads, PASSES)) * 1e3


def step_ms(engine: Engine, prompt: list[int], tokens: int) -> float:
    """Return the median of a request's times from token to token."""
    params = {"temperature": 0, "max_new_tokens": tokens + FIRST_STEPS, "ignore_eos": True}
    times = [time.perf_counter() for _ in engine.generate(input_ids=prompt, sampling_params=params, stream=True)]
    later = times[FIRST_STEPS:]
    return statistics.median(b - a for a, b in itertools.pairwise(later)) * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--quantization", help="as of the server; default: as the checkpoint is")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of the prompt; default: %(default)s")
    parser.add_argument("--output-len", type=int, default=100, help="tokens that are timed; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args(arguments)
    options = {"quantization": args.quantization} if args.quantization else {}
    engine = Engine(
        args.model_path, inline=True, dtype=args.dtype, cpu_threads=args.threads, max_total_tokens=4096, **options
    )
    with engine, tempfile.TemporaryDirectory() as folder:
        worker = engine._runner.core.executor.worker
        weights = weights_of(worker.runner.model)
        read = reader(weights, args.threads, folder)
        draw = random.Random(0)
        vocab_size = engine.model_config.vocab_size
        prompts = [[draw.randrange(vocab_size) for _ in range(args.input_len)] for _ in range(args.rounds + 1)]
        step_ms(engine, prompts[0], args.output_len)  # records the step
        total = sum(weights.values())
        print(f"{isa()}, {args.threads} threads, {total / 1e6:.0f} MB of weights")
        shares = []
        for number, prompt in enumerate(prompts[1:], 1):
            before, step, after = read(), step_ms(engine, prompt, args.output_len), read()
            bound = min(before, after)
            shares.append(bound / step)
            print(
                f"round {number}: reading {bound:.2f} ms ({total / bound / 1e6:.1f} GB/s), a step {step:.2f} ms, "
                f"{shares[-1]:.2f} of the bound",
                flush=True,
            )
    print(f"median {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")


if __name__ == "__main__":
    main()
