"""What structured output costs: requests under a schema beside free ones, in one run, taking turns.

    python benchmark/structured_output.py CHECKPOINT

Prints tokens per second of ``--requests`` streams under a schema and of as many free ones of the same lengths, and
their ratio; the same for free text in which only calls of a strict function are bound; then the time to the first token
of one request: free, under a schema that was used before, and under a new one.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

from structured_sides import FIRST_TOKENS, NUM_ITEMS, schema

from rtp_llm.srt.entrypoints.engine import Engine

PARTS = ("schema", "calls", "first")
NUM_FREE = 64  # tokens of each free text with strict calls
TAG = "<tool_call>"
OPENING = TAG + '\n{"name": "search", "arguments": '
CALL = {
    "triggers": [TAG],
    "structures": [{"begin": OPENING, "schema": schema()["items"], "end": "}\n</tool_call>"}],
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--requests", type=int, default=16, help="Streams at once.")
    parser.add_argument("--rounds", type=int, default=3, help="Turns of each side.")
    parser.add_argument("--quantization", help="As of the server.")
    parser.add_argument("--grammar-backend", default="llguidance", help="As of the server.")
    parser.add_argument("--tokenizer-path", help="Of the checkpoint, if it has one that writes JSON.")
    parser.add_argument("--threads", type=int, help="As --cpu-threads of the server.")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="What is measured.")
    args = parser.parse_args(argv)
    engine = Engine(
        model_path=args.checkpoint,
        quantization=args.quantization,
        tokenizer_path=args.tokenizer_path,
        grammar_backend=args.grammar_backend,
        cpu_threads=args.threads,
    )
    try:
        first_s = timed(engine, [[*range(100, 164)]], [{"max_new_tokens": 1, "json_schema": schema(1)}])[0]
        print(f"first token, the first schema of all, for which the compiler is loaded: {1000 * first_s:.0f} ms")
        for part, measure, what in (("schema", throughput, "under a schema"), ("calls", strict_text, "strict calls")):
            ratios = [measure(engine, args.requests, i) for i in range(args.rounds) if part in args.parts]
            if ratios:
                print(f"{what} / free: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        if "first" in args.parts:
            first_tokens(engine)
    finally:
        engine.shutdown()


def throughput(engine: Engine, num_requests: int, round_: int) -> float:
    """Run both sides once; return the ratio of their tokens per second."""
    prompts = [[100 + round_, *range(200 + i, 264 + i)] for i in range(num_requests)]
    form = {"structured_outputs": {"json": schema(), "disable_any_whitespace": True}}
    bound = timed(engine, prompts, [{"max_new_tokens": 1024, "seed": i, **form} for i in range(num_requests)])
    lengths = [len(result["output_ids"]) for result in bound[1]]
    assert all(len(json.loads(result["text"])) == NUM_ITEMS for result in bound[1])
    free = timed(engine, prompts, [{"max_new_tokens": n, "seed": i, "ignore_eos": True} for i, n in enumerate(lengths)])
    total = sum(lengths)
    print(
        f"round {round_ + 1}: {total} tokens, {total / bound[0]:.1f} tok/s under a schema, {total / free[0]:.1f} free"
    )
    return free[0] / bound[0]


def strict_text(engine: Engine, num_requests: int, round_: int) -> float:
    """Run free text in which what a call's tag opens is bound, and free text, both of as many tokens; return the ratio
    of their tokens per second."""
    prompts = [[130 + round_, *range(200 + i, 264 + i)] for i in range(num_requests)]
    params = [{"max_new_tokens": NUM_FREE, "seed": i, "ignore_eos": True} for i in range(num_requests)]
    bound = timed(engine, prompts, [each | {"structural_tag": CALL} for each in params])
    free = timed(engine, prompts, params)
    tokens = [sum(len(result["output_ids"]) for result in results) for _, results in (bound, free)]
    return (tokens[0] / bound[0]) / (tokens[1] / free[0])


def timed(engine: Engine, prompts: list[list[int]], params: list[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    engine.flush_cache()
    start_s = time.perf_counter()
    results = engine.generate(input_ids=prompts, sampling_params=params)
    return time.perf_counter() - start_s, results


def first_tokens(engine: Engine) -> None:
    forms = {
        "free": [{}] * FIRST_TOKENS,
        "a schema used before": [{"json_schema": schema()}] * FIRST_TOKENS,
        "a new schema": [{"json_schema": schema(100 + i)} for i in range(FIRST_TOKENS)],
    }
    for name, given in forms.items():
        times = [timed(engine, [[*range(300, 364)]], [{"max_new_tokens": 1, **form}])[0] for form in given]
        print(f"first token, {name}: {1000 * statistics.median(times):.1f} ms")


if __name__ == "__main__":
    main()
