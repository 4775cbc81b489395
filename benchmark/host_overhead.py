"""What a step costs the host: scheduler, runner, sampler and messages, around a model that costs nothing.

    python benchmark/host_overhead.py --batch-size 256

A real engine core runs a model whose forward pass returns the same logits at once, over a vocabulary so small that
passes over [batch, vocabulary] do not count. Prints, per decode step, milliseconds by part (the part alone, without the
parts within it), then what a token costs on its way to the client (messages between processes, detokenizer), then how
long the prefix cache takes to match prompts of growing lengths.

Figures are medians over rounds of processor time of the core's thread (--wall: of elapsed time), so that other work on
the machine changes them little.
"""

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from rtp_llm.srt.cache.allocator import PageAllocator
from rtp_llm.srt.cache.radix_cache import RadixCache
from rtp_llm.srt.cache.spec import CacheGroup, CacheSpec
from rtp_llm.srt.checkpoint import read_tokenizer
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.engine.core import EngineCore
from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.managers.detokenizer import Completion, Detokenizer
from rtp_llm.srt.messages import FromCore, GenerateRequest, TokenOutput
from rtp_llm.srt.models.registry import ModelRegistry
from rtp_llm.srt.request_spec import RequestSpec
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.utils.ipc import QueueLink
from rtp_llm.srt.utils.stopwatch import Stopwatch
from rtp_llm.srt.utils.zmq_link import MessageCodec
from rtp_llm.srt.worker.worker import PendingResult

VOCAB_SIZE = 64
PREFILL_CHUNK = 8192
NUM_MATCHES = 5


class StubForCausalLM(nn.Module):
    """A cache, and no computation."""

    def __init__(self, config: Any, quant_config: None = None, prefix: str = "") -> None:
        super().__init__()
        self.attention = RadixAttention(1, 8, 1.0, 1, layer_id=0)
        self.scale = nn.Parameter(torch.ones(1))

    def forward_batch(self, batch: ForwardBatch) -> LogitsProcessorOutput:
        return LogitsProcessorOutput(torch.zeros(batch.sample_rows.shape[0], VOCAB_SIZE), [])


def make_core(folder: str, options: argparse.Namespace, max_len: int) -> tuple[EngineCore, QueueLink]:
    config = {"architectures": ["StubForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE}
    config |= {"max_position_embeddings": max_len, "num_hidden_layers": 1, "torch_dtype": "float32"}
    Path(folder, "config.json").write_text(json.dumps(config))
    ModelRegistry.models["StubForCausalLM"] = StubForCausalLM
    args = ServerArgs(
        model_path=folder, load_format="dummy", device="cpu", dtype="float32", page_size=options.page_size,
        max_running_requests=options.batch_size, chunked_prefill_size=PREFILL_CHUNK, decode_log_interval=1 << 30,
        max_total_tokens=(options.batch_size + 1) * (max_len + options.page_size),
        attention_backend=options.attention_backend,
    )  # fmt: skip
    link = QueueLink()
    link.client.on_messages(lambda messages: None)
    return EngineCore(args, ModelConfig.from_pretrained(folder, load_format="dummy"), link.core), link


def sampling(kind: str, max_new_tokens: int) -> SamplingParams:
    variants: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "sampled": {"temperature": 0.8, "top_p": 0.9},
    }
    return SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, **variants[kind])


def start_decoding(core: EngineCore, link: QueueLink, args: argparse.Namespace, num_steps: int) -> None:
    """Every row has computed its prompt and decodes from now on."""
    draw = random.Random(0)
    params = sampling(args.sampling, num_steps)
    for i in range(args.batch_size):
        prompt = [draw.randrange(VOCAB_SIZE) for _ in range(args.input_len)]
        link.client.send(GenerateRequest(f"request-{i}", prompt, RequestSpec(params, seed=i)))
    core.step(block=False)
    while any(request.uncomputed != 1 for request in core.scheduler.running) or len(core.scheduler.waiting):
        core.step(block=False)
    if len(core.scheduler.running) != args.batch_size:
        raise SystemExit(f"{len(core.scheduler.running)} of {args.batch_size} requests run")


def time_parts(core: EngineCore, link: QueueLink, watch: Stopwatch) -> None:
    """Each part is measured without the parts that it calls."""
    worker = core.executor.worker  # type: ignore[attr-defined]
    runner, sampler = worker.runner, worker.sampler
    watch.wrap(core, "step", ("core: rest",))
    watch.wrap(core.scheduler, "plan", ("scheduler: plan",))
    watch.wrap(core.scheduler, "commit", ("scheduler: commit",))
    watch.wrap(core._meter, "step", ("core: meter",))
    watch.wrap(link.core, "drain", ("messages: to the core",))
    watch.wrap(link.core, "send", ("messages: from the core",))
    watch.wrap(runner, "forward", ("runner: rest",))
    watch.wrap(runner, "apply", ("runner: page tables",))
    watch.wrap(runner, "make_batch", ("runner: batch",))
    watch.wrap(runner, "_forward", ("(the model)",))
    watch.wrap(runner.attn_backend, "plan", ("runner: attention plan",))
    watch.wrap(worker, "sample", ("worker: rest",))
    watch.wrap(PendingResult, "result", ("worker: results",))
    for method in ("sample_and_check", "observe", "logprobs"):
        watch.wrap(sampler, method, (f"sampler: {method}",))


def measure_steps(args: argparse.Namespace) -> None:
    watch = Stopwatch(time.perf_counter if args.wall else time.thread_time)
    with tempfile.TemporaryDirectory() as folder:
        num_steps = 2 * args.rounds * args.steps + args.batch_size * args.input_len // PREFILL_CHUNK + 64
        core, link = make_core(folder, args, args.input_len + num_steps)
        gc.collect()
        gc.freeze()  # as the core's own process does
        start_decoding(core, link, args, num_steps)
        bare_ms = [run_steps(core, args.steps, watch_clock(args)) for _ in range(args.rounds)]
        time_parts(core, link, watch)
        rounds: list[dict[str, float]] = []
        for _ in range(args.rounds):
            run_steps(core, args.steps, watch_clock(args))
            rounds.append({name[0]: 1e3 * part.seconds / args.steps for name, part in watch.take().items()})
        core.shutdown()
    print(f"a decode step of {args.batch_size} rows, {args.sampling}, {args.input_len} tokens before it, ms:")
    print(f"  {'median':>7} {'least':>7}")
    times = {name: [r.get(name, 0.0) for r in rounds] for name in rounds[-1]}
    for name, milliseconds in sorted(times.items(), key=lambda item: -statistics.median(item[1])):
        print(f"  {statistics.median(milliseconds):7.3f} {min(milliseconds):7.3f}  {name}")
    print(f"  {statistics.median(bare_ms):7.3f} {min(bare_ms):7.3f}  all of it, without timers")


def watch_clock(args: argparse.Namespace) -> Callable[[], float]:
    return time.perf_counter if args.wall else time.thread_time


def run_steps(core: EngineCore, num_steps: int, clock: Callable[[], float]) -> float:
    """Milliseconds a step."""
    start_s = clock()
    for _ in range(num_steps):
        core.step(block=False)
    return 1e3 * (clock() - start_s) / num_steps


def measure_tokens(args: argparse.Namespace) -> None:
    """Per step, the way of its tokens to the client: encoding in the core, decoding and text in the client."""
    codec = MessageCodec(get_args(FromCore))
    outputs = [TokenOutput(f"request-{i}", [1000 + i], prompt_tokens=args.input_len) for i in range(args.batch_size)]
    frames = [codec.encode(output) for output in outputs]
    print(f"the way of a step's {args.batch_size} tokens to the client, ms:")
    for name, function in [
        ("core: messages to bytes", lambda: [codec.encode(output) for output in outputs]),
        ("client: bytes to messages", lambda: [codec.decode(frame) for frame in frames]),
    ]:
        print(f"  {median_ms(function, args):7.3f}  {name}")
    server_args = ServerArgs()  # the embedded model's tokenizer
    config = ModelConfig.from_pretrained(server_args.model_path)
    tokenizer = read_tokenizer(server_args, config)
    detokenizer = Detokenizer(tokenizer)
    draw = random.Random(0)
    prompt = [draw.randrange(config.vocab_size) for _ in range(32)]
    completions = [
        Completion(GenerateRequest(output.rid, prompt, RequestSpec(sampling("greedy", 1 << 20), 0)), detokenizer)
        for output in outputs
    ]

    def detokenize() -> None:
        for completion in completions:
            completion.add(TokenOutput(completion.request.rid, [draw.randrange(config.vocab_size)]))
            completion.take_delta()

    print(f"  {median_ms(detokenize, args):7.3f}  client: detokenizer")


def median_ms(function: Callable[[], Any], args: argparse.Namespace) -> float:
    clock = watch_clock(args)
    times = []
    for _ in range(args.rounds * args.steps):
        start_s = clock()
        function()
        times.append(1e3 * (clock() - start_s))
    return statistics.median(times)


def measure_matching(args: argparse.Namespace) -> None:
    """A prompt that is wholly cached, and one that parts from it at its end, in a tree of many prompts."""
    group = CacheGroup(CacheSpec(1, 8, 8, "float32"), (0,), args.page_size)
    allocator = PageAllocator(sum(args.match_lens) * 4 // args.page_size + 64)
    cache = RadixCache([group], [allocator])
    draw = random.Random(0)
    print(f"matching a cached prompt, pages of {args.page_size} tokens:")
    for length in args.match_lens:
        prompt = [draw.randrange(150_000) for _ in range(length)]
        insert(cache, allocator, prompt, args.page_size)
        cut = length // 2 - length // 2 % args.page_size
        insert(cache, allocator, prompt[:cut] + [150_001] * (length - cut), args.page_size)  # splits the node
        times = [median_match_us(cache, prompt, args) for _ in range(args.rounds)]
        microseconds = statistics.median(times)
        print(f"  {length:6d} tokens: {microseconds:8.1f} us, {1e3 * microseconds / length:6.2f} ns a token")


def insert(cache: RadixCache, allocator: PageAllocator, ids: list[int], page_size: int) -> None:
    match = cache.match("", ids, len(ids))
    lock = cache.lock(match)
    pages = [[*match.pages[0], *allocator.allocate(len(ids) // page_size - len(match.pages[0]))]]
    cache.unlock(cache.insert("", ids, pages, lock).lock)


def median_match_us(cache: RadixCache, ids: list[int], args: argparse.Namespace) -> float:
    times = []
    for _ in range(NUM_MATCHES):
        start_s = time.perf_counter()
        match = cache.match("", ids, len(ids) - 1)
        times.append(1e6 * (time.perf_counter() - start_s))
        if match.num_tokens < len(ids) - args.page_size:
            raise SystemExit(f"{match.num_tokens} of {len(ids)} tokens were found")
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a decode step costs the host.")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--input-len", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--sampling", choices=["greedy", "sampled"], default="greedy")
    parser.add_argument("--steps", type=int, default=50, help="decode steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--wall", action="store_true", help="elapsed time instead of processor time")
    parser.add_argument("--page-size", type=int, default=1)
    parser.add_argument("--attention-backend", help="whose planning is measured; unset: the default one")
    parser.add_argument("--match-lens", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure_steps(args)
    measure_tokens(args)
    measure_matching(args)


if __name__ == "__main__":
    main()
