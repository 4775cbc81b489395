"""GSM8K through transformers, with the prompts that a server gets from bench_rtp_llm.py.

python benchmark/gsm8k/bench_hf.py --model-path DIR
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for the modules beside this one

from benchmark.evaluation import add_output_options, run
from benchmark.gsm8k.gsm8k import add_task_options, make_task
from benchmark.transformers_answers import TransformersAnswers, add_transformers_options


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="GSM8K through transformers, with the server benchmark's prompts.")
    add_task_options(parser)
    add_transformers_options(parser)
    add_output_options(parser)
    return run(make_task, TransformersAnswers, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
