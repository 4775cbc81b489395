"""Exchanges between ranks, in microseconds, the best of several rounds.

    python -m benchmark.rank_exchange --ranks 2
    python -m benchmark.rank_exchange --ranks 2 --experts

The first are sums: gloo against memory that the ranks share. The second bring tokens to the experts of other ranks and
get their sums back, without the experts: tokens collected on all ranks against tokens sent (``--moe-a2a-backend``).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.distributed.parallel_state import DATA, TENSOR, RankGroup, World, WorldShape, destroy_world, init_world
from rtp_llm.srt.layers.routing import softmax_topk
from rtp_llm.srt.layers.token_exchange import CollectedTokens, SentTokens, goes_to

# Rows of 4096 numbers: a decode step of one request, of 8, of 64, and a chunk of a prompt.
ROWS = (1, 8, 64, 512)
WIDTH = 4096
DTYPES = (torch.bfloat16, torch.float32)
EXPERTS = 64
TOP_KS = (1, 2, 8)


def best_us(call: Callable[[], object], rounds: int, calls: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def measure(group: RankGroup, rank: int) -> None:
    shared, gloo = group.shared, RankGroup(group.rank, group.world_size)
    if shared is None:
        raise SystemExit("the ranks do not share memory here")
    for dtype in DTYPES:
        for rows in ROWS:
            x = torch.zeros(rows, WIDTH, dtype=dtype)
            calls = 200 if rows <= 64 else 30
            both = [best_us(lambda each=each, x=x: each.all_reduce(x), 5, calls) for each in (gloo, group)]
            if rank == 0:
                name = str(dtype).removeprefix("torch.")
                print(f"| {name} | {rows} x {WIDTH} | {both[0]:.0f} | {both[1]:.0f} | {both[0] / both[1]:.1f} |")


def measure_experts(world: World, dtype: torch.dtype) -> None:
    """Each rank has as many tokens; then the first one has many, and the others have one each."""
    group = world.group(DATA)
    ranks = group.world_size
    ways = [CollectedTokens(world), SentTokens(world, EXPERTS // ranks, dtype)]
    for counts in ([1] * ranks, [8] * ranks, [64] * ranks, [512] * ranks, [512] + [1] * (ranks - 1)):
        for top_k in TOP_KS:
            world.step_tokens = counts
            torch.manual_seed(group.rank)
            tokens = torch.randn(counts[group.rank], WIDTH).to(dtype)
            routing = softmax_topk(torch.randn(len(tokens), EXPERTS), top_k, renormalize=True)
            best = [float("inf")] * len(ways)
            for _ in range(5):  # in turns
                calls = 30 if max(counts) <= 64 else 5
                each = [best_us(partial(way.compute, tokens, *routing, as_they_are), 1, calls) for way in ways]
                best = [min(pair) for pair in zip(best, each, strict=True)]
            reached = group.all_reduce(goes_to(routing[1], EXPERTS // ranks, ranks).sum().float()).item()
            if group.rank == 0:
                told = f"{counts[0]} each" if len(set(counts)) == 1 else f"{counts[0]}, others 1"
                part = reached / sum(counts) / ranks
                print(f"| {told} | {top_k} | {part:.2f} | {best[0]:.0f} | {best[1]:.0f} | {best[1] / best[0]:.2f} |")


def as_they_are(tokens: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """In the place of experts."""
    return tokens


def run_rank(rank: int, ranks: int, meeting: str, experts: bool, shared: bool) -> None:
    provider = provider_named("cpu")
    provider.prepare_rank(rank, ranks)
    provider.use_threads(None, False, rank, ranks)
    shape = WorldShape(expert=ranks, data=ranks) if experts else WorldShape(ranks)
    world = init_world(rank, shape, "gloo", f"file://{meeting}", timeout_s=60)
    group = world.group(DATA if experts else TENSOR)
    if shared:
        provider.share_memory(group, 60.0)
    if experts:
        measure_experts(world, torch.bfloat16)
    else:
        measure(group, rank)
    destroy_world()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--experts", action="store_true", help="tokens to experts and back, in place of sums")
    parser.add_argument("--gloo", action="store_true", help="with --experts: through gloo, not through shared memory")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        run_rank(args.rank, args.ranks, args.meeting, args.experts, not args.gloo)
        return
    if args.experts:
        print("| tokens | top_k | reached | none, us | all_to_all, us | ratio |\n|---|---|---|---|---|---|", flush=True)
    else:
        print("| dtype | sum of | gloo, us | shared memory, us | times faster |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmark.rank_exchange", "--ranks", str(args.ranks)]
        command += ["--meeting", str(Path(folder, "store"))]
        command += ["--experts"] * args.experts + ["--gloo"] * args.gloo
        ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(args.ranks)]
        sys.exit(max(rank.wait() for rank in ranks))


if __name__ == "__main__":
    main()
