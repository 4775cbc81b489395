"""MMMU-Pro through transformers, with the messages that a server gets from bench_rtp_llm.py.

python benchmark/mmmu_pro/bench_hf.py --model-path DIR
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for the modules beside this one

from benchmark.evaluation import add_output_options, run
from benchmark.mmmu_pro.mmmu_pro import add_task_options, make_task
from benchmark.transformers_answers import add_model_options
from benchmark.transformers_chats import TransformersChats


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="MMMU-Pro through transformers, with the server benchmark's messages.")
    add_task_options(parser)
    add_model_options(parser)
    add_output_options(parser)
    return run(make_task, TransformersChats, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
