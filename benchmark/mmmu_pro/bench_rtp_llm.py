"""MMMU-Pro against a running server, ours or any with OpenAI's API.

python benchmark/mmmu_pro/bench_rtp_llm.py --port 30000
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for the modules beside this one

from benchmark.evaluation import add_output_options, run
from benchmark.mmmu_pro.mmmu_pro import add_task_options, make_task
from benchmark.server_chats import ServerChats, add_chat_options


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="MMMU-Pro against a running server, ours or any with OpenAI's API.")
    add_task_options(parser)
    add_chat_options(parser)
    add_output_options(parser)
    return run(make_task, ServerChats, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
