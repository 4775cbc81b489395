"""C++ kernels against plain torch, in turn: ``python benchmark/cpu_kernels.py [--threads N] [--only WORD] [--tune]``.

Each case is a kernel and what plain torch does in its place, on the same data; for weights of fewer bits, the kernel of
bfloat16 weights is in its place. Both run in turn, A B A B; of each the best time counts, since other work on the
machine only ever adds.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import cpu_tune
import torch
import torch.nn.functional as F

from rtp_llm.srt.device.choice import building_for, provider_named
from rtp_llm.srt.devices.cpu import elementwise, sampling
from rtp_llm.srt.devices.cpu.blocks import int4_panels
from rtp_llm.srt.devices.cpu.codes import CodePanels, Codes, fp8_panels
from rtp_llm.srt.devices.cpu.linear import BFloat16Panels, Int8Panels, PanelWeight
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.layers.moe import FusedMoE
from rtp_llm.srt.layers.quantization.base import process_weights
from rtp_llm.srt.layers.quantization.fp8 import quantize_fp8
from rtp_llm.srt.layers.quantization.on_load import quantize_int8
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker.sampler import draw

TURNS = 5
TURN_S = 0.1  # a turn is as many calls as fit
HIDDEN, SIZE, HEADS, KV_HEADS, HEAD_DIM = 1024, 3072, 16, 8, 128  # Qwen3-0.6B
VOCAB = 151_936


class Case(NamedTuple):
    name: str
    kernel: Callable[[], object]
    plain: Callable[[], object]


def norms(rows: int) -> Iterator[Case]:
    x, residual = torch.randn(2, rows, HIDDEN).bfloat16()
    weight = torch.randn(HIDDEN).bfloat16()
    yield case("rms_norm", rows, elementwise.rms_norm, reference.rms_norm, x, weight, 1e-6)
    yield case("add_rms_norm", rows, elementwise.add_rms_norm, reference.add_rms_norm, x, residual, weight, 1e-6)
    heads = torch.randn(rows, 2 * HEADS * HEAD_DIM).bfloat16()[:, : HEADS * HEAD_DIM].unflatten(-1, (HEADS, HEAD_DIM))
    weight = torch.randn(HEAD_DIM).bfloat16()
    yield case("rms_norm of heads", rows, elementwise.rms_norm, reference.rms_norm, heads, weight, 1e-6)


def activations(rows: int) -> Iterator[Case]:
    x = torch.randn(rows, 2 * SIZE).bfloat16()
    yield case("silu_and_mul", rows, elementwise.silu_and_mul, reference.silu_and_mul, x)
    yield case("gelu_tanh_and_mul", rows, elementwise.gelu_tanh_and_mul, reference.gelu_tanh_and_mul, x)
    yield case("gelu_and_mul", rows, elementwise.gelu_and_mul, reference.gelu_and_mul, x)


def rotations(rows: int) -> Iterator[Case]:
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
    q, k, _ = (part.unflatten(-1, (-1, HEAD_DIM)) for part in qkv.split([2048, 1024, 1024], dim=-1))
    cos, sin = torch.randn(2, rows, HEAD_DIM // 2).bfloat16()
    yield case("rotary_pair", rows, elementwise.rotary_pair, reference.rotary_pair, q, k, cos, sin, True)


def products(rows: int) -> Iterator[Case]:
    x, weight = torch.randn(rows, HIDDEN).bfloat16(), torch.randn(2 * SIZE, HIDDEN).bfloat16()
    packed = BFloat16Panels(weight)
    yield Case(f"linear bfloat16, {rows} rows", lambda: packed.apply(x), lambda: F.linear(x, weight))


def quantized(rows: int) -> Iterator[Case]:
    """Products with weights of fewer bits, against the kernel of bfloat16."""
    x, weight = torch.randn(rows, HIDDEN).bfloat16(), torch.randn(2 * SIZE, HIDDEN)
    dense = BFloat16Panels(weight.bfloat16())
    values, scales = quantize_fp8(weight)
    blocks = torch.rand(2 * SIZE // 128, HIDDEN // 128).repeat_interleave(128, dim=0)
    nibbles = torch.randint(0, 16, weight.shape, dtype=torch.uint8)
    numbers, sixteen = torch.randn(16), torch.rand(2 * SIZE, HIDDEN // 64)
    forms: dict[str, PanelWeight] = {
        "int8": Int8Panels(*quantize_int8(weight)),
        "fp8, scales of outputs": fp8_panels(values, scales[:, None], HIDDEN),
        "fp8, scales of blocks": fp8_panels(values, blocks, 128),
        "4 bits of a table": CodePanels(Codes.TABLE, nibbles, sixteen, 64, numbers),
    }
    int4 = int4_panels(nibbles[:, ::2] | nibbles[:, 1::2] << 4, torch.rand(2 * SIZE, HIDDEN // 32), None, 32)
    if int4 is not None:
        forms["int4"] = int4
    for name, packed in forms.items():
        yield Case(f"{name}, {rows} rows", partial(packed.apply, x), lambda: dense.apply(x))


def experts(rows: int) -> Iterator[Case]:
    """64 experts of 512 x 1,024, of which 8 for each token."""
    x, weights = torch.randn(rows, HIDDEN).bfloat16(), torch.rand(rows, 8)
    ids = torch.rand(rows, 64).topk(8).indices
    packed, plain = expert_layer(True), expert_layer(False)
    yield case("experts", rows, packed, plain, x, weights, ids)


def expert_layer(on_kernels: bool) -> FusedMoE:
    with building_for(provider_named("cpu" if on_kernels else "reference")):
        layer = FusedMoE(64, HIDDEN, 512, params_dtype=torch.bfloat16, tp_group=RankGroup(0, 1))
        for parameter in layer.parameters():
            parameter.data.normal_(std=0.02)
        process_weights(layer)
    return layer


def choices(rows: int) -> Iterator[Case]:
    logits = torch.randn(rows, VOCAB) * 4
    yield case("argmax and check", rows, sampling.argmax, reference.argmax, logits)
    if rows > 64:
        return
    u = torch.rand(rows, dtype=torch.float64)
    for name, setting in DRAWS.items():
        yield case(f"draw, {name}", rows, sampling.draw, draw, logits, [SamplingParams(**setting)] * rows, u)


DRAWS: dict[str, dict[str, Any]] = {
    "all": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
}

# Per group of cases the numbers of rows.
CASES: dict[Callable[[int], Iterator[Case]], tuple[int, ...]] = {
    norms: (1, 16, 256, 2048),
    activations: (1, 16, 2048),
    rotations: (1, 16, 2048),
    products: (1, 16, 256),
    quantized: (1, 4, 16, 512),
    experts: (1, 16, 256),
    choices: (1, 64, 256),
}


def case(name: str, rows: int, kernel: Callable[..., object], plain: Callable[..., object], *args: object) -> Case:
    return Case(f"{name}, {rows} rows", lambda: kernel(*args), lambda: plain(*args))


def seconds(call: Callable[[], object]) -> float:
    """Per call, over one turn."""
    started, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - started < TURN_S:
        call()
        calls += 1
    return (time.perf_counter() - started) / calls


def measure(one: Case) -> tuple[float, float]:
    turns = [(seconds(one.kernel), seconds(one.plain)) for _ in range(TURNS)]
    return min(kernel for kernel, _ in turns), min(plain for _, plain in turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--only", default="", help="cases whose group has this word in its name: norms, choices, ...")
    parser.add_argument("--tune", action="store_true", help="measure ways of products instead; write gemm_choice.h")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.tune:
        cpu_tune.tune()
        return
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads\n\n| kernel | µs | plain torch, µs | ratio |\n|---|---|---|---|")
    with torch.inference_mode():
        for group, all_rows in CASES.items():
            if args.only not in group.__name__:
                continue
            for rows in all_rows:
                for one in group(rows):
                    kernel, plain = measure(one)
                    print(
                        f"| {one.name} | {kernel * 1e6:,.1f} | {plain * 1e6:,.1f} | {plain / kernel:.1f} |", flush=True
                    )


if __name__ == "__main__":
    main()
