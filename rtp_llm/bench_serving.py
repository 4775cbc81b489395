"""``python -m rtp_llm.bench_serving``: see ``rtp_llm/tools/bench_serving``."""

import sys

from rtp_llm.tools.bench_serving.command import main

if __name__ == "__main__":
    sys.exit(main())
