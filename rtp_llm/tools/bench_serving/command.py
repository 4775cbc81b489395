"""A load generator for servers that generate: ``python -m rtp_llm.bench_serving``, or ``rtp-llm bench``.

It sends requests to a server that runs already, ours or any with the OpenAI API, at a rate, at a concurrency, or as a
trace says, and prints throughput and latencies. docs/benchmarking.md explains the figures.
"""

import argparse
import sys
from collections.abc import Sequence

from rtp_llm.srt.configs.options import ArgumentParser
from rtp_llm.tools.bench_serving.benchmark import run_benchmark
from rtp_llm.tools.bench_serving.options import BenchArgs, BenchError, add_cli_args
from rtp_llm.tools.bench_serving.results import Figures, table

EXIT_FAILED_REQUESTS = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    """Run the benchmark of a command line; print the table; return the exit status.

    0: done; 1: done, but requests failed.

    Raises:
        BenchError: the benchmark cannot be run.
    """
    bench_args = BenchArgs.from_cli_args(args)
    record = run_benchmark(bench_args)
    print(table("Serving benchmark", _what(bench_args, record), record))
    return EXIT_FAILED_REQUESTS if record["failed"] else 0


def _what(args: BenchArgs, record: Figures) -> str:
    """Return three lines on the run. Of a long model name, which may be a path, the end is kept."""
    rate = record["request_rate"]
    arrivals = {"inf": "all at once", "trace": "at the trace's times"}.get(rate, f"{rate} requests/s")
    at_most = f", at most {args.max_concurrency} running" if args.max_concurrency else ""
    model = record["model"] if len(record["model"]) <= 70 else "..." + record["model"][-67:]
    lines = [
        f"{args.api.path} at {args.root_url}",
        f"model {model}",
        f"{args.dataset_name}, {record['num_prompts']} requests, {arrivals}{at_most}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the module's own command line, with the flags and the exit statuses of ``rtp-llm bench``."""
    parser = ArgumentParser(prog="python -m rtp_llm.bench_serving", description="Load on a server, and its figures.")
    add_cli_args(parser)
    try:
        return run(parser.parse_args(argv))
    except BenchError as error:
        print(f"bench_serving: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
