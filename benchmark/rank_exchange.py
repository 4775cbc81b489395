"""Sums over ranks: gloo against memory that the ranks share, in microseconds, the best of several rounds.

python -m benchmark.rank_exchange --ranks 2
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.distributed.parallel_state import TENSOR, RankGroup, WorldShape, destroy_world, init_world

# Rows of 4096 numbers: a decode step of one request, of 8, of 64, and a chunk of a prompt.
ROWS = (1, 8, 64, 512)
WIDTH = 4096
DTYPES = (torch.bfloat16, torch.float32)


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


def run_rank(rank: int, ranks: int, meeting: str) -> None:
    provider = provider_named("cpu")
    provider.prepare_rank(rank, ranks)
    provider.use_threads(None, False, rank, ranks)
    world = init_world(rank, WorldShape(ranks), "gloo", f"file://{meeting}", timeout_s=60)
    provider.share_memory(world.group(TENSOR), 60.0)
    measure(world.group(TENSOR), rank)
    destroy_world()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        run_rank(args.rank, args.ranks, args.meeting)
        return
    print("| dtype | sum of | gloo, us | shared memory, us | times faster |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmark.rank_exchange", "--ranks", str(args.ranks)]
        command += ["--meeting", str(Path(folder, "store"))]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(args.ranks)]
        sys.exit(max(rank.wait() for rank in ranks))


if __name__ == "__main__":
    main()
