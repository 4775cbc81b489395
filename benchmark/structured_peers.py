"""Structured output beside vLLM's CPU build, each of its back ends and of ours, in one run, one after the other.

    python benchmark/structured_peers.py CHECKPOINT --tokenizer-path TOKENIZER --into PEERS

For each side: tokens per second of ``--requests`` streams under a schema and of as many free ones of the same lengths,
in turns, and their ratio; how many of the texts under the schema are what it says; the time to the first token of one
request, free, under a schema that was used before, under a new one, and under the first of all, for which the compiler
is loaded. vLLM's environment is that of ``benchmark/peers/setup.py vllm --into PEERS``; its first start on a checkpoint
compiles for minutes.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for the modules beside this one

from benchmark.peers.peers import DEFAULT_INTO, PEERS  # noqa: E402
from benchmark.structured_sides import Job  # noqa: E402

SIDES = (
    "ours:llguidance",
    "ours:xgrammar",
    "vllm:xgrammar",
    "vllm:guidance",
    "vllm:outlines",
    "vllm:lm-format-enforcer",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokenizer-path", help="Of the checkpoint, if it has one that writes JSON.")
    parser.add_argument("--into", type=Path, default=DEFAULT_INTO, help="The folder of the peers' environments.")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--requests", type=int, default=16, help="Streams at once.")
    parser.add_argument("--rounds", type=int, default=2, help="Turns of each side.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantization", help="Of ours, as of the server; vLLM's weights stay bfloat16 on a CPU.")
    args = parser.parse_args(argv)
    print("| | tokens/s under a schema | free | ratio | right | first token: free | used before | new | first of all |")
    print("|---|---|---|---|---|---|---|---|---|")
    failed = False
    for side in args.sides:
        found = run(side, args)
        failed |= found is None
        print(row(side, found, args.requests) if found is not None else f"| {side} | failed |", flush=True)
    return int(failed)


def run(side: str, args: argparse.Namespace) -> dict[str, Any] | None:
    peer = PEERS[side.partition(":")[0]]
    into = args.into.resolve()
    job = Job(
        side=side,
        checkpoint=str(Path(args.checkpoint).resolve()),
        tokenizer=str(Path(args.tokenizer_path or args.checkpoint).resolve()),
        requests=args.requests,
        rounds=args.rounds,
        threads=args.threads,
        quantization=args.quantization,
    )
    done = subprocess.run(
        [str(peer.python(into)), "-m", "benchmark.structured_sides", json.dumps(asdict(job))],
        env=peer.process_variables(into, args.threads),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(side: str, found: dict[str, Any], num_requests: int) -> str:
    rounds = found["rounds"]
    bound = statistics.median(each["tokens"] / each["bound_s"] for each in rounds)
    free = statistics.median(each["tokens"] / each["free_s"] for each in rounds)
    ratio = statistics.median(each["free_s"] / each["bound_s"] for each in rounds)
    right = f"{sum(each['right'] for each in rounds)} of {num_requests * len(rounds)}"
    firsts = [f"{1000 * statistics.median(times):.0f} ms" for times in found["first_token_s"].values()]
    rest = " | ".join([*firsts, f"{found['first_form_s']:.1f} s"])
    return f"| {side} | {bound:.1f} | {free:.1f} | {ratio:.2f} | {right} | {rest} |"


if __name__ == "__main__":
    sys.exit(main())
