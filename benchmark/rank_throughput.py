"""What ranks and replicas give: tokens per second of greedy requests, and as a ratio to one process.

    python -m benchmark.rank_throughput --model-path DIR --requests 16 --ways tp dp

All have the same threads together (``--cpu-threads``). Ways are measured one after the other, each with its own cores;
the one process comes first. A way may be named twice. ``none`` and ``all_to_all`` are of ranks with requests of their
own, for models with experts, by how these exchange tokens.
"""

import argparse
import random
import threading
import time
from typing import Any

from rtp_llm.srt.checkpoint import read_model_config
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.engine.replicas import Replicas, make_supervisor
from rtp_llm.srt.engine.supervisor import Supervisor
from rtp_llm.srt.messages import GenerateRequest, TokenOutput
from rtp_llm.srt.request_spec import RequestSpec
from rtp_llm.srt.sampling_params import SamplingParams

OWN_REQUESTS = {"tp_size": 2, "enable_dp_attention": True}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp": ("--tp-size 2", {"tp_size": 2}),
    "pp": ("--pp-size 2", {"pp_size": 2}),
    "dp": ("--dp-size 2", {"dp_size": 2}),
    "none": ("--enable-dp-attention, none", {**OWN_REQUESTS, "moe_a2a_backend": "none"}),
    "all_to_all": ("--enable-dp-attention, all_to_all", {**OWN_REQUESTS, "moe_a2a_backend": "all_to_all"}),
}


def answered(served: Supervisor | Replicas, prompts: list[list[int]], num_new: int, turn: int) -> float:
    """Send all prompts at once; return the seconds until the last answer is there."""
    params = SamplingParams(temperature=0, max_new_tokens=num_new, ignore_eos=True)
    left = threading.Semaphore(0)

    def take(output: Any) -> None:
        if not isinstance(output, TokenOutput):
            raise SystemExit(f"the engine stopped: {output}")
        if output.finish_reason is not None:
            left.release()

    start = time.perf_counter()
    requests = [GenerateRequest(f"{turn}-{i}", ids, RequestSpec(params, seed=0)) for i, ids in enumerate(prompts)]
    served.client.submit_all([(request, take) for request in requests])
    for _ in prompts:
        left.acquire()
    return time.perf_counter() - start


def measure(
    args: ServerArgs, num_requests: int, prompt_len: int, num_new: int, rounds: int
) -> tuple[float, list[float]]:
    """Return the best rate of some rounds, in generated tokens per second, and the use of stages."""
    config = read_model_config(args)
    draw = random.Random(0)
    served = make_supervisor(args, config)
    served.start()
    best, usage = 0.0, []
    try:
        for turn in range(rounds + 1):  # the first one compiles and warms up
            prompts = [[draw.randrange(config.vocab_size) for _ in range(prompt_len)] for _ in range(num_requests)]
            seconds = answered(served, prompts, num_new, turn)
            if turn:
                best = max(best, num_requests * num_new / seconds)
            usage = served.stats.stage_usage
    finally:
        served.stop()
    return best, usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--cpu-threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", help="as of the server; unset: as the checkpoint says")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["tp", "pp", "dp"])
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    print("| way | tokens/s | to one process | stages used |\n|---|---|---|---|", flush=True)
    first = None
    for name, options in (("one process", {}), *(WAYS[way] for way in given.ways)):
        args = ServerArgs(
            model_path=given.model_path,
            device="cpu",
            dtype=given.dtype,
            quantization=given.quantization,
            cpu_threads=given.cpu_threads,
            max_total_tokens=2 * given.requests * (given.prompt_len + given.new_tokens),
            max_running_requests=given.requests,
            disable_radix_cache=True,
            log_level="error",
            **options,
        )
        rate, usage = measure(args, given.requests, given.prompt_len, given.new_tokens, given.rounds)
        first = first or rate
        used = ", ".join(f"{value:.0%}" for value in usage) or "–"
        print(f"| {name} | {rate:.1f} | {rate / first:.2f} | {used} |", flush=True)


if __name__ == "__main__":
    main()
