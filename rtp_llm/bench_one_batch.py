"""``python -m rtp_llm.bench_one_batch``: see ``rtp_llm/tools/bench_one_batch``."""

import sys

from rtp_llm.tools.bench_one_batch.command import main

if __name__ == "__main__":
    sys.exit(main())
