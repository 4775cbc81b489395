"""The workers alone, without server, scheduler and prefix cache: ``python -m rtp_llm.bench_one_batch --model-path X``.

With ``--correct`` it shows logits and texts, to be compared with those of ``scripts/playground/reference_hf.py``.
Without, it times batches of random prompts: each combination of ``--batch-size``, ``--input-len`` and ``--output-len``.
"""

import sys
from collections.abc import Callable, Sequence

from rtp_llm.srt.configs.options import ArgumentParser
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.utils.logging import configure_logging
from rtp_llm.tools.bench_one_batch.correctness import correctness_test
from rtp_llm.tools.bench_one_batch.latency import latency_test
from rtp_llm.tools.bench_one_batch.options import OneBatchArgs, add_cli_args

EXIT_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's); return the exit status: 2 after an error, printed to stderr."""
    parser = ArgumentParser(prog="bench_one_batch", description="Run the workers without server and scheduler.")
    add_cli_args(parser)
    parsed = parser.parse_args(argv)
    try:
        args, server_args = OneBatchArgs.from_cli_args(parsed), ServerArgs.from_cli_args(parsed)
        if server_args.enable_dp_attention:
            raise ValueError("enable_dp_attention needs a scheduler, which divides requests, and none runs here")
        configure_logging(server_args.log_level)
        mode: Callable[[ServerArgs, OneBatchArgs], None] = correctness_test if args.correctness_test else latency_test
        mode(server_args, args)
    except (ValueError, OSError, RuntimeError) as error:
        if parsed.log_level == "debug":
            raise
        print(f"bench_one_batch: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return 0
