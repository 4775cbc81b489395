"""What a machine with a GPU should run: is attention right there, does a model answer the same, how fast is it?

    python scripts/gpu_check.py

Compares the torch attention back end on CUDA with kernels/reference.py in float32, bfloat16 and float16, compares tiny
models on CUDA with transformers on the CPU in float32, measures prefill and decode on a random checkpoint, and prints
rows for docs/performance.md. Exit code: 0 all right, 1 something differs, 2 no CUDA. ``--device cpu --size tiny`` tries
the script itself.
"""

import argparse
import datetime
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "test" / "helpers"), str(ROOT / "benchmark")]

from make_checkpoint import SIZES, make_checkpoint
from rtp_llm import Engine
from rtp_llm.srt.attention.torch import TorchAttention
from rtp_llm.srt.cache.spec import CacheGroup, CacheSpec
from rtp_llm.srt.forward_batch import ForwardBatch, ForwardMode
from rtp_llm.srt.kernels import reference as kernels
from rtp_llm.srt.kv_pool import KVPool, slots_of
from rtp_llm.srt.layers.radix_attention import RadixAttention
from tiny_models import TINY_MODELS, assert_same_ids, random_prompts, reference, tiny_model

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}  # absolute, for values of about 1
MODELS = ("llama-llama3-tied", "mistral-window7", "qwen2-mixed-window16", "qwen3-longrope-bias-gelu")


@dataclass(frozen=True)
class AttentionCase:
    """``rows`` are (tokens in the cache, tokens of this step) of each request."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    page_size: int
    rows: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return (
            f"heads {self.num_heads}/{self.num_kv_heads}x{self.head_dim}, window {self.window}, page {self.page_size}"
        )


def attention_cases() -> Iterator[AttentionCase]:
    decode = ((0, 1), (7, 1), (64, 1), (300, 1))
    mixed = ((0, 33), (5, 1), (40, 16), (200, 57), (129, 1))
    for rows in (decode, mixed):
        yield AttentionCase(8, 2, 64, None, 1, rows)
        yield AttentionCase(6, 6, 40, None, 4, rows)
        yield AttentionCase(4, 1, 128, 16, 1, rows)
        yield AttentionCase(9, 3, 80, 7, 4, rows)


def attention_error(case: AttentionCase, dtype: str, device: str) -> float:
    """The largest absolute difference between back end and reference over a random batch."""
    torch_dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    seq_lens = [cached + new for cached, new in case.rows]
    pages = [-(-length // case.page_size) for length in seq_lens]
    spec = CacheSpec(case.num_kv_heads, case.head_dim, case.head_dim, dtype, case.window)
    pool = KVPool([CacheGroup(spec, (0,), case.page_size)], [sum(pages)], device)
    table = random_page_table(pages).to(device)

    scaling = case.head_dim**-0.5
    qs, ks, vs, expected = [], [], [], []
    for row, (cached, new) in enumerate(case.rows):
        q = torch.randn(new, case.num_heads, case.head_dim, device=device).to(torch_dtype)
        k, v = torch.randn(2, cached + new, case.num_kv_heads, case.head_dim, device=device).to(torch_dtype)
        slots = slots_of(table, torch.tensor(row, device=device), torch.arange(cached, device=device), case.page_size)
        pool.write(0, slots, k[:cached], v[:cached])
        expected.append(kernels.attention(q.float(), k.float(), v.float(), scaling, cached, case.window))
        qs.append(q)
        ks.append(k[cached:])
        vs.append(v[cached:])

    layer = RadixAttention(case.num_heads, case.head_dim, scaling, case.num_kv_heads, layer_id=0, window=case.window)
    attention = TorchAttention()
    batch = forward_batch(case, table, pool, device, attention)
    attention.plan(batch)
    output = layer(torch.cat(qs), torch.cat(ks), torch.cat(vs), batch)
    return (output.float() - torch.cat(expected).flatten(1)).abs().max().item()


def random_page_table(pages: list[int]) -> torch.Tensor:
    """[rows, max pages] int32, each page used once, in random order, page 0 by nobody."""
    order = (torch.randperm(sum(pages)) + 1).split(pages)
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    for row, page_ids in enumerate(order):
        table[row, : len(page_ids)] = page_ids
    return table


def forward_batch(
    case: AttentionCase, table: torch.Tensor, pool: KVPool, device: str, attention: TorchAttention
) -> ForwardBatch:
    cached, new = [list(lens) for lens in zip(*case.rows, strict=True)]
    seq_lens = [a + b for a, b in case.rows]
    rows = torch.cat([torch.full((n,), row) for row, n in enumerate(new)]).to(device)
    positions = torch.cat([torch.arange(a, a + b) for a, b in case.rows]).to(device)
    starts = [sum(new[:row]) for row in range(len(new))]

    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=device)

    return ForwardBatch(
        forward_mode=ForwardMode.DECODE if max(new) == 1 else ForwardMode.MIXED,
        batch_size=len(new),
        input_ids=torch.zeros_like(positions),
        positions=positions,
        req_pool_indices=torch.arange(len(new), device=device),
        seq_lens=on_device(seq_lens),
        extend_prefix_lens=on_device(cached),
        extend_seq_lens=on_device(new),
        extend_start_loc=on_device(starts),
        seq_lens_cpu=seq_lens,
        extend_prefix_lens_cpu=cached,
        extend_seq_lens_cpu=new,
        prompt_lens_cpu=seq_lens,
        page_tables=[table],
        out_cache_locs=[slots_of(table, rows, positions, case.page_size)],
        kv_pool=pool,
        attn_backend=attention,
        sample_rows=on_device([]),
    )


def check_attention(device: str) -> Iterator[tuple[str, str, bool]]:
    for dtype, tolerance in TOLERANCE.items():
        errors = {str(case): attention_error(case, dtype, device) for case in attention_cases()}
        worst = max(errors, key=lambda case: errors[case])
        yield f"attention, {dtype}", f"largest error {errors[worst]:.1e} ({worst})", errors[worst] <= tolerance


def check_models(device: str) -> Iterator[tuple[str, str, bool]]:
    for name in MODELS:
        prompts = random_prompts(TINY_MODELS[name].vocab_size, (5, 17, 52, 200))
        with Engine(
            model_path=tiny_model(name),
            dtype="float32",
            device=device,
            skip_tokenizer_init=True,
            context_length=512,
            max_total_tokens=4096,
        ) as engine:
            params = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
            results = engine.generate(input_ids=prompts, sampling_params=params)
        try:
            for result, prompt in zip(results, prompts, strict=True):
                assert_same_ids(result["output_ids"], reference(tiny_model(name), tuple(prompt), 20), name)
        except AssertionError as error:
            yield f"{name}, float32", str(error).splitlines()[0], False
        else:
            yield f"{name}, float32", f"ids of {len(prompts)} prompts equal transformers' on the CPU", True


def measure_speed(device: str, size: str) -> Iterator[tuple[str, str, bool]]:
    dtype = "bfloat16" if device == "cuda" else "float32"
    num_prompts, input_len, output_len = (32, 1024, 128) if device == "cuda" else (4, 64, 16)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(size, Path(folder), dtype)
        with Engine(
            model_path=folder,
            dtype=dtype,
            device=device,
            skip_tokenizer_init=True,
            max_total_tokens=2 * num_prompts * (input_len + output_len),
        ) as engine:
            timed_generate(engine, size, 1, 16, 4)  # warming up
            for batch_size in (1, num_prompts):
                prefill = timed_generate(engine, size, batch_size, input_len, 1)
                both = timed_generate(engine, size, batch_size, input_len, output_len)
                what = f"{size}, {dtype}, {batch_size} x {input_len} + {output_len}"
                yield f"prefill, {what}", f"{batch_size * input_len / prefill:.0f} tokens/s", True
                decoded = batch_size * (output_len - 1)
                yield f"decode, {what}", f"{decoded / (both - prefill):.0f} tokens/s", both > prefill


def timed_generate(engine: Engine, size: str, batch_size: int, input_len: int, output_len: int) -> float:
    """Seconds for random prompts that the cache has not seen."""
    vocab_size = SIZES[size].vocab_size
    prompts = random_prompts(vocab_size, [input_len] * batch_size, seed=random.randrange(1 << 30))
    start = time.perf_counter()
    engine.generate(
        input_ids=prompts, sampling_params={"temperature": 0, "max_new_tokens": output_len, "ignore_eos": True}
    )
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description="Check attention and models on a GPU, and measure their speed.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=SIZES, default="0.6b", help="shape of the checkpoint for measuring speed")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_check needs CUDA, and torch finds none here "
            f"(torch {torch.__version__}, built for CUDA {torch.version.cuda}). "
            "Run it where there is a GPU and a CUDA build of torch; --device cpu --size tiny tries the script.",
            file=sys.stderr,
        )
        return 2
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    today = datetime.date.today().isoformat()
    print("| date | machine | what | result |\n|---|---|---|---|")
    all_right = True
    for checks in (check_attention(args.device), check_models(args.device), measure_speed(args.device, args.size)):
        for what, result, right in checks:
            all_right &= right
            print(f"| {today} | {machine} | {what} | {result if right else 'WRONG: ' + result} |", flush=True)
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
