"""Which part of their prompts replicas behind a router find cached, by the router's policy.

    python -m benchmark.routing --trace conversation_trace.jsonl --router vllm-router --policies random cache_aware

Plays the beginning of a trace of Mooncake's (Qin et al., 2025; a line for each request, with the ids of its prompt's
blocks of 512 tokens) against replicas of the embedded model: each block becomes a few characters that say its id, so
that what requests share stays as it was. Requests come in the trace's order, a few at a time. Each policy gets fresh
replicas. ``kv_aware`` (vllm-router) follows the replicas' KV events.
"""

import argparse
import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmark.fleet import Router, end, start_replicas, url_of
from benchmark.soak_server import free_port
from rtp_llm.srt.configs.server_args import DEMO_MODEL

MODEL = "routed"


@dataclass(frozen=True, slots=True)
class Outcome:
    prompt_tokens: int
    cached_tokens: int
    by_replica: list[int]  # requests

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens


def prompts_of(trace: Path, num_requests: int, max_blocks: int, min_turns: int = 1) -> list[str]:
    """The prompts of the first requests of a trace, each cut after ``max_blocks`` blocks.

    Only requests count whose second block is in at least ``min_turns`` of the trace's: the first is the same for many,
    the second tells conversations apart.
    """
    with trace.open() as lines:
        requests = [json.loads(line)["hash_ids"] for line in lines]
    turns = Counter(tuple(blocks[:2]) for blocks in requests)
    chosen = [blocks for blocks in requests if turns[tuple(blocks[:2])] >= min_turns][:num_requests]
    return ["".join(f"{block:06d};" for block in blocks[:max_blocks]) for blocks in chosen]


def best_hit_rate(prompts: Sequence[str], block_chars: int = 7) -> float:
    """The part of the prompts' blocks that earlier ones have: what one replica that forgets nothing finds."""
    seen: set[str] = set()
    found = total = 0
    for prompt in prompts:
        ends = range(block_chars, len(prompt) + 1, block_chars)
        total += len(ends)
        found += sum(prompt[:stop] in seen for stop in ends)
        seen.update(prompt[:stop] for stop in ends)
    return found / total


async def play(url: str, prompts: Sequence[str], concurrency: int) -> None:
    """Send all prompts, in order, ``concurrency`` at a time. Raises for any answer that is not a success."""
    waiting = iter(prompts)

    async def client_loop(client: httpx.AsyncClient) -> None:
        for prompt in waiting:
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0}
            response = await client.post(f"{url}/v1/completions", json=body)
            response.raise_for_status()

    async with httpx.AsyncClient(timeout=300, trust_env=False) as client:
        await asyncio.gather(*(client_loop(client) for _ in range(concurrency)))


def totals(replicas: Sequence[str]) -> Outcome:
    sums = {"prompt_tokens_total": 0, "cached_tokens_total": 0}
    counts = []
    for url in replicas:
        lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
        values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("rtp_llm:")}
        for name in sums:
            sums[name] += int(values[f"rtp_llm:{name}"])
        counts.append(int(values["rtp_llm:num_requests_total"]))
    return Outcome(sums["prompt_tokens_total"], sums["cached_tokens_total"], counts)


def events_flags(port: int, replay_port: int) -> list[str]:
    """A server's flags to publish events of its cache. With ``*`` it binds; vLLM's form connects otherwise."""
    places = {"endpoint": f"tcp://*:{port}", "replay_endpoint": f"tcp://127.0.0.1:{replay_port}"}
    return ["--kv-events-config", json.dumps({"enable_kv_cache_events": True, **places})]


def measure(
    folder: Path,
    router: str,
    policy: str,
    prompts: Sequence[str],
    *,
    num_replicas: int = 2,
    arguments: Sequence[str] = (),
    concurrency: int = 4,
) -> Outcome:
    """Start replicas and a router in a folder, play the prompts, and end them."""
    follows = policy == "kv_aware"
    flags = ["--served-model-name", MODEL, "--log-level", "warning", *arguments]
    ports = [(free_port(), free_port()) for _ in range(num_replicas if follows else 0)]  # the router takes TCP alone
    replicas = start_replicas(folder, num_replicas, flags, [events_flags(*pair) for pair in ports])
    urls = [url_of(replica) for replica in replicas]
    more: list[str] = ["--kv-event-model", MODEL, "--kv-event-block-size", "16"] if follows else []
    for url, (port, replay_port) in zip(urls if follows else (), ports, strict=True):
        more += ["--kv-event-source", f"{url}=tcp://127.0.0.1:{port}"]
        more += ["--kv-event-replay-source", f"{url}=tcp://127.0.0.1:{replay_port}"]
    started = Router(router, folder, urls, policy, *more)
    try:
        started.start()
        asyncio.run(play(started.url, prompts, concurrency))
        return totals(urls)
    finally:
        started.kill()
        end(replicas)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare routing policies by what replicas find cached.")
    parser.add_argument("--trace", type=Path, required=True, help="Mooncake's conversation_trace.jsonl")
    parser.add_argument("--router", default="vllm-router", choices=("vllm-router", "smg"))
    parser.add_argument("--policies", nargs="+", default=["random", "round_robin", "cache_aware"])
    parser.add_argument("--num-requests", type=int, default=600)
    parser.add_argument("--max-blocks", type=int, default=24, help="blocks of a prompt, at most")
    parser.add_argument("--min-turns", type=int, default=1, help="requests of a conversation that is played, at least")
    parser.add_argument("--num-replicas", type=int, default=2)
    parser.add_argument("--model-path", default=DEMO_MODEL)
    parser.add_argument("--max-total-tokens", type=int, default=32768, help="of each replica's cache")
    args = parser.parse_args()
    prompts = prompts_of(args.trace, args.num_requests, args.max_blocks, args.min_turns)
    print(f"{len(prompts)} requests; one replica that forgets nothing: {best_hit_rate(prompts):.1%} of the blocks")
    for policy in args.policies:
        with tempfile.TemporaryDirectory(prefix="rt") as folder:
            flags = ["--model-path", args.model_path, "--max-total-tokens", str(args.max_total_tokens)]
            outcome = measure(
                Path(folder), args.router, policy, prompts, num_replicas=args.num_replicas, arguments=flags
            )
        print(
            f"{args.router} {policy}: {outcome.hit_rate:.1%} of {outcome.prompt_tokens} prompt tokens cached, "
            f"requests by replica {outcome.by_replica}",
            flush=True,
        )


if __name__ == "__main__":
    main()
